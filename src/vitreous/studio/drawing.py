"""What the image view draws: heatmaps as SVG over a picture, and all heads on one sheet."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..prove.drawing import colours, data_uri, enlarge

GAP = 2  # pixels between the maps of a sheet
SIDE = 14  # pixels a side that a map of the sheet has at least


def patch_at(x: float, y: float, size: tuple[int, int], grid: tuple[int, int]) -> int:
    """The patch under a point of a picture `size` (width, height), row by row."""
    column = min(max(int(x / size[0] * grid[1]), 0), grid[1] - 1)
    row = min(max(int(y / size[1] * grid[0]), 0), grid[0] - 1)
    return row * grid[1] + column


def heat(
    values: np.ndarray, size: tuple[int, int], patch: int | None = None, strength: float = 1.0, top: float | None = None
) -> str:
    """`values` `[h, w]` as SVG to lie over a picture `size`: the darker, the less, `top` (their greatest) the brightest; the
    asked `patch` is outlined."""
    h, w = values.shape
    level = np.clip(values / max(float(values.max()) if top is None else top, 1e-12), 0, 1)
    rgba = np.dstack([colours()[(level * 255).astype(int)], 255 * strength * (0.45 + 0.4 * level)]).astype(np.uint8)
    width, height = size
    parts = [
        f'<image href="{data_uri(Image.fromarray(rgba))}" width="{width}" height="{height}" preserveAspectRatio="none" '
        'style="image-rendering: pixelated"/>'
    ]
    if patch is not None:
        x, y = patch % w * width / w, patch // w * height / h
        parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{width / w:.2f}" height="{height / h:.2f}" fill="none" '
            'stroke="#22d3ee" stroke-width="3" vector-effect="non-scaling-stroke"/>'
        )
    return "".join(parts)


def whole_svg(picture: Image.Image, content: str) -> str:
    """A picture and what lies over it as one SVG file."""
    base = enlarge(picture)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {base.width} {base.height}" width="{base.width}" '
        f'height="{base.height}"><image href="{data_uri(base)}" width="{base.width}" height="{base.height}" '
        f'style="image-rendering: pixelated"/>{content}</svg>'
    )


class Sheet:
    """Every head's map on one picture: a column for each layer, a row for each head, each map scaled to its own maximum."""

    def __init__(self, maps: list[np.ndarray | None]) -> None:
        """`maps`: for each layer `[heads, h, w]`, or None where it does not attend over the whole grid."""
        h, w = next(m.shape[1:] for m in maps if m is not None)
        k = max(1, -(-SIDE // max(h, w)))
        self.cell = (w * k + GAP, h * k + GAP)
        self.heads = [0 if m is None else len(m) for m in maps]
        canvas = np.zeros((max(self.heads) * self.cell[1] + GAP, len(maps) * self.cell[0] + GAP, 4), np.uint8)
        for layer, of_layer in enumerate(maps):
            for head, one in enumerate(of_layer if of_layer is not None else ()):
                level = np.clip(one / max(float(one.max()), 1e-12), 0, 1)
                x, y = layer * self.cell[0] + GAP, head * self.cell[1] + GAP
                canvas[y : y + h * k, x : x + w * k, :3] = colours()[(level * 255).astype(int)].repeat(k, 0).repeat(k, 1)
                canvas[y : y + h * k, x : x + w * k, 3] = 255
        self.image = Image.fromarray(canvas)

    def at(self, x: float, y: float) -> tuple[int, int] | None:
        """The layer and head under a point, None beside them."""
        layer, head = int(x // self.cell[0]), int(y // self.cell[1])
        return (layer, head) if 0 <= layer < len(self.heads) and 0 <= head < self.heads[layer] else None

    def mark(self, layer: int, head: int | None) -> str:
        """An outline around one head, or around all of a layer."""
        w, h = self.cell
        y, height = (0, h * self.heads[layer]) if head is None else (head * h, h)
        return (
            f'<rect x="{layer * w + GAP / 2}" y="{y + GAP / 2}" width="{w}" height="{height}" fill="none" '
            'stroke="#22d3ee" stroke-width="3" vector-effect="non-scaling-stroke"/>'
        )
