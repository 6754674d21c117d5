from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from vitreous.data import Data, calibration, open_data
from vitreous.errors import VitreousError

Maker = Callable[..., Path]


class Model(torch.nn.Module):
    """Only what `open_data` looks at."""

    def __init__(self, num_classes: int, side: int = 16) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {"input_size": (3, side, side), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}


def pixels(path: Path) -> bytes:
    """What identifies a 20×16 picture once a transform has cut it to its middle 16×16."""
    return np.asarray(Image.open(path).convert("RGB"))[:, 2:18].tobytes()


def opened(x: torch.Tensor) -> list[bytes]:
    return [(p * 255).round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes() for p in x]


def test_every_picture_gets_the_label_of_its_class_folder(folder: Maker) -> None:
    root = folder("dog/a.png", "cat/b.png", "cat/deep/er/c.png", "emu/d.bmp", "cat/.hidden.png", ".cache/x.png")
    (root / "README.txt").write_text("beside the class folders")
    data = open_data(root, Model(3))
    assert data.classes == ("cat", "dog", "emu") and len(data) == 4 and not data.skipped and not data.note
    expected = {pixels(p): i for i, c in enumerate(data.classes) for p in (root / c).rglob("[a-d].*")}
    assert dict(zip(opened(data.tensor(range(4))), data.labels.tolist(), strict=True)) == expected


def test_order_depends_on_the_seed_alone_and_a_limit_is_its_beginning(folder: Maker) -> None:
    root = folder(*(f"{c}/{i}.png" for c in ("a", "b", "c") for i in range(8)))
    whole = open_data(root, Model(3))
    assert torch.equal(whole.tensor(range(24)), open_data(str(root), Model(3)).tensor(range(24)))
    assert not torch.equal(whole.tensor(range(24)), open_data(root, Model(3), seed=1).tensor(range(24)))
    some = open_data(root, Model(3), limit=9)
    assert len(some) == 9 and torch.equal(some.tensor(range(9)), whole.tensor(range(9)))
    assert len(set(whole.labels[:9].tolist())) == 3  # mixed, not class by class


@pytest.mark.parametrize("part", ["test", "val"])
def test_parts_are_kept_apart(folder: Maker, part: str) -> None:
    root = folder(*(f"{p}/{c}/{i}.png" for p in ("train", part) for c in ("a", "b") for i in range(6)), "train/c/0.png")
    data = open_data(root, Model(3))
    assert data.classes == ("a", "b", "c") and len(data) == 12  # train names the classes too
    assert set(opened(data.tensor(range(12)))) == {pixels(p) for p in (root / part).rglob("*.png")}
    x = calibration(root, Model(3), 13)
    assert set(opened(x)) == {pixels(p) for p in (root / "train").rglob("*.png")}
    with pytest.raises(VitreousError, match="13 images to calibrate on, not 14"):
        calibration(root, Model(3), 14)


def test_a_test_part_without_labels_gives_way_to_val(folder: Maker) -> None:
    root = folder("train/a/0.png", "train/b/0.png", "val/a/1.png", "val/b/1.png", "test/0.png")
    assert set(opened(open_data(root, Model(2)).tensor([0, 1]))) == {pixels(p) for p in (root / "val").rglob("*.png")}


def test_a_class_may_be_called_train(folder: Maker) -> None:
    assert open_data(folder("train/0.png", "car/0.png"), Model(2)).classes == ("car", "train")


def test_calibration_is_even_over_classes_and_repeatable(folder: Maker) -> None:
    root = folder(*(f"train/many/{i}.png" for i in range(30)), *(f"train/few/{i}.png" for i in range(4)), "test/many/x.png")
    x = calibration(root, Model(2), 8, seed=5)
    assert torch.equal(x, calibration(root, Model(2), 8, seed=5))
    assert not torch.equal(x, calibration(root, Model(2), 8, seed=6))
    assert len(set(opened(x)) & {pixels(p) for p in (root / "train/few").iterdir()}) == 4


def test_bad_files_among_good_ones_are_skipped_and_named(folder: Maker) -> None:
    root = folder(*(f"{c}/{i}.{e}" for c in ("a", "b") for i in range(3) for e in ("png", "jpg")))
    whole_jpeg, whole_png = (root / "a/0.jpg").read_bytes(), (root / "a/0.png").read_bytes()
    (root / "a/cut.jpg").write_bytes(whole_jpeg[: len(whole_jpeg) // 2])
    (root / "a/cut.png").write_bytes(whole_png[: len(whole_png) // 2])
    (root / "b/flipped.png").write_bytes(whole_png[:60] + bytes(b ^ 255 for b in whole_png[60:90]) + whole_png[90:])
    (root / "a/empty.jpg").touch()
    (root / "b/notes.txt").write_text("not a picture")
    (root / "b/web.jpg").write_text("<html>404</html>")
    (root / "b/gone.png").symlink_to(root / "nowhere.png")
    (root / "b/self.png").symlink_to(root / "b/self.png")
    os.mkfifo(root / "b/pipe.png")
    data = open_data(root, Model(2))
    assert len(data) == 12
    assert sum(len(y) for _, y in data.batches(5)) == 12
    reasons = {Path(s.path).name: s.reason for s in data.skipped}
    assert {s.path for s in data.skipped} <= {str(p) for p in root.rglob("*")}
    expected = {
        "cut.jpg": "runcated", "cut.png": "runcated", "flipped.png": "cannot be read", "empty.jpg": "empty file",
        "notes.txt": "not a picture", "web.jpg": "not a picture", "gone.png": "broken link", "self.png": "cannot be read",
        "pipe.png": "not a regular file",
    }  # fmt: skip
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        assert reason in reasons[name], (name, reasons[name])
    assert calibration(root, Model(2), 12).shape == (12, 3, 16, 16)


def test_links_in_circles_end(folder: Maker) -> None:
    root = folder("a/0.png", "a/in/1.png", "b/0.png")
    elsewhere = folder("2.png", root=root.parent / "elsewhere")
    (root / "a/in/up").symlink_to(root / "a")
    (root / "b/top").symlink_to(root)
    (root / "b/neighbour").symlink_to(root / "a")
    (root / "b/more").symlink_to(elsewhere)  # an honest link is followed
    data = open_data(root, Model(2))
    assert np.bincount(data.labels).tolist() == [2, 2]
    assert {Path(s.path).name for s in data.skipped} == {"up", "top", "neighbour"}
    assert all("already read" in s.reason for s in data.skipped)


def refused(root: Path, model: Model | None = None, **options: Any) -> str:
    with pytest.raises(VitreousError) as error:
        open_data(root, model or Model(2), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_measured_is_refused(folder: Maker, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "no class folders" in refused(bare)
    assert "no class folders" in refused(folder("1.png", root=tmp_path / "flat"))
    (bare / "a").mkdir()
    (bare / "b").mkdir()
    assert "no images" in refused(bare)
    assert "empty class folder" in (message := refused(folder("c/1.png", root=bare))) and "a, b" in message
    one = folder("only/1.png", "only/2.png", root=tmp_path / "one")
    assert "only the class 'only'" in refused(one)
    assert "train part but no test" in refused(folder("train/a/1.png", root=tmp_path / "part"))
    for c in "ab":
        (tmp_path / "bad" / c).mkdir(parents=True)
        (tmp_path / "bad" / c / "x.jpg").write_text("no")
    assert "no readable image" in (message := refused(tmp_path / "bad")) and "x.jpg (not a picture" in message
    folder("a/good.png", root=tmp_path / "bad")
    assert "only the class 'a'" in (message := refused(tmp_path / "bad")) and "x.jpg" in message
    assert "file" in refused(tmp_path / "one/only/1.png")


def test_a_model_without_classes_and_calibration_need_no_class_folders(folder: Maker) -> None:
    root = folder("1.png", "2.png")
    assert len(open_data(root, Model(0))) == 2
    assert calibration(root, Model(2), 2).shape == (2, 3, 16, 16)


def test_classes_must_fit_the_logits(folder: Maker) -> None:
    root = folder("a/1.png", "b/1.png", "c/1.png")
    assert "3 classes but the model only 2 logits" in refused(root, Model(2))
    assert "3 classes and the model 9 logits" in open_data(root, Model(9)).note
    assert open_data(root, Model(3)).note == "" == open_data(root, Model(0)).note


def test_wordnet_folders_get_imagenets_labels(folder: Maker) -> None:
    root = folder("n01443537/1.png", "n03888257/2.png")
    data = open_data(root, Model(1000))
    assert sorted(data.labels.tolist()) == [1, 701] and data.note == ""
    assert len(data.classes) == 1000 and data.classes[1].startswith("goldfish")
    assert "parachute" in data.classes[701]
    assert ImageNetInfo().label_names()[701] == "n03888257"
    assert open_data(root, Model(2)).classes == ("n01443537", "n03888257")


def test_files_are_opened_only_when_asked_for_and_a_lost_one_is_named(folder: Maker) -> None:
    root = folder("a/1.png", "b/1.png")
    data = open_data(root, Model(2))
    (root / "a/1.png").unlink()
    i = data.labels.tolist().index(0)
    assert data.tensor([1 - i]).shape == (1, 3, 16, 16)
    with pytest.raises(VitreousError, match="no more: no such file"):
        data.tensor([i])


def test_with_a_limit_only_enough_files_are_opened(folder: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    import vitreous.data.folder as module

    root = folder(*(f"{c}/{i}.png" for c in ("a", "b") for i in range(200)))
    tried: list[Path] = []
    monkeypatch.setattr(module, "read_picture", lambda path, probe: tried.append(path))
    steps: list[tuple[int, int]] = []
    assert len(open_data(root, Model(2), limit=10, progress=lambda *at: steps.append(at))) == 10
    assert len(tried) == 256 and steps == [(256, 400)]
    assert len(open_data(root, Model(2), progress=lambda *at: steps.append(at))) == 400
    assert steps[1:] == [(256, 400), (400, 400)]


def test_picture_is_cut_as_the_model_sees_it(folder: Maker) -> None:
    data: Data = open_data(folder("a/1.png", "b/1.png"), Model(2))
    picture = np.asarray(data.picture(0))
    assert picture.shape == (16, 16, 3)
    assert picture.tobytes() == opened(data.tensor([0]))[0]
