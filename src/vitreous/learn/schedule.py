"""EViT's keep rate while fine-tuning: from all tokens down to the target."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from ..errors import VitreousError
from ..steps import history_of
from ..tokens.evit import EViT, KeepByClassAttention


def keep_rate(epoch: float, start: float, end: float, target: float) -> float:
    """Liang et al., "Not All Patches are What You Need" (ICLR 2022), as in the official code: the keep rate at `epoch`.

    1 before the epoch `start`, `target` from `end` on, half a cosine between. `epoch` may be fractional: the official code
    counts batches. Its script for 300 epochs from scratch has start 10, end 110; fine-tuning for 30 starts at the target.
    """
    if epoch < start:
        return 1.0
    if epoch >= end:
        return target
    return target + (1 - target) * (1 + math.cos(math.pi * (epoch - start) / (end - start))) / 2


def set_keep(model: nn.Module, keep: float) -> None:
    """Make a model slimmed by EViT keep the share `keep` in all the blocks where it shortens, in place.

    Its recipe follows, so that `save` stores the model as it is. Raises `VitreousError` without EViT, or for a share outside
    (0, 1].
    """
    reducers = [m for m in model.modules() if isinstance(m, KeepByClassAttention)]
    if not reducers:
        raise VitreousError("learn.set_keep needs a model with EViT: slim(model, EViT()) first")
    EViT(keep=keep)  # raises for a share outside (0, 1]
    history = history_of(model)
    history.done[:] = [(replace(s, keep=keep) if isinstance(s, EViT) else s, plan) for s, plan in history.done]
    for reducer in reducers:
        reducer.keep = keep
