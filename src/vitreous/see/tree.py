"""A tree over the patches of a picture, drawn on it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ..errors import VitreousError

# Tol's "bright" scheme (2021), which people who confuse red and green still tell apart.
COLOURS = ((68, 119, 170), (238, 102, 119), (34, 136, 51), (204, 187, 68), (102, 204, 238), (170, 51, 119))
REST, DARK, WHITE = (187, 187, 187), (40, 40, 40), (255, 255, 255)
FINE = 4  # times as large as the result while it is drawn: Pillow's lines have stairs


def draw_tree(picture: Image.Image, parents: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """The tree with `parents` `[N]` (−1 for the root) over the patches of `grid` (rows, columns), at the size of `picture`.

    A line leads from each patch to its parent, thicker the more patches hang on it. A branch that holds more than a quarter of
    the patches is divided into its own branches, so that parts of the picture stand out: the largest have a colour each, which
    also tints their patches, the smaller ones are light grey, and what they hang on is dark. The root is ringed. Patches need
    some 15 pixels each.

    Raises `VitreousError` when `parents` do not fill the grid or are no tree.
    """
    rows, columns = grid
    if rows * columns != len(parents):
        raise VitreousError(f"draw_tree: {len(parents)} parents do not fill a grid of {rows} × {columns} patches")
    order = outwards(parents)
    size = np.ones(len(parents), int)
    for i in reversed(order[1:]):
        size[parents[i]] += size[i]
    colours = coloured(parents, order, size)

    w, h = picture.width * FINE, picture.height * FINE
    patch = min(w / columns, h / rows)
    grey = picture.convert("L").convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
    tint = Image.fromarray(np.array(colours, np.uint8).reshape(rows, columns, 3)).resize((w, h), Image.Resampling.NEAREST)
    canvas = Image.blend(Image.blend(grey, Image.new("RGB", (w, h), "white"), 0.35), tint, 0.3)
    pen = ImageDraw.Draw(canvas)
    at = [((i % columns + 0.5) * w / columns, (i // columns + 0.5) * h / rows) for i in range(len(parents))]
    width = np.maximum(patch * np.minimum(0.04 + 0.012 * size**0.5, 0.14), FINE)
    for casing in (True, False):  # all casings first: no line cuts another one up
        for i in sorted(order[1:], key=lambda i: size[i]):
            wide, fill = (width[i] + patch * 0.06, WHITE) if casing else (width[i], shade(colours[i]))
            pen.line([at[i], at[parents[i]]], fill=fill, width=round(wide))
            dot(pen, at[i], max(wide, patch * (0.22 if casing else 0.16)) / 2, fill)
    for radius, fill in ((0.36, WHITE), (0.31, DARK), (0.2, WHITE), (0.14, DARK)):
        dot(pen, at[order[0]], patch * radius, fill)
    return canvas.resize(picture.size, Image.Resampling.LANCZOS)


def coloured(parents: np.ndarray, order: list[int], size: np.ndarray) -> list[tuple[int, int, int]]:
    """The colour of each node, by the branch that it is in; `size` counts a node and all that hangs on it."""
    children = {i: [j for j in order[1:] if parents[j] == i] for i in order}
    heads = children[order[0]]
    while heads and size[largest := max(heads, key=lambda i: size[i])] > max(len(parents) / 4, 3):
        heads = [i for i in heads if i != largest] + children[largest]
    heads.sort(key=lambda i: (-size[i], i))
    found = {i: COLOURS[k] if k < len(COLOURS) and size[i] > 1 else REST for k, i in enumerate(heads)}
    for i in order:
        if i not in found:
            found[i] = found.get(parents[i], DARK)
    return [found[i] for i in range(len(parents))]


def outwards(parents: np.ndarray) -> list[int]:
    """All nodes, each after its parent, the root first. Raises `VitreousError` when there is not one root, or a circle."""
    roots = np.flatnonzero(parents < 0)
    if len(roots) != 1:
        raise VitreousError(f"draw_tree: a tree has one root (parent −1), and here are {len(roots)}")
    order, children = [int(roots[0])], {p: np.flatnonzero(parents == p).tolist() for p in set(parents.tolist())}
    for node in order:
        order += children.get(node, [])
    if len(order) < len(parents):
        left = min(set(range(len(parents))) - set(order))
        raise VitreousError(f"draw_tree: the parents of patch {left} go round in a circle, which is no tree")
    return order


def shade(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """A little darker, to stand out from its own tint."""
    r, g, b = (round(0.8 * c) for c in colour)
    return r, g, b


def dot(pen: ImageDraw.ImageDraw, at: tuple[float, float], radius: float, fill: tuple[int, int, int]) -> None:
    (x, y), r = at, radius
    pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
