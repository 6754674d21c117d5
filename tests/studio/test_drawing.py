"""What the image view draws, and what lies under a click."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitreous.studio.drawing import GAP, Sheet, heat, patch_at, whole_svg


@pytest.mark.parametrize(("x", "y", "patch"), [(0, 0, 0), (99, 0, 3), (0, 59, 8), (100, 60, 11), (-3, 500, 8), (50, 20, 6)])
def test_the_patch_under_a_point(x: float, y: float, patch: int) -> None:
    assert patch_at(x, y, (100, 60), (3, 4)) == patch


def test_a_sheet_finds_each_head_where_it_drew_it() -> None:
    maps: list[np.ndarray | None] = [np.random.default_rng(i).random((3 - i % 2, 4, 6)) for i in range(3)]
    maps[1] = None
    sheet = Sheet(maps)
    drawn = np.asarray(sheet.image)
    w, h = sheet.cell
    for layer, one in enumerate(maps):
        for head in range(3):
            middle = (layer * w + w / 2 + GAP / 2, head * h + h / 2 + GAP / 2)
            there = one is not None and head < len(one)
            assert sheet.at(*middle) == ((layer, head) if there else None)
            assert (drawn[int(middle[1]), int(middle[0]), 3] == 255) == there
            if there and one is not None:  # the brightest patch is the largest value
                row, column = np.unravel_index(one[head].argmax(), one[head].shape)
                tile = drawn[head * h + GAP : (head + 1) * h, layer * w + GAP : (layer + 1) * w, :3].astype(int).sum(2)
                k = tile.shape[0] // 4
                assert tile[row * k, column * k] == tile.max()
    assert sheet.at(-1, 5) is None and sheet.at(10_000, 5) is None
    assert sheet.mark(2, 1) != sheet.mark(2, None) != sheet.mark(0, None)


def test_heat_outlines_the_asked_patch_and_fits_the_picture() -> None:
    values = np.zeros((2, 4))
    values[1, 2] = 1
    plain, asked = heat(values, (80, 40)), heat(values, (80, 40), patch=6)
    assert "<rect" not in plain and 'x="40.00" y="20.00" width="20.00" height="20.00"' in asked
    whole = whole_svg(Image.new("RGB", (224, 112)), asked)
    assert whole.startswith("<svg") and whole.count("<image") == 2 and 'viewBox="0 0 224 112"' in whole


def test_nothing_attended_is_no_trouble() -> None:
    assert "<image" in heat(np.zeros((2, 2)), (10, 10))
