"""Labels: matched with the model's classes by name, read from tables, and done without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitreous import VitreousError
from vitreous.data import calibration, open_data


def model(*names: str, logits: int | None = None) -> Any:
    cfg: dict[str, Any] = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return SimpleNamespace(pretrained_cfg=cfg | {"label_names": names} if names else cfg, num_classes=logits or len(names))


def shade(path: Path) -> int:
    """A picture whose brightness says which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = 20 * len(list(path.parent.parent.rglob("*.png"))) + 10
    Image.new("RGB", (8, 8), (value,) * 3).save(path)
    return value


def labels(data: Any) -> dict[int, Any]:
    """Brightness to label."""
    return {int(np.asarray(data.picture(i))[0, 0, 0]): np.asarray(data.labels[i]).tolist() for i in range(len(data))}


def test_folders_are_matched_by_name_whatever_their_order(tmp_path: Path) -> None:
    seen = {name: shade(tmp_path / name / "1.png") for name in ("Ankle_boot", "bag", "coat")}
    found = open_data(tmp_path, model("coat", "ankle boot", "dress", "bag"))
    assert labels(found) == {seen["coat"]: 0, seen["Ankle_boot"]: 1, seen["bag"]: 3}
    assert found.classes == ("coat", "ankle boot", "dress", "bag") and "3 of the model's 4" in found.note
    with pytest.raises(VitreousError, match=r"class 'bag' of .* is none of the model's \(coat, ankle boot, hat\).*--classes"):
        open_data(tmp_path, model("coat", "ankle boot", "hat"))
    left = open_data(tmp_path, model("coat", "ankle boot", "hat"), labelled=False)
    assert left.labels is None and len(left) == 3 and "labels are left out" in left.note
    assert [y for _, y in left.batches(2)] == [None, None]


def test_folders_called_by_numbers_mean_outputs(tmp_path: Path) -> None:
    seen = {name: shade(tmp_path / name / "1.png") for name in ("10", "2")}
    found = open_data(tmp_path, model(*"abcdefghijk"))
    assert labels(found) == {seen["10"]: 10, seen["2"]: 2}


def test_named_sets_too(tmp_path: Path) -> None:
    names = ("ankle boot", "bag", "coat", "dress", "pullover", "sandal", "shirt", "sneaker", "t-shirt", "trouser")
    plain, found = open_data("sample", model(logits=10), limit=20), open_data("sample", model(*names), limit=20)
    assert [plain.classes[i] for i in plain.labels] == [names[i] for i in found.labels]  # type: ignore[union-attr]


TABLES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "csv": ("file_name,label,split\n{0},cat,test\n{1},dog,test\n{2},dog,train\n", lambda p: p / "t.csv"),
    "tsv": ("path\tclass\n{0}\tcat\n{1}\tdog\n", lambda p: p / "t.tsv"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_paths_and_labels(kind: str, tmp_path: Path) -> None:
    seen = [shade(tmp_path / "in" / f"{i}.png") for i in range(3)]
    text, file = TABLES[kind]
    file(tmp_path).write_text(text.format(*(f"in/{i}.png" for i in range(3))))
    found = open_data(file(tmp_path), model("dog", "cat"))
    assert labels(found) == {seen[0]: 1, seen[1]: 0} and found.classes == ("dog", "cat")
    if kind == "csv":
        assert calibration(file(tmp_path), model("dog", "cat"), 1).mean() == pytest.approx((seen[2] / 255 - 0.5) / 0.5, abs=1e-3)


def test_a_parquet_table_with_numbers(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    seen = [shade(tmp_path / "in" / f"{i}.png") for i in range(3)]
    pq.write_table(pa.table({"image": [f"in/{i}.png" for i in range(3)], "label": [10, 2, 10]}), tmp_path / "t.parquet")
    found = open_data(tmp_path / "t.parquet", model(*"abcdefghijk"))
    assert labels(found) == {seen[0]: 10, seen[1]: 2, seen[2]: 10}


def test_several_classes_a_picture(tmp_path: Path) -> None:
    seen = [shade(tmp_path / "in" / f"{i}.png") for i in range(2)]
    (tmp_path / "t.csv").write_text("path,cat,dog,owl\nin/0.png,1,0,1\nin/1.png,0,1,0\n")
    found = open_data(tmp_path / "t.csv", model("owl", "dog", "elk", "cat"))
    assert labels(found) == {seen[0]: [1, 0, 0, 1], seen[1]: [0, 1, 0, 0]}
    [(x, y)] = found.batches(4)
    assert y is not None and x.shape == (2, 3, 8, 8) and y.shape == (2, 4)
    assert open_data(tmp_path / "t.csv", model("owl", "dog", "cat"), labelled=False).labels is None


def test_pictures_without_labels(tmp_path: Path) -> None:
    shade(tmp_path / "in" / "1.png")
    found = open_data(tmp_path / "in", model("a", "b"), labelled=False)
    assert found.labels is None and len(found) == 1 and found.tensor([0]).shape == (1, 3, 8, 8)
    (tmp_path / "t.csv").write_text("path\nin/1.png\n")
    assert open_data(tmp_path / "t.csv", model("a", "b"), labelled=False).labels is None
    with pytest.raises(VitreousError, match="no column of labels"):
        open_data(tmp_path / "t.csv", model("a", "b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na.png,cat\n", "no column of picture files"),
        ("path,label\n", "no rows"),
        ("path,label\na.png\n", "fewer cells"),
        ("path,label\na.png,cat,dog\n", "more cells"),
        ("path,label\na.png,\n", "row 1 .* no label"),
        ("path,label\n,cat\n", "row 1 .* names no picture"),
        ("path,label\nabsent.png,cat\nabsent2.png,dog\n", "no such file"),
        ('path,label\n"a.png,cat\n', "cannot read the table"),
    ],
)
def test_tables_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(VitreousError, match=message):
        open_data(tmp_path / "t.csv", model("cat", "dog"))
    (tmp_path / "t.parquet").write_bytes(b"PAR1no table")
    with pytest.raises(VitreousError, match="cannot read the table"):
        open_data(tmp_path / "t.parquet", model("cat", "dog"))
