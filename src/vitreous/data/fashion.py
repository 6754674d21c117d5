"""Fashion-MNIST (Xiao, Rasul & Vollgraf, 2017, MIT licence): the bundled sample, or a whole local copy."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from ..errors import VitreousError
from ..files.archives import gunzip
from ..models.bundled import CLASSES as CLASSES

# The first 1,000 pictures of the official test split and 256 of the train split; made by benchmarks/make_sample.py.
SAMPLE = Path(__file__).parent / "bundled" / "fashion_sample.npz"

LARGEST = 60_000 * 28 * 28 + 16  # bytes of its largest file, unpacked

# Debian's package dataset-fashion-mnist, then torchvision's own layout below a folder that people commonly use.
PLACES = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw", "~/.cache/torchvision/FashionMNIST/raw")


def sample_arrays(split: str = "test") -> tuple[np.ndarray, np.ndarray]:
    """Pictures `[N, 28, 28]` uint8 and labels `[N]` uint8 of the bundled sample: N is 1,000 (`test`) or 256 (`train`)."""
    with np.load(SAMPLE, allow_pickle=False) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]


def read_idx(path: Path) -> np.ndarray:
    """One IDX file, gzipped or plain, as uint8: `[N]` labels or `[N, 28, 28]` pictures."""
    try:
        raw = gunzip(path, LARGEST) if path.suffix == ".gz" else path.read_bytes()
        dims = raw[3]
        shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise VitreousError(f"{path} is damaged or no IDX file ({error}): fetch it again") from error


def fashion_arrays(split: str = "test", root: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `[N, 28, 28]` uint8 and labels `[N]` uint8 of the official `train` or `test` split.

    `root` is a folder with the four IDX files (plain or `.gz`); by default the usual places are tried.
    Raises `VitreousError` when no copy is found, or when it is damaged.
    """
    stem = "train" if split == "train" else "t10k"
    places = [Path(root)] if root else [Path(p).expanduser() for p in PLACES]
    for place in places:
        for ending in ("", ".gz"):
            images = place / f"{stem}-images-idx3-ubyte{ending}"
            labels = place / f"{stem}-labels-idx1-ubyte{ending}"
            if images.exists() and labels.exists():
                return read_idx(images), read_idx(labels)
    raise VitreousError(
        f"no copy of Fashion-MNIST in {', '.join(map(str, places))}: install Debian's package dataset-fashion-mnist, "
        "or let torchvision download it (`--download`)"
    )
