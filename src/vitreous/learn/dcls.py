"""Positions that keep away from each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..mixers import repulsion
from .objective import Batch, Now, Objective, Seen, objective, positive


@objective
@dataclass(frozen=True)
class Repulsion(Objective):
    """Khalfaoui-Hassani, Pellegrini and Masquelier, "Dilated convolution with learnable spacings" (ICLR 2023), section 3.2: the
    square of `mixers.repulsion`, so that no two weights of a kernel stand within a distance of 1.

    Added to cross-entropy, after the first `after` of the run (20 of 300 epochs, as published); `adapt.DCLS` and the
    architectures with learnable spacings have positions; a model without any is refused.
    """

    weight: float = 1.0
    after: float = 20 / 300

    def __post_init__(self) -> None:
        positive(self, "weight")

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        late = now.share > self.after
        return {"repulsion": self.weight * late * repulsion(now.model).square()}
