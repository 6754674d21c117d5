"""`vitreous see IMAGE MODEL --tree`, and the picture that it draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import command

import vitreous as vt
from vitreous.models.dependencyvit import dependency_tree
from vitreous.see.tree import COLOURS, DARK, coloured, draw_tree, outwards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, and a small DependencyViT over 4 × 4 patches of it, saved."""
    folder = tmp_path_factory.mktemp("tree")
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(folder / "photo.png")
    model = vt.open("dependencyvit_tiny", img_size=64, depth=2, embed_dim=24, num_heads=2, num_classes=5)
    vt.save(model, folder / "m.safetensors")
    return folder


def test_writes_picture_and_tree_side_by_side(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(folder / "photo.png"), str(folder / "m.safetensors"), "--tree")
    status, said, error = command(monkeypatch, capsys, "see", *arguments)
    assert status == 0 and "photo.tree.png" in said, error
    drawn = np.asarray(Image.open(folder / "photo.tree.png"), int)
    height, width, _ = drawn.shape
    assert width == 2 * height + 8 and height >= 300
    plain, tree = drawn[:, :height], drawn[:, -height:]
    assert np.abs(plain - tree).mean() > 10, "one panel is the picture, the other the tree on it"
    status, _, error = command(monkeypatch, capsys, "see", *arguments)
    assert status == 2 and "exists" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tree"], "reversed attention, and VisionTransformer has none: use a dependencyvit"),
        (["m.safetensors", "--tree", "--tokens"], "choose one"),
    ],
    ids=["a model without a tree", "two pictures at once"],
)
def test_refusals(
    options: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    status, out, error = command(monkeypatch, capsys, "see", "photo.png", *options, "--out", "none.png")
    assert status == 2 and message in error and error.splitlines()[-1].startswith("vitreous: ") and out == ""
    assert not (folder / "none.png").exists()


def test_the_tree_is_the_models(folder: Path) -> None:
    model = vt.open(folder / "m.safetensors")
    x = vt.data.open_data("sample").tensor([0]).repeat(1, 3, 1, 1)
    x = x.repeat_interleave(3, -1).repeat_interleave(3, -2)[..., :64, :64]
    parents = dependency_tree(model, x)[0]
    assert (parents == -1).sum() == 1 and len(parents) == 16


class TestDrawing:
    picture = Image.new("RGB", (120, 80), (90, 90, 90))
    #  0 ─ 1 ─ 2      1 is the root, with the branches 0 {0, 3} and 2 {2, 4, 5}
    #  3   4 ─ 5
    parents = np.array([1, -1, 1, 0, 5, 2])

    def test_lines_lead_to_parents_and_nowhere_else(self) -> None:
        drawn = np.asarray(draw_tree(self.picture, self.parents, (2, 3)), int)
        assert drawn.shape == (80, 120, 3)
        between = {(0, 1): (20, 40), (1, 2): (20, 80), (0, 3): (40, 20), (4, 5): (60, 80), (3, 4): (60, 40), (1, 4): (40, 60)}
        for (a, b), (row, column) in between.items():
            connected = self.parents[a] == b or self.parents[b] == a
            middle = drawn[row - 1 : row + 1, column - 1 : column + 1].mean((0, 1))
            assert (self.coloured(middle) > 60) == connected, (a, b)

    @staticmethod
    def coloured(pixel: np.ndarray) -> float:
        return float(pixel.max() - pixel.min())

    def test_branches_tint_their_patches(self) -> None:
        drawn = np.asarray(draw_tree(self.picture, self.parents, (2, 3)), int)
        corner = {i: drawn[i // 3 * 40 + 3, i % 3 * 40 + 3] for i in range(6)}
        assert (corner[2] == corner[4]).all() and (corner[2] == corner[5]).all() and (corner[0] == corner[3]).all()
        assert (corner[0] != corner[2]).any() and self.coloured(corner[1]) == 0, "the root belongs to no branch"
        first, second = (np.array(c) - np.mean(c) for c in COLOURS[:2])
        assert (corner[2] - corner[2].mean()) @ first > 0, "the largest branch has the first colour"
        assert (corner[0] - corner[0].mean()) @ second > 0

    def test_a_branch_that_holds_almost_all_is_divided(self) -> None:
        """Root 0, on which 1 hangs, and on that the rows 2, 3, 4, 5 and 6, 7, 8, 9."""
        parents = np.array([-1, 0, 1, 2, 3, 4, 1, 6, 7, 8])
        order, size = outwards(parents), np.array([10, 9, 4, 3, 2, 1, 4, 3, 2, 1])
        found = coloured(parents, order, size)
        assert found == [*[DARK] * 3, *[COLOURS[0]] * 3, DARK, *[COLOURS[1]] * 3], "what is larger than 3 is divided"

    @pytest.mark.parametrize(
        ("parents", "grid", "message"),
        [
            ([1, -1, 1], (2, 2), "3 parents do not fill a grid of 2 × 2"),
            ([1, 0, 3, -1], (2, 2), "patch 0 go round in a circle"),
            ([-1, -1, 0, 1], (2, 2), "one root .* here are 2"),
            ([1, 2, 3, 0], (2, 2), "one root .* here are 0"),
        ],
    )
    def test_what_is_no_tree_is_refused(self, parents: list[int], grid: tuple[int, int], message: str) -> None:
        with pytest.raises(vt.VitreousError, match=message):
            draw_tree(self.picture, np.array(parents), grid)
