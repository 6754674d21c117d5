"""Disjoint images: some to calibrate on, some to choose a recipe by, and the rest to prove it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ..data import Data, calibration, open_data
from ..data.folder import split_parts
from ..data.sets import NAMES
from ..errors import VitreousError

CALIBRATING = 128
CHOOSING = 1000
HELD = 2**29  # bytes of images that choosing holds in memory
SHARE = 0.4  # of the images that are left after calibration, to choose on


@dataclass(frozen=True)
class Split:
    """`calibrate` `[N, C, H, W]`, which may be images of a training part; `choose` and `prove`, of the test part."""

    calibrate: Tensor
    choose: Data | None
    prove: Data

    def __str__(self) -> str:
        said = [f"{len(self.calibrate)} to calibrate", f"{len(self.prove)} to prove"]
        if self.choose is not None:
            said.insert(1, f"{len(self.choose)} to choose the recipe")
        return f"images, none used twice: {', '.join(said)}"


def split(
    source: str | Path,
    model: nn.Module,
    *,
    choosing: bool,
    calibrate: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    download: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Split:
    """Images of `source` for `model`; none is in two parts.

    Where the source has a training part, `calibrate` images (by default 128, or all there are) come from it. Elsewhere they
    come from the same folder, by default at most a fifth of it. Of the other images (the first `limit`, if given) 40 % and at
    most 1,000 choose the recipe, if there is one to choose, and the rest prove it. Raises `VitreousError` as `open_data` does,
    and for a source with too few images for every part to have one.
    """
    apart = _has_train(source)
    wanted = CALIBRATING if calibrate is None else calibrate
    more = None if limit is None else limit + (0 if apart else wanted)
    data = open_data(source, model, limit=more, seed=seed, download=download, progress=progress)
    order = np.arange(len(data))
    if apart:
        held = _from_train(source, model, calibrate, seed, download)
    else:
        count = wanted if calibrate is not None else max(1, min(wanted, len(data) // 5))
        if len(data) < count + 1 + choosing:
            raise VitreousError(
                f"{source} has {len(data)} images and no training part: too few to calibrate on {count}"
                f"{', choose' if choosing else ''} and prove on others; add images, or a train and a test folder"
            )
        # Of a folder that is opened in random order the last are as good as any, and the first stay what `limit` says.
        held, order = data.tensor(order[-count:]), order[:-count][:limit]
    if not choosing:
        return Split(held, None, data.part(order))
    if len(order) < 2:
        raise VitreousError(f"{source} has {len(order)} image to choose and to prove on: give at least two, best hundreds")
    n = max(1, min(CHOOSING, round(SHARE * len(order)), HELD // held[0].nbytes))
    return Split(held, data.part(order[:n]), data.part(order[n:]))


def to_heal(source: str | Path, model: nn.Module, prove: Data, *, seed: int, download: bool) -> tuple[Data, Data]:
    """Images to learn from, and those that are left to prove on: the training part, or else half of `prove`."""
    if _has_train(source):
        return open_data(source, model, part="train", seed=seed, download=download), prove
    half = len(prove) // 2
    if half < 1:
        raise VitreousError(f"{source} has too few images to heal on some and prove on others: add images, or a train folder")
    return prove.part(range(half)), prove.part(range(half, len(prove)))


def _has_train(source: str | Path) -> bool:
    folder = Path(source).expanduser()
    return source in NAMES or (folder.is_dir() and split_parts(folder)[1] is not None)


def _from_train(source: str | Path, model: nn.Module, n: int | None, seed: int, download: bool) -> Tensor:
    if n is not None:
        return calibration(source, model, n, seed, download=download)
    for n in (CALIBRATING, 64, 32, 16, 8, 4, 2):
        try:
            return calibration(source, model, n, seed, download=download)
        except VitreousError:
            continue
    return calibration(source, model, 1, seed, download=download)
