"""Volumes, clips, sound and pictures of many channels, each as a tensor for one model."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ..errors import VitreousError
from .pictures import MAX_BYTES, Unreadable
from .transform import Preparation

VOLUMES = (".nii", ".nii.gz")
CLIPS = (".mp4", ".avi", ".webm", ".mov", ".mkv")
SOUNDS = (".wav", ".flac", ".ogg")
ARRAYS = (".npy", ".tif", ".tiff")
RATE = 16_000  # samples a second, of spectrograms
LOUDNESS = (-4.27, 4.57)  # mean and deviation of AudioSet's and LibriSpeech's log-mels, as SSAST takes them


@dataclass(frozen=True)
class Reader:
    """How files become tensors `[C, *sides]` for a model: `what` they are, of `sides` as it takes them."""

    what: str
    sides: tuple[int, ...]
    channels: int

    def __call__(self, path: Path) -> Tensor:
        """Raises `Unreadable` for a file that is damaged, vast, of other channels, or holds what is no number."""
        try:
            if path.stat().st_size == 0:
                raise Unreadable("empty file (0 bytes)")
            x = READERS[self.what](path, self.sides)
        except (Unreadable, VitreousError):
            raise
        except Exception as error:  # every library has its own kinds
            raise Unreadable(f"cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
        if not x.isfinite().all():
            raise Unreadable("holds values that are no numbers")
        if x.shape[0] != self.channels:
            raise Unreadable(f"{x.shape[0]} channels, and the model takes {self.channels}: open it with in_chans={x.shape[0]}")
        return x


def preparation_of(reader: Reader) -> Preparation:
    return Preparation(
        "", unchanged, middle, f"{reader.what} of {' x '.join(map(str, reader.sides))}, {reader.channels} channels"
    )


def unchanged(x: Any) -> Tensor:
    return x


def middle(x: Any) -> Image.Image:
    """The first channel in grey; of volumes and clips its middle slice."""
    flat = x[0] if x.ndim == 3 else x[0, x.shape[1] // 2] if x.shape[1] < x.shape[3] else x[0, :, :, x.shape[3] // 2]
    grey = 255 * (flat - flat.min()) / (flat.max() - flat.min()).clamp_min(1e-6)
    return Image.fromarray(grey.byte().numpy())


def reader_for(paths: Sequence[Path], model: Any) -> Reader | None:
    """By the kind of most of `paths`; None where they are pictures. Raises `VitreousError` for a model that takes none of that
    kind, and where the library that reads them is missing."""
    kinds = [kind_of(p) for p in paths]
    what = max(sorted(set(kinds)), key=kinds.count, default="pictures")
    embed: Any = getattr(model, "patch_embed", None)
    channels = getattr(getattr(embed, "proj", None), "in_channels", 3)
    if what == "channels" and channels in (1, 3) and not any(p.suffix.lower() == ".npy" for p in paths):
        return None  # plain TIFF
    if what == "pictures":
        return None
    for library in LIBRARIES[what]:
        need(library)
    if what == "volumes":
        grid = getattr(model, "grids", {}).get(5)
        if grid is None:
            raise VitreousError(f"volumes are for a unified ViT (unified_vit_small): {type(model).__name__} takes none")
        kernel = embed.proj3.kernel_size
        return Reader(what, tuple(g * k for g, k in zip(grid, kernel, strict=True)), embed.proj3.in_channels)
    if what == "clips":
        size = getattr(embed, "size", None)
        if size is None:
            raise VitreousError(f"clips are for a video ViT (video_vit_small): {type(model).__name__} takes none")
        return Reader(what, tuple(size), channels)
    size = getattr(embed, "img_size", None)
    if size is None:
        raise VitreousError(f"{what} need a model that cuts inputs of one size into patches: {type(model).__name__} tells none")
    return Reader(what, tuple(size), channels)


def kind_of(path: Path) -> str:
    name = path.name.lower()
    found = {"volumes": VOLUMES, "clips": CLIPS, "sound": SOUNDS, "channels": ARRAYS}
    return next((what for what, ends in found.items() if name.endswith(ends)), "pictures")


def need(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        raise VitreousError(f"these files need {library}: python -m pip install 'vitreous[signals]'") from None


def volume(path: Path, sides: Sequence[int]) -> Tensor:
    """`[C, H, W, D]` in [0, 1] by the volume's least and greatest value; more than three axes are channels."""
    held = need("nibabel").load(path)
    _small(held.shape, path)
    x = torch.from_numpy(np.asarray(held.get_fdata(dtype=np.float32)))
    if not 3 <= x.ndim <= 4:
        raise Unreadable(f"{x.ndim} axes: a volume has three, or channels besides")
    x = x[None] if x.ndim == 3 else x.movedim(3, 0)
    x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-6)
    return F.interpolate(x[None].contiguous(), tuple(sides), mode="trilinear", align_corners=False)[0]


def clip(path: Path, sides: Sequence[int]) -> Tensor:
    """`[3, T, H, W]`: T frames spread evenly over the clip, normalised as ImageNet's. Two passes, so that no more is held."""
    av, (wanted, height, width) = need("av"), sides
    with av.open(str(path)) as held:
        count = sum(1 for _ in held.decode(video=0))
    if not count:
        raise Unreadable("no frames")
    chosen = [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
    kept: dict[int, np.ndarray] = {}
    with av.open(str(path)) as held:
        for i, frame in enumerate(held.decode(video=0)):
            if i in chosen:
                kept[i] = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    x = torch.from_numpy(np.stack([kept[i] for i in chosen])).permute(3, 0, 1, 2) / 255
    mean, std = (torch.tensor(c).view(3, 1, 1, 1) for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (x - mean) / std


def sound(path: Path, sides: Sequence[int]) -> Tensor:
    """`[1, mels, frames]`: log-mels, cut or filled with zeros at the end, then (x + 4.27) / (2 · 4.57)."""
    from scipy.signal import resample_poly

    with need("soundfile").SoundFile(path) as held:
        _small((held.frames, held.channels), path)
        wave, rate = held.read(dtype="float32", always_2d=True).mean(1), held.samplerate
    if rate != RATE:
        ratio = Fraction(RATE, rate)
        wave = resample_poly(wave, ratio.numerator, ratio.denominator)
    x = log_mel(torch.from_numpy(np.ascontiguousarray(wave, np.float32)), sides[0])
    x = F.pad(x[: sides[1]], (0, 0, 0, max(0, sides[1] - len(x)))).T[None]
    return (x - LOUDNESS[0]) / (2 * LOUDNESS[1])


def log_mel(wave: Tensor, mels: int = 128) -> Tensor:
    """`[frames, mels]` of `wave [samples]` at 16 kHz: 25 ms Hann windows every 10 ms, each without its mean and with 0.97 of
    the sample before taken off, power, triangles from 20 Hz to 8 kHz on HTK's mel scale (Kaldi's filterbank, as SSAST).

    Raises `Unreadable` for less than one window.
    """
    if len(wave) < 400:
        raise Unreadable(f"{len(wave)} samples at 16 kHz: less than one window of 400")
    frames = (wave - wave.mean()).unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], 1)
    power = torch.fft.rfft(frames * torch.hann_window(400, periodic=False), 512).abs().square()
    mel = lambda f: 1127 * torch.log1p(torch.as_tensor(f, dtype=torch.float32) / 700)
    edges = torch.linspace(float(mel(20.0)), float(mel(8000.0)), mels + 2)
    at = mel(torch.arange(257) * 8000 / 256)[:, None]
    rise, fall = (at - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return (power @ torch.minimum(rise, fall).clamp_min(0)).clamp_min(torch.finfo(torch.float32).eps).log()


def channels(path: Path, sides: Sequence[int]) -> Tensor:
    """`[C, H, W]`, whichever end the channels are (they are fewer than rows and columns): each by its own mean and deviation in
    this picture and clipped at two of them, as SoftCon clips a band; a constant channel is zero."""
    if path.suffix.lower() == ".npy":
        x = np.load(path, allow_pickle=False, mmap_mode="r")
        _small(x.shape, path)
    else:
        logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what is damaged is told once, with its file
        with need("tifffile").TiffFile(path) as held:
            _small(held.series[0].shape, path)
            x = held.asarray()
    x = torch.from_numpy(np.array(x, np.float32))
    x = x[None] if x.ndim == 2 else x
    if x.ndim != 3:
        raise Unreadable(f"{x.ndim} axes: a picture of many channels has three")
    x = x.movedim(2, 0) if x.shape[2] < x.shape[0] else x
    x = F.interpolate(x[None].contiguous(), tuple(sides), mode="bilinear", antialias=True)[0]
    mean, std = x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True)
    return torch.where(std > 1e-6, (x - mean) / std.clamp_min(1e-6), 0.0).clamp(-2, 2)


def _small(shape: Sequence[int], path: Path) -> None:
    if (needed := 8 * int(np.prod(shape, dtype=np.int64))) > MAX_BYTES:
        raise Unreadable(f"{' x '.join(map(str, shape))} values need {ceil(needed / 2**20)} MB: over {MAX_BYTES >> 20}, not read")


READERS: dict[str, Callable[[Path, Sequence[int]], Tensor]] = {
    "volumes": volume, "clips": clip, "sound": sound, "channels": channels,
}  # fmt: skip
LIBRARIES = {"volumes": ("nibabel",), "clips": ("av",), "sound": ("soundfile",), "channels": ("tifffile",)}
