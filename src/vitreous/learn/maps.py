"""Feature maps of any model: which submodules end its last two stages, and their output as `[B, C, h, w]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from .objective import look


def last_stages(model: nn.Module, name: str) -> tuple[str, str]:
    """The submodules that end the last two stages of a pyramid, or the third quarter and the whole of a plain ViT's blocks.

    Raises `VitreousError` for a model that tells of neither.
    """
    told: Any = getattr(model, "feature_info", None) or ()
    if len(told) > 1 and told[-1].get("reduction") != told[-2].get("reduction"):
        return told[-2]["module"], told[-1]["module"]
    blocks = read(model).blocks
    if len(blocks) > 1:
        return blocks[max(3 * len(blocks) // 4, 1) - 1].name, blocks[-1].name
    raise VitreousError(f"{name} does not know the stages of {type(model).__name__}: give the names of two of its modules")


def as_map(out: Tensor, prefix: int = 0) -> Tensor:
    """What left a stage, of square pictures, as `[B, C, h, w]`; it may have channels last, or be tokens after `prefix` others."""
    if out.ndim == 4:
        last = out.shape[1] == out.shape[2] != out.shape[3]
        return out.permute(0, 3, 1, 2) if last else out
    side = round((out.shape[1] - prefix) ** 0.5)
    if side * side != out.shape[1] - prefix:
        raise VitreousError(f"{out.shape[1] - prefix} tokens are no square of patches: give pictures as high as they are wide")
    return out[:, prefix:].mT.unflatten(2, (side, side))


@torch.no_grad()
def probe(model: nn.Module, size: int, layers: tuple[str, ...]) -> list[Tensor]:
    """What leaves `layers` for one grey picture of `size` pixels a side."""
    training, p = model.training, next(model.parameters())
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    grey = torch.zeros(1, channels, size, size, device=p.device, dtype=p.dtype)
    seen = look(model.eval(), grey, ("logits",), (), layers)
    model.train(training)
    return [seen.layers[name] for name in layers]
