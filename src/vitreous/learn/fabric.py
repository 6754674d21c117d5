"""The devices and processes that a run has, by Lightning Fabric."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from ..errors import VitreousError

PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed")  # weights and averages stay in full precision in all of them


def fabric_for(accelerator: str, devices: int | str, precision: Any) -> Any:
    """A Fabric that has begun: DDP where torchrun says that there are several processes."""
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy
        from lightning_fabric.utilities.exceptions import MisconfigurationException
    except ImportError:
        raise VitreousError("training needs Lightning Fabric: python -m pip install 'vitreous[learn]'") from None
    if str(precision) not in PRECISIONS:
        raise VitreousError(
            f"cannot train with accelerator={accelerator}, precision={precision}: it is one of {', '.join(PRECISIONS)}"
        )
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    strategy: Any = DDPStrategy(find_unused_parameters=True) if many else "auto"
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if many else devices
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // int(devices) if many else 1
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, precision=precision, strategy=strategy)
    except (ValueError, MisconfigurationException) as error:
        said = " ".join(str(error).split())
        raise VitreousError(f"cannot train with accelerator={accelerator}, precision={precision}: {said}") from None
    fabric.launch()
    return fabric


def gather(fabric: Any, x: Tensor) -> Tensor:
    """`[b, …]` of every process together, with gradient."""
    return x if fabric.world_size == 1 else fabric.all_gather(x, sync_grads=True).flatten(0, 1)
