"""TOV-VICReg: two views of a frame agree, and three frames tell whether they stand in order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.transform import preparation
from ...errors import VitreousError
from ..objective import Batch, Now, Objective, Seen, objective, pooled, positive
from .beside import array_of, rows_of
from .encode import at_size, shape
from .patches import in_full
from .views import coloured, cropped

ORDERS = tuple(permutations(range(3)))


@in_full
def vicreg(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance of two views `[B, D]` (Bardes, Ponce, LeCun, "VICReg", ICLR 2022, eqs. 1 to 4): the
    variance term halved for each view, the covariance terms added."""
    invariance = F.mse_loss(a, b)
    variance, covariance = a.new_zeros(()), a.new_zeros(())
    for z in (a, b):
        z = z - z.mean(0)
        variance = variance + (1 - (z.var(0) + 1e-4).sqrt()).relu().mean() / 2
        c = z.mT @ z / (len(z) - 1)
        covariance = covariance + (c - c.diagonal().diag()).square().sum() / c.shape[0]
    return invariance, variance, covariance


def in_order(x: Tensor, before: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """`[B, 3C]`: of each image the three features in the order that its label, 0 to 5, tells; 0 leaves them."""
    orders = torch.tensor(ORDERS, device=x.device)[labels]
    return torch.stack([x, before, after], 1).gather(1, orders[:, :, None].expand(-1, -1, x.shape[1])).flatten(1)


class Parts(nn.Module):
    """The projector, and one linear layer that judges the order."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        norm = lambda: nn.BatchNorm1d(hidden)
        layers = nn.Linear(width, hidden), norm(), nn.ReLU(), nn.Linear(hidden, hidden), norm(), nn.ReLU()
        self.projector = nn.Sequential(*layers, nn.Linear(hidden, hidden, bias=False))
        self.temporal_order_predictor = nn.Sequential(nn.Linear(3 * width, 1))


@objective
@dataclass(frozen=True)
class TOVVICReg(Objective):
    """Goulão, Oliveira, "Pretraining the Vision Transformer using Self-Supervised Methods for Vision based Deep Reinforcement
    Learning" (2022); no labels.

    VICReg on two heavy views of a frame; and one linear layer tells from the features of (frame, the one before, the one after),
    shuffled by one of six orders, whether they were left as they were. frames: a `.npy` file `[N, C, H, W]` of normalised frames
    in the order of time, the same that are trained on; neighbours are `distance` away, and stop at the ends. Weights are those of
    the released script, not of its defaults (25, 25, 1, 1). The constant answer has a cross-entropy of 0.451. That the first
    frame is cropped and its neighbours are not tells the slot by itself: try it without.
    """

    wants = ()
    whole_batch: ClassVar[bool] = True
    official: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^(projector|temporal_order_predictor)", r"parts.\1"), (r"^backbone\.", ""),
    )  # fmt: skip
    frames: str | None = None
    distance: int = 3
    invariance: float = 10.0
    variance: float = 10.0
    covariance: float = 10.0
    order: float = 0.1
    hidden: int = 1024

    def __post_init__(self) -> None:
        positive(self, "distance", "hidden")

    def parts(self, model: nn.Module) -> nn.Module:
        if self.frames is None:
            raise VitreousError("TOVVICReg needs frames in the order of time: give frames='frames.npy'")
        return Parts(shape(model, "TOVVICReg", rest=True).width, self.hidden)

    def represent(self, model: nn.Module, x: Tensor) -> Tensor:
        """`[B, C]`, what a classifier would read; of a size that patches do not divide the rest is left out."""
        side = shape(model, "TOVVICReg", rest=True).patch
        h, w = (n // p * p for n, p in zip(x.shape[2:], side, strict=True))
        return at_size(model, pooled, x[:, :, :h, :w])

    def losses(self, parts: Any, x: Tensor, y: Tensor, before: Tensor, after: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The four terms, not yet weighted, of features `[B, C]` of two views and both neighbours."""
        invariance, variance, covariance = vicreg(parts.projector(x), parts.projector(y))
        told = parts.temporal_order_predictor(in_order(x, before, after, labels))[:, 0]
        order = F.binary_cross_entropy_with_logits(told, (labels > 0).to(told))
        return {"invariance": invariance, "variance": variance, "covariance": covariance, "order": order}

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        assert self.frames is not None
        frames, x = array_of(self.frames, "TOVVICReg"), batch.images
        if tuple(frames.shape[1:]) != tuple(x.shape[1:]):
            raise VitreousError(
                f"TOVVICReg: the frames in {self.frames} are {' × '.join(map(str, frames.shape[1:]))}, and the pictures "
                f"{' × '.join(map(str, x.shape[1:]))}: they must be the same that are trained on"
            )
        beside = [batch.index.add(d).clamp(0, len(frames) - 1) for d in (-self.distance, self.distance)]
        before, after = (rows_of(self.frames, i, "TOVVICReg").to(x) for i in beside)
        config = preparation(now.model).config
        mean, std = (x.new_tensor(config[k]).view(-1, 1, 1) for k in ("mean", "std"))
        size = (x.shape[2], x.shape[3])
        views = [coloured(cropped(x, size, (0.08, 1.0)), mean, std, 0.4, 0.5, 0.1) for _ in range(2)]
        views += [coloured(v, mean, std, 0.4, 0.0, 0.0) for v in (before, after)]
        told = self.represent(now.model, torch.cat(views)).chunk(4)
        labels = torch.randint(len(ORDERS), (len(x),)).to(x.device)
        found = self.losses(now.parts, told[0], told[1], told[2], told[3], labels)
        return {name: getattr(self, name) * term for name, term in found.items()}
