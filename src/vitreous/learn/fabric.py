"""The devices and processes that a run has, by Lightning Fabric."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from ..anatomy import read
from ..errors import VitreousError

PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed")  # weights and averages stay in full precision in all of them


def fabric_for(accelerator: str, devices: int | str | list[int], precision: Any, fsdp: bool = False) -> Any:
    """A Fabric that has begun: DDP, or FSDP, where torchrun says that there are several processes."""
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
        from lightning_fabric.utilities.exceptions import MisconfigurationException
    except ImportError:
        raise VitreousError("training needs Lightning Fabric: python -m pip install 'vitreous[learn]'") from None
    if str(precision) not in PRECISIONS:
        raise VitreousError(
            f"cannot train with accelerator={accelerator}, precision={precision}: it is one of {', '.join(PRECISIONS)}"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    many = world > 1
    strategy: Any = DDPStrategy(find_unused_parameters=True) if many else "auto"
    if many and fsdp:
        if str(precision) == "16-mixed":
            raise VitreousError("fsdp knows no loss scale, which precision=16-mixed needs: take bf16-mixed or 32-true")
        strategy = ModelParallelStrategy(lambda module, _: module, data_parallel_size=world, tensor_parallel_size=1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes, devices = (world // here, here) if many else (1, devices)
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


def cut(fabric: Any, model: nn.Module) -> None:
    """Keep on each process its share of every parameter, brought together block by block as they run (PyTorch's FSDP2)."""
    from torch.distributed.fsdp import fully_shard

    mesh = fabric.strategy.device_mesh["data_parallel"]
    for block in read(model).blocks:
        fully_shard(model.get_submodule(block.name), mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(state: Any) -> Any:
    """A state dict whose cut tensors are put together, on the processor. Every process must ask."""
    return tree_map(lambda t: t.full_tensor().cpu() if isinstance(t, DTensor) else t, state)


def like(state: dict[Any, Any], model: dict[Any, Any]) -> dict[Any, Any]:
    """The whole tensors of `state`, cut as those of the same name in `model` are."""

    def as_cut(tensor: Any, by: Any) -> Any:
        cuts = isinstance(by, DTensor) and isinstance(tensor, Tensor) and tensor.shape == by.shape
        return distribute_tensor(tensor.to(by.device), by.device_mesh, by.placements) if cuts else tensor

    return {
        k: {n: as_cut(t, model[k]) for n, t in v.items()} if isinstance(v, dict) else as_cut(v, model[k])
        for k, v in state.items()
    }


def like_optimiser(state: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state, cut as the parameters that it belongs to."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return {**state, "state": like(state["state"], dict(enumerate(parameters)))}
