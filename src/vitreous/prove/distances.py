"""How far outputs lie from the reference's: relative error, direction, and whether a search finds the same neighbour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .statistics import Interval, wilson

SEARCHED = 10_000  # images among which neighbours are looked for; of more, the first
TIED = 1e-5  # similarities this close are no order


@dataclass(frozen=True)
class FeatureError:
    """Distance of outputs `f` from the reference's `r`, an image each: `|f - r| / |r|`, and the cosine between them.

    Of one number an image, `|f - r|` is divided by the standard deviation of `r` over the images, and there is a correlation
    over the images instead of cosines.
    """

    mean: float
    worst: float
    mean_cosine: float | None
    worst_cosine: float | None
    errors: list[float]
    cosines: list[float]
    neighbours: Interval | None = None
    """Share of images whose nearest other image (by cosine) stays the nearest; None where that is not defined."""
    correlation: float | None = None


class Distances:
    """Collects the errors of one output over batches; features `[B, D]` also for the search of neighbours."""

    def __init__(self, search: bool) -> None:
        self.search = search
        self.errors: list[Tensor] = []
        self.cosines: list[Tensor] = []
        self.features: list[tuple[Tensor, Tensor]] = []

    def add(self, out: Tensor, ref: Tensor) -> None:
        f, r = out.flatten(1).double(), ref.flatten(1).double()
        self.errors.append((f - r).norm(dim=1) / r.norm(dim=1).clamp_min(1e-12))
        self.cosines.append(torch.cosine_similarity(f, r, dim=1))
        if self.search and sum(len(kept) for kept, _ in self.features) < SEARCHED:
            self.features.append((out.flatten(1), ref.flatten(1)))

    def result(self) -> FeatureError:
        errors, cosines = torch.cat(self.errors), torch.cat(self.cosines)
        f, r = (torch.cat(part) for part in zip(*self.features, strict=True)) if self.features else (None, None)
        if f is not None and r is not None and f.shape[1] == 1:
            return _of_numbers(f[:, 0].double(), r[:, 0].double())
        return FeatureError(
            mean=float(errors.mean()),
            worst=float(errors.max()),
            mean_cosine=float(cosines.mean()),
            worst_cosine=float(cosines.min()),
            errors=errors.tolist(),
            cosines=cosines.tolist(),
            neighbours=None if f is None or r is None else neighbours_kept(f, r),
        )


def neighbours_kept(f: Tensor, r: Tensor) -> Interval | None:
    """Share of images whose nearest other by `f` `[N, D]` is as near as the nearest by `r` `[N, D]`, with Wilson's interval.

    None for fewer than three images, and where `r` finds all others equally near, which orders nothing.
    """
    if len(r) < 3:
        return None
    f, r = (torch.nn.functional.normalize(t.float(), dim=1) for t in (f, r))
    kept, spread = 0, 0.0
    for start in range(0, len(r), 1024):
        rows = torch.arange(start, min(start + 1024, len(r)))
        by_f, by_r = f[rows] @ f.T, r[rows] @ r.T
        by_f[torch.arange(len(rows)), rows] = by_r[torch.arange(len(rows)), rows] = -2.0
        found = by_r.gather(1, by_f.argmax(1, keepdim=True))[:, 0]
        best = by_r.amax(1)
        by_r[torch.arange(len(rows)), rows] = 2.0
        spread = max(spread, float((best - by_r.amin(1)).max()))
        kept += int((found >= best - TIED).sum())
    return wilson(kept, len(r)) if spread > TIED else None


def _of_numbers(f: Tensor, r: Tensor) -> FeatureError:
    deviation = float(r.std()) if len(r) > 1 else 0.0
    errors = (f - r).abs() / max(deviation, 1e-12)
    varies = deviation > 1e-9 * float(r.abs().max()) and float(f.std()) > 0 if len(r) > 1 else False
    return FeatureError(
        mean=float(errors.mean()),
        worst=float(errors.max()),
        mean_cosine=None,
        worst_cosine=None,
        errors=errors.tolist(),
        cosines=[],
        correlation=float(np.corrcoef(f.numpy(), r.numpy())[0, 1]) if varies else None,
    )
