"""What the analytics of heads share: images in batches, each head's attention, and means with intervals.

Nothing here grows with the number of images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .. import calibrate
from ..anatomy import Anatomy, read
from ..blocks import Reduction, traced
from ..copies.own import run, still
from ..errors import VitreousError
from ..glass import glass
from ..work import tick
from .patches import check_images, places, shares
from .tail import lay_out

RESAMPLES = 1000
TAILS = (2.5, 97.5)


Images = Any  # in the forms of `vitreous.calibrate.images`: tensors, arrays, lists, loaders, data sets of `vt.data`


def batches(images: Images, labels: Tensor | None, size: int, model: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`(x [b, C, H, W], y [b] or None)` on the model's device, at most `size` at a time; what comes with labels brings its own.

    Raises `VitreousError` for what is no images, or not prepared for the model (`vitreous.calibrate.images`), and when `labels`
    are not one class number for each image.
    """
    if size < 1:
        raise VitreousError(f"batch must be at least 1, not {size}")
    if isinstance(images, Tensor):
        check_images(images)
    elif labels is not None and not isinstance(images, (np.ndarray, list)):
        raise VitreousError("a data set has its own labels: give labels= with images only")
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.ndim not in (1, 2) or len(labels) != len(images):
            raise VitreousError(f"labels {list(labels.shape)} do not fit {len(images)} images: one class number each")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    prepared = hasattr(images, "batches")
    given: Iterator[Any] = cast(Any, images).batches(size) if prepared else calibrate.batches(images, size)
    done = 0
    for x, y in given:
        if not done and not prepared:
            calibrate.judge(model, x.to(device))
        y = y if labels is None else labels[done : done + len(x)]
        done += len(x)
        yield x.to(device), None if y is None else y.to(device)
    if not done:
        raise VitreousError("there are no images: give at least one")


def fitting(y: Tensor, out: Tensor) -> Tensor:
    """Labels `[B]`, or marks `[B, K]`, for outputs `[B, K]`; a `VitreousError` where they are not."""
    if y.is_floating_point() and not torch.equal(y, y.round()):
        raise VitreousError("labels must be class numbers, or marks of 0 and 1, not quantities")
    most = out.shape[1] - 1 if y.ndim == 1 else 1
    if (y.ndim == 2 and y.shape[1] != out.shape[1]) or int(y.min()) < 0 or int(y.max()) > most:
        raise VitreousError(f"labels must be classes 0 to {out.shape[1] - 1}, or marks [B, {out.shape[1]}] of 0 and 1")
    return y.long()


def tell(done: int, images: Images) -> None:
    """Progress, where it is known how many images there are."""
    if total := calibrate.count(images):
        tick(min(1.0, done / total))


def heads_seen(
    model: nn.Module,
    x: Tensor,
    anatomy: Anatomy,
    grid: tuple[int, int],
    note: Callable[[Tensor, Tensor], Tensor],
    record: Sequence[str] = (),
) -> tuple[list[Tensor], list[Tensor], list[Reduction]]:
    """What `note(attention, asks)` makes of each block's attention in one pass over `x`, the blocks' outputs if recorded, and
    every reduction of tokens on the way.

    `attention` is `[B, heads, T, T]` among the T tokens that enter the first block. Where a slimmed model has dropped or
    merged some, each asks as the token that it is part of, and what that token receives is divided by shares; `asks` `[B, T]`
    is False for a token that was given up, whose row is 0.

    Raises `VitreousError` for a layer that does not attend over the whole sequence (windows, pooled keys, channels).
    """
    tokens = anatomy.prefix + grid[0] * grid[1]
    with torch.no_grad(), still(model) as own, traced(own) as trace:
        # Pairs of attention and MLP in a list are no modules that run (vit-pytorch): of such blocks nothing could be recorded.
        if "block" in record and any(isinstance(own.get_submodule(b.name), nn.ModuleList) for b in anatomy.blocks):
            lay_out(own, model, anatomy)
        names = [b.attention.name for b in read(own).blocks]

        def whole(a: Tensor) -> Tensor:
            left = trace[-1].tokens if trace else tokens
            if a.ndim != 4 or len(a) != len(x) or a.shape[2:] != (left, left):
                raise VitreousError(
                    f"a layer of {anatomy.kind} attends {' × '.join(map(str, a.shape[2:]))} where {left} tokens are "
                    "(windows, pooling, channels): heads are compared over one sequence of tokens only"
                )
            a = a.float()
            if not trace:
                return note(a, torch.ones(len(x), tokens, dtype=torch.bool, device=a.device))
            now = places(trace, x, tokens)[-1]
            a = a @ shares(trace, x, tokens)[:, None]
            rows = a.gather(2, now.clamp_min(0)[:, None, :, None].expand(-1, a.shape[1], -1, tokens))
            return note(rows * (now >= 0)[:, None, :, None], now >= 0)

        with glass(own, record=("attention", *record), layers=names, reduce=whole) as g:
            run(own, x)
    try:
        seen = [g[name] for name in names]
    except VitreousError:
        raise VitreousError(f"not every attention layer of {anatomy.kind} was seen while it ran") from None
    return [v.attention for v in seen if v.attention is not None], [v.block for v in seen if v.block is not None], trace


def side_by_side(layers: Sequence[Tensor]) -> Tensor:
    """`[B, heads of the layer, …]` for each layer to `[B, layers, most heads, …]`: heads that are not there are NaN."""
    most = max(t.shape[1] for t in layers)
    joined = layers[0].new_full((len(layers[0]), len(layers), most, *layers[0].shape[2:]), torch.nan)
    for i, t in enumerate(layers):
        joined[:, i, : t.shape[1]] = t
    return joined


class Means:
    """The mean of values `[B, …]` that come in batches, with 95 % intervals.

    Intervals are percentiles of the Poisson bootstrap: in each of `RESAMPLES` resamples every image counts as often as a draw
    from Poisson(1) says, so that images can be forgotten as soon as they are counted (Chamandy, Muralidharan, Najmi & Naidu,
    "Estimating Uncertainty for Massive Data Streams", 2012). The same `seed` and batches give the same draws: differences of
    two means are paired.
    """

    def __init__(self, seed: int) -> None:
        self.n = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._total: Any = 0.0
        self._weight = torch.zeros(RESAMPLES, dtype=torch.float64)
        self._totals: Any = 0.0
        self._shape: tuple[int, ...] = ()

    def add(self, values: Tensor) -> None:
        flat = values.detach().double().cpu().flatten(1)
        draws = torch.poisson(torch.ones(RESAMPLES, len(flat)), self._generator).double()
        self.n += len(flat)
        self._shape = tuple(values.shape[1:])
        self._total = self._total + flat.sum(0)
        self._weight = self._weight + draws.sum(1)
        self._totals = self._totals + draws @ flat

    def mean(self) -> np.ndarray:
        return (self._total / self.n).unflatten(0, self._shape).numpy()

    def resamples(self) -> np.ndarray:
        """`[RESAMPLES, …]`: the mean in each resample; that of all images in the rare one that drew none."""
        drew, weight = self._weight[:, None] > 0, self._weight[:, None]
        return torch.where(drew, self._totals / weight, self._total / self.n).unflatten(1, self._shape).numpy()


def interval(resamples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end, each `[…]`, of the 95 % interval from resamples `[RESAMPLES, …]`; NaN where all of them are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, for what is NaN in every resample
        low, high = np.nanpercentile(resamples, TAILS, axis=0)
    return low, high
