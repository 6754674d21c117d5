"""Pictures of the report: heatmaps laid over an image, and the tokens that survived."""

from __future__ import annotations

import base64
import colorsys
import io
from functools import cache

import numpy as np
from PIL import Image

SIDE = 224
"""Pixels of the longer side of every drawn picture, about: tiny ones grow by a whole factor."""

DARK = 0.25  # brightness of a dropped patch
BORDER = (92, 195, 204)  # between what is kept and what is dropped


@cache
def colours() -> np.ndarray:
    """From dark to bright, `[256, 3]`, 0 to 255."""
    from plotly.colors import sample_colorscale, sequential, unlabel_rgb

    shades = sample_colorscale(sequential.Inferno, np.linspace(0, 1, 256).tolist(), colortype="rgb")
    return np.array([unlabel_rgb(c) for c in shades])


def enlarge(image: Image.Image) -> Image.Image:
    """`image` as RGB near `SIDE`: a small one by nearest neighbour, so that its pixels stay what they are."""
    image = image.convert("RGB")
    longer = max(image.size)
    if longer <= SIDE // 2:
        k = max(1, SIDE // longer)
        return image.resize((image.width * k, image.height * k), Image.Resampling.NEAREST)
    k = SIDE / longer
    size = (max(1, round(image.width * k)), max(1, round(image.height * k)))
    return image.resize(size, Image.Resampling.LANCZOS)


def overlay(image: Image.Image, shares: np.ndarray, scale: tuple[float, float]) -> Image.Image:
    """Heatmap `shares` `[h, w]` over `image`, in its patch grid; `scale`: the values of darkest and brightest."""
    base = enlarge(image)
    low, high = scale
    level = np.clip((shares - low) / max(high - low, 1e-12), 0, 1)
    level = np.asarray(Image.fromarray(level.astype(np.float32)).resize(base.size, Image.Resampling.NEAREST))
    grey = np.asarray(base.convert("L"), float)[..., None]
    weight = 0.55 + 0.35 * level[..., None]  # the brighter the patch, the less of the picture
    mixed = (1 - weight) * grey + weight * colours()[(level * 255).astype(int)]
    return Image.fromarray(mixed.astype(np.uint8))


def survival(image: Image.Image, groups: np.ndarray) -> Image.Image:
    """The tokens that are left of `image`, as RGB.

    `groups` `[h, w]` holds -1 where the patch was dropped or fused away: it is grey and dark, darker than any that is left, and
    a line marks the border, which shows even in black pictures. Patches with the same number ≥ 0 are one token: they take
    their mean colour and share the colour of their outline.
    """
    base = np.asarray(enlarge(image), float)
    height, width = base.shape[:2]
    row = np.arange(height) * groups.shape[0] // height
    column = np.arange(width) * groups.shape[1] // width
    ids = groups[row][:, column]
    drawn = base.copy()
    dropped = ids < 0
    drawn[dropped] = DARK * base[dropped].mean(1, keepdims=True)
    numbers, counts = np.unique(groups[groups >= 0], return_counts=True)
    for i, group in enumerate(numbers[counts > 1]):
        inside = ids == group
        drawn[inside] = 0.3 * drawn[inside] + 0.7 * base[inside].mean(0)
        hue = i * 0.618034 % 1  # golden ratio: neighbours in number get hues far apart
        drawn[inside & ~_shrunk(_shrunk(inside))] = np.array(colorsys.hsv_to_rgb(hue, 0.75, 1.0)) * 255
    drawn[~dropped & ~_shrunk(~dropped, outside=True)] = BORDER
    return Image.fromarray(drawn.astype(np.uint8))


def answered(image: Image.Image, hidden: np.ndarray, pixels: np.ndarray) -> tuple[Image.Image, Image.Image]:
    """`image` with the pixels that are `hidden` `[H, W]` greyed, and with `pixels` `[H, W, 3]` in their place."""
    seen, cover = np.asarray(image.convert("RGB")), hidden[..., None]
    masked, made = np.where(cover, np.uint8(128), seen), np.where(cover, pixels, seen)
    return Image.fromarray(masked.astype(np.uint8)), Image.fromarray(made.astype(np.uint8))


def tokens_left(groups: np.ndarray) -> int:
    """How many tokens the patches of `groups` `[h, w]` still make."""
    return len(np.unique(groups[groups >= 0]))


def colour_bar() -> Image.Image:
    """The colours of `overlay`, from the least to the most."""
    return Image.fromarray(colours().astype(np.uint8)[None].repeat(12, 0))


def data_uri(image: Image.Image, level: int = 9) -> str:
    """`image` as a PNG inside a `data:` address; `level` of compression from 1, quick, to 9, small."""
    held = io.BytesIO()
    image.save(held, "PNG", compress_level=level)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def _shrunk(mask: np.ndarray, outside: bool = False) -> np.ndarray:
    """`mask` `[H, W]` less its outermost pixel; `outside`: whether it goes on beyond the edge."""
    padded = np.pad(mask, 1, constant_values=outside)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:] & mask
