"""InstaTune: a model is fine-tuned as a supernet, so that the search for smaller ones costs no training of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError
from ..prune.subnet import Space, outside, sliced
from .objective import Batch, Now, Objective, Seen, objective, share


@objective
@dataclass(frozen=True)
class InstaTune(Objective):
    """Sridhar et al., "InstaTune: Instantaneous Neural Architecture Search During Fine-Tuning" (ICCV Workshops 2023).

    Each step trains the whole net on the labels and `subnets` drawn at random, on the labels and on the whole net's answers, all
    gradients in one step of the optimiser. Sub-networks have prefixes of blocks (from `depth`), heads and hidden units (from the
    share `least`), head width and scale those of the whole net. The paper leaves the tokens as wide as they are; with `width`
    below 1 they have a prefix of their channels too, from that share, as in AutoFormer (Chen et al., ICCV 2021). The released
    supernet normalises a second time behind attention, as BERT does; here blocks stay as they are, so that pretrained weights
    fit. `prune.sort_units` first is a help.
    """

    subnets: int = 1
    depth: int | None = None
    least: float = 0.5
    levels: int = 3
    width: float = 1.0

    def __post_init__(self) -> None:
        share(self, "least")
        share(self, "width")
        if self.subnets < 1 or self.levels < 1:
            raise VitreousError("InstaTune: subnets and levels must be at least 1")

    def parts(self, model: nn.Module) -> None:
        self.space(model)  # refuses what is no supernet before the first step
        if self.width < 1:
            outside(model)

    def space(self, model: nn.Module) -> Space:
        return Space.of(model, self.depth, self.least, self.levels, self.width)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        space = self.space(now.model)
        labels = batch.shares(seen.logits.shape[1])
        taught = seen.logits.detach().softmax(1)
        losses = []
        for _ in range(self.subnets):
            logits = sliced(now.model, space.draw(), batch.images)
            losses.append(F.cross_entropy(logits, labels) + F.kl_div(logits.log_softmax(1), taught, reduction="batchmean"))
        return {"whole": F.cross_entropy(seen.logits, labels), "subnets": torch.stack(losses).mean()}
