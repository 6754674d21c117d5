"""Sparse then Prune's regulariser of attention."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..glass import Glass, glass
from .objective import Batch, Now, Objective, Seen, objective


def sparsity(attention: Tensor) -> Tensor:
    """R = log(1 + a²), the mean over images, heads, queries and keys of `[B, heads, N, N]`."""
    return torch.log1p(attention.float().square()).mean()


class _Watch(nn.Module):
    looking: Glass | None = None


@objective
@dataclass(frozen=True)
class AttentionSparsity(Objective):
    """Prasetyo, Yudistira & Widodo, "Sparse then Prune: Toward Efficient Vision Transformers" (2023): weight · R, to be added to
    cross-entropy before `prune.SparseThenPrune`.

    Rows of attention sum to one, so that R is least where a row is uniform and most where it is one-hot: it makes attention
    *flatter*, the reverse of what its name says. `of`: "last" as the released code, whose loop keeps the last block's R
    alone, or "all", their mean.
    """

    weight: float = 0.01
    of: Literal["last", "all"] = "last"

    def parts(self, model: nn.Module) -> nn.Module:
        return _Watch()

    def around(self, now: Now) -> AbstractContextManager[Any]:
        assert isinstance(now.parts, _Watch)
        now.parts.looking = glass(now.model, grad=True)
        return now.parts.looking

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        assert isinstance(now.parts, _Watch) and now.parts.looking is not None
        maps, now.parts.looking = now.parts.looking.attention, None
        if not maps:
            raise VitreousError("AttentionSparsity: no softmax attention ran; add CrossEntropy, for which the model runs")
        chosen = maps[-1:] if self.of == "last" else maps
        return {"sparsity": self.weight * torch.stack([sparsity(a) for a in chosen]).mean()}
