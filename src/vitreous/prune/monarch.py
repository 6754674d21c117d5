"""Give the linear layers of MLPs Monarch matrices, the nearest to what they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..blocks import plain_blocks
from ..errors import VitreousError
from ..mixers import MonarchLinear
from ..steps import Step, step


@step("prune")
@dataclass(frozen=True)
class Monarch(Step):
    """Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training" (ICML 2022), dense to sparse: the
    two layers of every MLP become products of two block-diagonal matrices of `nblocks` blocks each, by the projection that is
    optimal in Frobenius norm (`mixers.MonarchLinear.project`).

    At nblocks 4 an MLP four times as wide keeps 31 % of its weights, at 2 twice as many. A projected model wants fine-tuning:
    `vt.heal`. Where layers are below about a thousand features wide, runtimes are hardly faster in blocks than in one product.

    Deployable, in floats: its products are of no linear layer, so quantizers, which come after, leave them as they are.
    """

    nblocks: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.nblocks <= 64:
            raise VitreousError(f"prune.Monarch: nblocks must lie in 2 to 64, not {self.nblocks}")

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        found = False
        for block in plain_blocks(model, self.name):
            mlp = cast(nn.Module, block.mlp)
            for name, layer in list(mlp.named_modules()):
                if isinstance(layer, nn.Linear):
                    parent, _, last = name.rpartition(".")
                    setattr(mlp.get_submodule(parent), last, MonarchLinear.nearest(layer, self.nblocks))
                    found = True
        if not found:
            raise VitreousError(f"{self.name}: no MLP of {type(model).__name__} has linear layers; is it in integers already?")

    def covers(self, model: nn.Module, calibration: Any) -> str:
        made = [m for m in model.modules() if isinstance(m, MonarchLinear)]
        before = sum(m.in_features * m.out_features for m in made)
        after = sum(m.blkdiag1.numel() + m.blkdiag2.numel() for m in made)
        return f"{len(made)} layers of {before:,} weights keep {after:,}"
