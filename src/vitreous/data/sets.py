"""`open_data` and `calibration`: one way to every data set."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..errors import VitreousError, nearest
from .fashion import CLASSES, fashion_arrays, sample_arrays
from .folder import Listing, Skipped, list_files, readable, subfolders
from .labels import match
from .pictures import Unreadable, read_picture
from .shards import Member, are_shards, read_shards
from .signals import Reader, preparation_of, reader_for
from .tables import LABELS, SUFFIXES, read_table
from .transform import Preparation, preparation

NAMES = ("sample", "fashion-mnist", "cifar10")
CACHE = Path("~/.cache/torchvision")

Transform = Callable[[Image.Image], torch.Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Arrays:
    """Reads picture `i` of `[N, H, W]` or `[N, H, W, 3]` uint8."""

    images: np.ndarray

    def __call__(self, i: int) -> Image.Image:
        return Image.fromarray(self.images[i])


@dataclass(frozen=True)
class Files:
    """Reads picture `i` from its file, or its shard."""

    paths: Sequence[Any]  # files, or places in shards
    how: Callable[[Any], Any] = read_picture

    def __call__(self, i: int) -> Any:
        return self.how(self.paths[i])


class Data:
    """Labelled pictures, ready for one model; made by `open_data`.

    `name` of the source; `classes` by label; `labels [N]` int64, `[N, K]` of 0 and 1 where a picture may have several classes,
    None where there are none; `skipped`, the files left out and why; `note`, a sentence for the report where the figures need a
    caution, else empty. Pictures are opened when they are asked for.

    It is a data set for torch's `DataLoader` too, whose items are `(x [C, H, W] float32, y)`, `y` -1 without labels; workers may
    be spawned, for it can be pickled (with a `transform` of one's own, if that can be).
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        labels: np.ndarray | None,
        read: Callable[[int], Any],
        prepare: Preparation,
        skipped: Sequence[Skipped] = (),
        note: str = "",
        count: int | None = None,
    ) -> None:
        self.name = name
        self.classes = tuple(classes)
        self.labels: Any = None if labels is None else np.asarray(labels, np.int64)
        self._count = count if labels is None else len(labels)
        self.skipped = list(skipped)
        self.note = note
        self._read = read
        self._prepare = prepare

    def __len__(self) -> int:
        return self._count or 0

    def __getitem__(self, i: int) -> tuple[torch.Tensor, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has images 0 to {len(self) - 1}, not {i}")
        y = -1 if self.labels is None else self.labels[i]
        return self.tensor([i])[0], y if isinstance(y, np.ndarray) else int(y)

    def __repr__(self) -> str:
        return f"Data({self.name!r}, {len(self)} images, {len(self.classes)} classes, {len(self.skipped)} skipped)"

    @property
    def files(self) -> list[Path] | None:
        """The file of each picture; None where they come from elsewhere."""
        paths = self._read.paths if isinstance(self._read, Files) else ()
        return [p for p in paths if isinstance(p, Path)] or None

    @property
    def shards(self) -> np.ndarray | None:
        """Which shard each picture lies in, `[N]` numbers; None where they come from elsewhere."""
        paths = self._read.paths if isinstance(self._read, Files) else ()
        held = [p.shard for p in paths if isinstance(p, Member)]
        return np.unique(np.array(held, dtype=str), return_inverse=True)[1] if held else None

    @property
    def pictures(self) -> bool:
        """Whether these are pictures; else volumes, clips, sound or many channels (`signals`)."""
        return bool(self._prepare.mode)

    @property
    def what(self) -> str:
        """ "pictures", "volumes", "clips", "sound" or "channels"."""
        return self._read.how.what if isinstance(self._read, Files) and isinstance(self._read.how, Reader) else "pictures"

    def picture(self, i: int) -> Image.Image:
        """Picture `i` for people: resized and cropped as the model sees it, so that heatmaps lie on it, 8-bit RGB or L."""
        return self._prepare.view(self._whole(i))

    def tensor(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """The pictures at `indices` as `[n, C, H, W]` float32. Raises `VitreousError` if a file went bad since opening."""
        return torch.stack([self._prepare.to_tensor(self._whole(int(i))) for i in indices])

    def batches(self, size: int = 64, limit: int | None = None) -> Iterator[tuple[torch.Tensor, Any]]:
        """The first `limit` pictures (all when None) as `(x [B, C, H, W] float32, y [B] int64)`, always in the same order; `y` is
        `[B, K]` for several classes, None without labels."""
        end = len(self) if limit is None else min(limit, len(self))
        for start in range(0, end, size):
            stop = min(start + size, end)
            y = None if self.labels is None else torch.from_numpy(self.labels[start:stop].copy())
            yield self.tensor(range(start, stop)), y

    def part(self, indices: Sequence[int] | np.ndarray) -> Data:
        """The pictures at `indices` alone, in that order."""
        at = [int(i) for i in indices]
        read = (
            Files([self._read.paths[i] for i in at], self._read.how)
            if isinstance(self._read, Files)
            else lambda i: self._read(at[i])
        )
        labels = None if self.labels is None else self.labels[at]
        return Data(self.name, self.classes, labels, read, self._prepare, self.skipped, self.note, len(at))

    def _whole(self, i: int) -> Any:
        try:
            found = self._read(i)
            return found.convert(self._prepare.mode) if self.pictures else found
        except Unreadable as reason:
            raise VitreousError(f"image {i} of {self.name} could be read at opening, but no more: {reason}") from reason


def open_data(
    source: str | Path,
    model: Any = None,
    *,
    part: Literal["test", "train"] = "test",
    limit: int | None = None,
    seed: int = 0,
    download: bool = False,
    root: str | Path | None = None,
    transform: Transform | None = None,
    progress: Progress | None = None,
    labelled: bool = True,
) -> Data:
    """Labelled test pictures from `source`, prepared as `model` (by default the bundled model) wants them.

    `source` is "sample" (the first 1,000 test pictures of Fashion-MNIST, in the package), "fashion-mnist" or "cifar10"
    (the official test split), or a folder: one folder a class, or a root with `train` and `test` or `val` parts made of
    such class folders, of which `test` (else `val`) is opened; or a CSV, TSV or Parquet file of pictures and labels
    (`tables.read_table`); or WebDataset shards, as `shards-{0000..0009}.tar` (`shards.read_shards`). Files may be volumes, clips,
    sound or pictures of many channels (`signals`). A name wins over a folder; `./sample` means the folder.

    - `part`: "train" for the training pictures, to learn from; of a folder without parts, the same pictures.
    - `limit`: the first so many pictures. A folder comes in an order drawn from `seed`, so that any beginning of it
      is a fair sample; the official splits keep their own order.
    - `download`: fetch an official set through torchvision where there is no local copy; `root` is the folder where
      torchvision keeps it (by default, the usual places).
    - `transform`: picture to `[C, H, W]` tensor, instead of the one in `model.pretrained_cfg`.
    - `progress(done, total)`: called while the files of a folder are checked.
    - `labelled`: whether pictures without labels are refused. Where they are not, a folder without class folders will do, and
      labels that are not the model's are left out, with a note.

    Every file of a folder is decoded once, so that `skipped` is known; with `limit`, only until there are enough.
    Where the model's classes are known (`expects.expect`), labels are matched with them by name, or by number where the folders
    are called so; else by the alphabet. Class folders named by WordNet ids get ImageNet's labels when the model has its 1,000
    logits. Raises `VitreousError`
    for an unknown name, a missing, empty or unreadable folder, fewer than two classes or more than the model has
    logits. A model without classes (`num_classes` 0) may be given a flat folder of images.
    """
    _at_least_one("limit", limit)
    logits = getattr(model, "num_classes", None)
    logits = logits if isinstance(logits, int) else None
    folder = _folder(source)
    if folder is None:
        classes, images, labels = _arrays(str(source), part, download, root)
        images, labels = images[:limit], labels[:limit]
        classes, labels, note = match(str(source), classes, labels, model, logits, labelled)
        prepare = preparation(model, transform)
        return Data(str(source), classes, labels, Arrays(images), prepare, note=note, count=len(images))

    if are_shards(folder) or folder.is_file():
        listing = listed(folder, part)
    elif labelled or subfolders(folder):
        listing = list_files(folder, part, need_classes=logits != 0 and labelled)
    else:
        listing = replace(list_files(folder, part, need_classes=False), labels=None, classes=())
    if listing.labels is None and labelled and logits != 0:
        by = (
            "labels: put a .cls beside each picture"
            if are_shards(folder)
            else f"column of labels: call it one of {', '.join(LABELS)}"
        )
        raise VitreousError(f"{source} has no {by}")
    reader = None if are_shards(folder) else reader_for(listing.paths, model)
    prepare = preparation(model, transform) if reader is None else preparation_of(reader)
    classes, labels, note = match(str(source), listing.classes, listing.labels, model, logits, labelled)
    order = np.random.default_rng(seed).permutation(len(listing.paths)).tolist()
    good, skipped = readable(listing, order, limit, progress, reader)
    labels = None if labels is None else labels[good]
    if labelled and limit is None and logits != 0 and labels is not None and len(np.unique(labels)) < 2:
        raise VitreousError(
            f"only the class '{classes[labels.flat[0]]}' in {listing.folder} has readable images: accuracy over one class "
            f"says nothing; {len(skipped)} files were skipped"
            + (f", the first {skipped[0].path} ({skipped[0].reason})" if skipped else "")
        )
    files = Files([listing.paths[i] for i in good], reader or read_picture)
    return Data(str(source), classes, labels, files, prepare, skipped, note, len(good))


def listed(source: Path, part: str, need_classes: bool = True) -> Listing:
    """The pictures of a folder, a table, or shards."""
    if are_shards(source) and not source.is_dir():
        return read_shards(source)
    return read_table(source, part) if source.is_file() else list_files(source, part, need_classes)


def calibration(
    source: str | Path,
    model: Any = None,
    n: int = 128,
    seed: int = 0,
    *,
    download: bool = False,
    root: str | Path | None = None,
    transform: Transform | None = None,
) -> torch.Tensor:
    """`n` pictures `[n, C, H, W]` float32, or what else the files hold, to calibrate on, drawn by `seed`, as evenly over the
    classes as they allow.

    They come from the train part wherever the source has one, so never from the pictures that `open_data` gives; a
    folder without parts has only the one kind, and then they do overlap. Labels are not used, so one class or a flat
    folder will do. Unreadable files are passed over. The other arguments and errors are those of `open_data`; fewer
    than `n` readable pictures is an error too.
    """
    _at_least_one("n", n)
    folder = _folder(source)
    if folder is None:
        classes, images, labels = _arrays(str(source), "train", download, root)
        good = balanced_order(labels, seed)[:n]
        data = Data(str(source), classes, labels[good], Arrays(images[good]), preparation(model, transform))
    else:
        listing = listed(folder, "train", need_classes=False)
        of = listing.labels
        one = of if of is not None and of.ndim == 1 else np.zeros(len(listing.paths), np.int64)
        reader = None if are_shards(folder) else reader_for(listing.paths, model)
        prepare = preparation(model, transform) if reader is None else preparation_of(reader)
        good, skipped = readable(listing, balanced_order(one, seed), n, read=reader)
        files = Files([listing.paths[i] for i in good], reader or read_picture)
        data = Data(str(source), listing.classes, one[good], files, prepare, skipped)
    if len(data) < n:
        raise VitreousError(f"{source} has {len(data)} images to calibrate on, not {n}: ask for at most {len(data)}")
    return data.tensor(range(n))


def balanced_order(labels: np.ndarray, seed: int) -> list[int]:
    """All indices of `labels [N]`, drawn by `seed` so that any beginning holds the classes as evenly as they allow."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels), np.int64)  # how many of its own class stand before each
    for label in np.unique(labels):
        mine = shuffled[labels[shuffled] == label]
        rank[mine] = np.arange(len(mine))
    return shuffled[np.argsort(rank[shuffled], kind="stable")].tolist()


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise VitreousError(f"{name} must be at least 1, not {value}")


def _folder(source: str | Path) -> Path | None:
    """The folder or table that `source` means, or None for one of `NAMES`."""
    if isinstance(source, str) and source in NAMES:
        return None
    folder = Path(source).expanduser()
    if folder.is_dir() or (folder.is_file() and folder.suffix in SUFFIXES) or are_shards(folder):
        return folder
    if folder.exists():
        raise VitreousError(
            f"{source} is a file: give a folder of class folders, a table ({', '.join(SUFFIXES)}), or one of {', '.join(NAMES)}"
        )
    if isinstance(source, Path) or len(folder.parts) != 1 or source.startswith((".", "~")):
        raise VitreousError(f"the data folder {source} does not exist")
    raise VitreousError(
        f"no data set and no folder is called '{source}'{nearest(source.lower(), NAMES)}; the data sets are {', '.join(NAMES)}"
    )


def _arrays(name: str, split: str, download: bool, root: str | Path | None) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Class names, pictures `[N, H, W]` or `[N, H, W, 3]` uint8 and labels `[N]` of a data set in `NAMES`."""
    if name == "sample":
        return CLASSES, *sample_arrays(split)
    from torchvision.datasets import CIFAR10, FashionMNIST

    if name == "fashion-mnist":
        raw = Path(root, "FashionMNIST", "raw") if root else None
        where = raw if raw and raw.is_dir() else root
        try:
            return CLASSES, *fashion_arrays(split, where)
        except VitreousError:
            if not download:
                raise
        _download(FashionMNIST, "FashionMNIST", root)
        return CLASSES, *fashion_arrays(split, raw or CACHE.expanduser() / "FashionMNIST" / "raw")

    # torchvision unpickles CIFAR-10's files, but only after it has compared each with the published checksum.
    places = [Path(root)] if root else [Path("data"), CACHE.expanduser()]
    for fetch in (False, True) if download else (False,):
        if fetch:
            _download(CIFAR10, CIFAR10.base_folder, root)
        for place in places:
            try:
                found = CIFAR10(place, train=split == "train")
            except RuntimeError:
                continue
            return tuple(found.classes), found.data, np.array(found.targets)
    raise VitreousError(
        f"no whole copy of CIFAR-10 ({CIFAR10.base_folder}) in {', '.join(map(str, places))}: "
        "put one there, or let torchvision download it (`--download`)"
    )


def _download(kind: Callable[..., object], folder: str, root: str | Path | None) -> None:
    """Let torchvision's data set class `kind` fetch `folder` below `root`, whole or not at all."""
    home = Path(root) if root else CACHE.expanduser()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as aside:
            kind(aside, download=True)
            os.replace(Path(aside, folder), home / folder)
    except (OSError, RuntimeError) as error:
        raise VitreousError(f"could not download {kind.__name__} into {home}: {error}") from error
