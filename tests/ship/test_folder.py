"""A shipped file answers a folder of pictures, every picture once, whatever interrupts it; and what is written for servers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from support import command
from torch import Tensor, nn

from vitreous.data.transform import preparation
from vitreous.errors import VitreousError
from vitreous.ship import Runtime, folder, ship
from vitreous.ship.folder import answer_folder
from vitreous.ship.repository import ship_repository

Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture[str]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 3)
        self.num_classes = 3
        told = {"input_size": (1, 8, 8), "mean": (0.4,), "std": (0.3,), "crop_pct": 0.8, "interpolation": "bilinear"}
        self.pretrained_cfg = {**told, "label_names": ["cat", "dog", "owl"]}

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model for any batch, for a fixed one, and with its preparation."""
    home = tmp_path_factory.mktemp("shipped")
    return {
        "any": ship(Small(), home / "any.onnx").path,
        "fixed": ship(Small(), home / "fixed.xml", batch=4).path,
        "pictures": ship(Small(), home / "pictures.onnx", with_preprocessing=True).path,
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of two sizes in two folders, one that is cut off, and what is no picture."""
    home = tmp_path_factory.mktemp("photos")
    (home / "more").mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (9 + i % 2, 12, 3), np.uint8)
        Image.fromarray(pixels).save(home / ("more" if i % 3 else ".") / f"{i}.png")
    (home / "4b.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    (home / "notes.txt").write_text("no picture")
    return home


def expected(photos: Path, name: str) -> Tensor:
    model = Small()
    return model(preparation(model).to_tensor(Image.open(photos / name).convert("L"))[None])[0].detach()


@pytest.mark.parametrize("kind", ["any", "fixed", "pictures"])
def test_every_picture_is_answered(files: dict[str, Path], photos: Path, tmp_path: Path, kind: str) -> None:
    made = answer_folder(Runtime(files[kind], threads=1), photos, tmp_path / "a.parquet", batch=4)
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [r["path"] for r in rows] == folder.pictures_in(photos) and made.pictures == len(rows) == 11
    assert [name for name, _ in made.skipped] == ["4b.jpg"] and not (tmp_path / "a.parquet.parts").exists()
    for row in rows:
        if row["path"] == "4b.jpg":
            assert row["error"] and row["answer"] is None and row["logits"] is None
            continue
        logits = expected(photos, row["path"])
        torch.testing.assert_close(torch.tensor(row["logits"]), logits, atol=2e-2 if kind == "pictures" else 1e-4, rtol=0)
        assert row["name"] == ["cat", "dog", "owl"][row["answer"]] and row["error"] is None
        assert row["confidence"] == pytest.approx(torch.tensor(row["logits"]).softmax(0).max().item())


def test_a_run_that_was_cut_off_goes_on(files: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(folder, "PART", 3)
    out, runtime, calls = tmp_path / "a.parquet", Runtime(files["any"], threads=1), []
    honest = Runtime.__call__

    def dies(self: Runtime, x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(self, x)

    monkeypatch.setattr(Runtime, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        answer_folder(runtime, photos, out)
    assert not out.exists() and sum(calls[:2]) == 5  # of six files the broken one takes no call
    with pytest.raises(VitreousError, match="another --out"):
        answer_folder(runtime, photos, out, shard=(1, 2))
    calls[:] = [0, 0, 0]
    made = answer_folder(runtime, photos, out)
    assert made.resumed == 6 and sum(calls) == 5
    monkeypatch.setattr(Runtime, "__call__", honest)
    answer_folder(runtime, photos, tmp_path / "b.parquet")
    assert parquet.read_table(out).equals(parquet.read_table(tmp_path / "b.parquet"))


def test_shards_are_the_whole(files: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    paths = []
    for i in (1, 2, 3):
        told = ["run", str(files["any"]), "--data", str(photos), "--out", str(tmp_path / "a.parquet"), "--shard", f"{i}/3"]
        status, out, error = command(monkeypatch, capsys, *told, "--threads", "1")
        assert status == 0 and "pictures answered" in out and ("skipped 4b.jpg: " in error) == (", 1 skipped" in out)
        paths += parquet.read_table(tmp_path / f"a-{i:05d}-of-00003.parquet")["path"].to_pylist()
    assert sorted(paths) == folder.pictures_in(photos)
    for wrong in ("4/3", "0/3", "x"):
        assert command(monkeypatch, capsys, *told[:-1], wrong)[0] == 2
    status, _, error = command(monkeypatch, capsys, *told)
    assert status == 2 and "exists" in error


def test_a_repository_for_triton_and_openvino(tmp_path: Path) -> None:
    made = ship_repository(Small(), tmp_path / "models", "small")
    home = tmp_path / "models" / "small"
    assert sorted(p.name for p in home.iterdir()) == ["1", "config.pbtxt", "labels.txt", "preprocess.json"]
    assert made.path == home / "1" / "model.onnx" and Runtime(made.path).outputs == ("logits",)
    assert (home / "config.pbtxt").read_text() == (
        'name: "small"\nbackend: "onnxruntime"\nmax_batch_size: 64\n'
        'input [ { name: "images", data_type: TYPE_FP32, dims: [ 1, 8, 8 ] } ]\n'
        'output [ { name: "logits", data_type: TYPE_FP32, dims: [ 3 ], label_filename: "labels.txt" } ]\n'
        "dynamic_batching { }\n"
    )
    assert (home / "labels.txt").read_text() == "cat\ndog\nowl\n"
    ship_repository(Small(), tmp_path / "models", "fixed", ending=".xml", batch=2, with_preprocessing=True)
    config = (tmp_path / "models" / "fixed" / "config.pbtxt").read_text()
    assert 'backend: "openvino"\nmax_batch_size: 0' in config and "TYPE_UINT8, dims: [ 2, -1, -1, 1 ]" in config
    listed = json.loads((tmp_path / "models" / "config.json").read_text())["model_config_list"]
    assert [e["config"]["name"] for e in listed] == ["small", "fixed"]
    assert listed[0]["config"]["plugin_config"] == {"INFERENCE_PRECISION_HINT": "f32"}
    for name, message in (("small", "exists"), ("../up", "no name")):
        with pytest.raises(VitreousError, match=message):
            ship_repository(Small(), tmp_path / "models", name)


def test_the_command_writes_the_file_and_its_preparation(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    told = ["vit_tiny_patch16_224", "--img-size", "32", "--num-classes", "2", "--model-arg", "depth=1", "--classes", "owl,fox"]
    out = ["--out", str(tmp_path / "served" / "m.xml"), "--threads", "1"]
    status, said, _ = command(monkeypatch, capsys, "ship", *told, *out, "--batch", "1")
    assert status == 0 and "openvino fp32" in said
    assert sorted(p.name for p in (tmp_path / "served").iterdir()) == ["labels.txt", "m.bin", "m.xml", "preprocess.json"]
    card = Runtime(tmp_path / "served" / "m.xml").card
    assert card["preprocess"] == json.loads((tmp_path / "served" / "preprocess.json").read_text())
    assert card["classes"] == ["owl", "fox"] and card["model"]["name"] == "vit_tiny_patch16_224"
    status, _, error = command(monkeypatch, capsys, "ship", *told, *out)
    assert status == 2 and "exists" in error
    status, _, error = command(monkeypatch, capsys, "ship", *told)
    assert status == 2 and "--repository" in error
    for wrong in ("", ".", str(tmp_path / "new" / "m.tflite")):
        status, _, error = command(monkeypatch, capsys, "ship", *told, "--out", wrong)
        assert status == 2 and "cannot tell a format" in error and not (tmp_path / "new").exists()
    status, _, error = command(monkeypatch, capsys, "run", out[1], "--data", str(tmp_path), "--shard", "1/2", "--out", "")
    assert status == 2 and "only a file is ever replaced" in error
    before = (tmp_path / "served" / "m.bin").read_bytes()
    onto = ["--data", str(tmp_path), "--overwrite", "--out", str(tmp_path / "served" / "m.bin")]
    status, _, error = command(monkeypatch, capsys, "run", out[1], *onto)
    assert status == 2 and "which gives them" in error and (tmp_path / "served" / "m.bin").read_bytes() == before


def test_a_picture_may_have_several_classes(
    files: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    out = ["--data", str(photos), "--out", str(tmp_path / "a.parquet"), "--multi-label"]
    assert command(monkeypatch, capsys, "run", str(files["any"]), *out)[0] == 0
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert rows[0]["error"] is None
    for row in [r for r in rows if r["error"] is None]:
        p = torch.tensor(row["logits"]).sigmoid()
        assert row["answer"] == [k for k in range(3) if p[k] > 0.5]
        assert row["name"] == [["cat", "dog", "owl"][k] for k in row["answer"]]
        assert row["confidence"] == pytest.approx([float(p[k]) for k in row["answer"]])
    assert {len(r["answer"]) for r in rows if r["error"] is None} != {1}
