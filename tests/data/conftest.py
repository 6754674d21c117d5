"""Small folders of real picture files, made anew for each test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Maker = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Maker:
    """`folder("cat/a.png", "dog/x/b.png", ...)` writes a differently coloured 20×16 picture at each path."""
    made = 0

    def make(*names: str, root: Path = tmp_path / "set") -> Path:
        nonlocal made
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            made += 1
            pixels = np.random.default_rng(made).integers(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        return root

    return make
