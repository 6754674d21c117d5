"""Soft hyperedges behind the blocks of a model that has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..anatomy import read
from ..blocks import plain_blocks
from ..errors import VitreousError
from ..models import softhgnn
from ..steps import Step, step
from .ela import Followed
from .frozen import after_integers


@step("adapt")
@dataclass(frozen=True)
class SoftHGNN(Step):
    """Lei et al., "SoftHGNN: Soft Hypergraph Neural Networks for General Visual Recognition" (IJCV 2026): behind the last block
    tokens meet once in `edges` soft hyperedges, to which the image lends its mean and its largest token, and take back what these
    gathered.

    With `dynamic` and `top_k` selection is sparse: of the last `dynamic` edges `top_k` stay, chosen by the image. It changes what
    the model computes, so train it, with all the rest: `vt.train`. Most of its weights are 2 · edges · width², for what the
    image lends.

    Comes before quantization; deployable.
    """

    edges: int = 16
    heads: int = 8
    dynamic: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.edges <= 1024 or self.heads < 1:
            raise VitreousError(f"adapt.SoftHGNN: edges must lie in 1 to 1024, and heads be at least 1, not {self}")
        if not (0 < self.top_k <= self.dynamic <= self.edges or self.top_k == self.dynamic == 0):
            raise VitreousError(f"adapt.SoftHGNN: of the edges 1 to `dynamic` must stay, and no more be dynamic than are: {self}")

    def refuse_after(self, done: Sequence[Step]) -> str:
        if any(s.name in ("adapt.SoftHGNN", "adapt.HST") for s in done):
            return "what the last block gives is read already by a part of that kind, or by nobody"
        return after_integers(done)

    def refuse_before(self, following: Step) -> str:
        return "a side network does not read what the last block gives" if following.name == "adapt.HST" else ""

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        width = cast(int, read(model).width)
        if width % self.heads:
            raise VitreousError(
                f"{self.name}: the width of {type(model).__name__}, {width}, is no multiple of heads={self.heads}"
            )
        last = plain_blocks(model, self.name)[-1]
        selection = dict(dynamic=self.dynamic, top_k=self.top_k) if self.dynamic else {}
        layer = softhgnn.SoftHGNN(width, self.edges, self.heads, **selection).to(next(last.parameters()))
        parent, _, child = last.name.rpartition(".")
        setattr(model.get_submodule(parent), child, Followed(last, layer).train(last.training))
        last.name += ".layer"
