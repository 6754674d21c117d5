"""Options that every command takes alike, and what commands say of themselves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import command, small_vit
from typer.main import get_command

import vitreous as vt
from vitreous.cli import app
from vitreous.cli.options import DataOptions, ModelOptions
from vitreous.store.expects import read_classes

Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture[str]
OPENING = {"slim", "prove", "see", "heads", "faithful", "anatomy", "studio", "train"}
WITHOUT_DATA = {"see", "anatomy"}


def test_every_command_opens_models_and_data_alike() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    asked = {name: {option for p in c.params for option in p.opts} for name, c in commands.items()}
    spelt = lambda kind: {"--" + f.name.replace("_", "-") for f in dataclasses.fields(kind)}
    for name in OPENING:
        assert spelt(ModelOptions) <= asked[name], name
        assert name in WITHOUT_DATA or spelt(DataOptions) <= asked[name], name


def test_what_a_model_is_opened_with(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    (tmp_path / "names.txt").write_text("owl\nfox\nelk\n")
    told = ["--model-arg", "depth=2", "--model-arg", "global_pool=avg", "--num-classes", "3", "--img-size", "32"]
    told += ["--classes", str(tmp_path / "names.txt"), "--mean", "0.5", "--std", "0.2,0.3,0.4", "--crop-pct", "0.8"]
    status, out, error = command(
        monkeypatch, capsys, "anatomy", "vit_tiny_patch16_224", *told, "--interpolation", "lanczos", "--json"
    )
    assert status == 0, error
    found = json.loads(out)
    assert len(found["blocks"]) == 2 and found["pool"] == "avg" and found["grid"] == [2, 2]
    assert "lanczos to 32 x 32, the middle 80 %" in error and "mean 0.5, std 0.2 0.3 0.4" in error
    assert "3 classes: owl, fox, elk" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-arg", "depth"], "depth=4"),
        (["--model-arg", "dept=2"], "dept"),
        (["--mean", "grey"], "numbers with commas"),
        (["--mean", "124"], "divide by 255"),
        (["--mean", "0.1,0.2,0.3,0.4"], "each of the image's 1 channels"),
        (["--std", "0"], "above 0"),
        (["--crop-pct", "1.5"], "at most 1"),
        (["--interpolation", "bilinea"], "did you mean bilinear"),
        (["--classes", "a,b"], "2 class names for a model with 10 logits"),
        (["--classes", "absent.txt"], "no file absent.txt"),
        (["--classes", "a,b,c,d,e,f,g,h,i,a"], "'a' is named twice"),
        (["--device", "cuda:99"], "cannot use the device 'cuda:99'"),
        (["--device", "gpu"], "cannot use the device 'gpu'"),
    ],
)
def test_values_that_cannot_be(arguments: list[str], message: str, monkeypatch: Patch, capsys: Capture) -> None:
    status, out, error = command(monkeypatch, capsys, "anatomy", *arguments)
    assert status == 2 and message in error and "Traceback" not in error and out == ""


def test_what_was_told_is_saved_and_comes_back(tmp_path: Path) -> None:
    model = vt.open(small_vit(), classes="g,f,e,d,c,b,a", mean=(0.1, 0.2, 0.3), std=0.25, crop_pct=0.9, interpolation="lanczos")
    model = vt.slim(model, vt.tokens.EViT(keep=0.5, at=(1,)))
    vt.save(model, tmp_path / "m.safetensors")
    again = vt.load(tmp_path / "m.safetensors", base=small_vit())
    assert again.pretrained_cfg["label_names"] == tuple("gfedcba") and again.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert again.pretrained_cfg["std"] == (0.25,) * 3 and again.pretrained_cfg["crop_pct"] == 0.9
    assert again.pretrained_cfg["interpolation"] == "lanczos"
    vt.save(vt.open(), tmp_path / "b.safetensors")
    assert vt.load(tmp_path / "b.safetensors").pretrained_cfg["label_names"][8] == "bag"


def test_a_model_goes_where_it_is_asked(monkeypatch: Patch) -> None:
    there: list[object] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: there.append(device) or self)
    vt.open(small_vit(), device="cuda:1")
    vt.open(small_vit())
    assert there == ["cuda:1"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.txt", "owl\nfox\n\n"),
        ("list.json", '["owl", "fox"]'),
        ("index.json", '{"fox": 1, "owl": 0}'),
        ("label.json", '{"1": "fox", "0": "owl"}'),
    ],
)
def test_class_names_in_files(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_classes(tmp_path / name) == ("owl", "fox")


@pytest.mark.parametrize("text", ['{"owl": 0, "fox": 2}', '{"owl": "fox"}', '"owl"', "{", "[]"])
def test_class_names_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(vt.VitreousError, match="class name"):
        read_classes(tmp_path / "names.json")


def test_steps_are_listed_with_their_parameters(monkeypatch: Patch, capsys: Capture) -> None:
    status, out, _ = command(monkeypatch, capsys, "steps", "--json")
    rows = {r["step"]: SimpleNamespace(**r) for r in json.loads(out)}
    assert status == 0 and set(rows) == set(vt.steps.REGISTRY)
    evit = {p["name"]: p for p in rows["tokens.EViT"].parameters}
    assert evit["keep"] == {"name": "keep", "type": "float", "default": 0.7}
    assert rows["quant.RepQ"].needs_calibration and rows["quant.RepQ"].family == "quant"
    status, out, _ = command(monkeypatch, capsys, "steps", "prune")
    assert status == 0 and "prune.Heads" in out and "tokens." not in out
    status, _, error = command(monkeypatch, capsys, "steps", "prun")
    assert status == 2 and "did you mean prune" in error


def test_version_and_completion(monkeypatch: Patch, capsys: Capture) -> None:
    status, out, error = command(monkeypatch, capsys, "--version")
    assert status == 0 and out.startswith(f"vitreous {vt.__version__}: torch {torch.__version__.split('+')[0]}"), error
    asked = {"_VITREOUS_COMPLETE": "complete_bash", "COMP_WORDS": "vitreous heads --num", "COMP_CWORD": "2"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert "--num-classes" in command(monkeypatch, capsys)[1]


def test_how_one_model_is_built_is_not_asked_of_files_beside_it() -> None:
    given = ModelOptions(checkpoint=Path("w.pth"), num_classes=0, img_size=64, model_arg=["depth=2"], mean="0.5", threads=2)
    assert given.beside("vit_tiny_patch16_224.augreg_in21k") == dataclasses.replace(given, checkpoint=None)
    for file in ("small.safetensors", "model.onnx"):
        assert given.beside(file) == ModelOptions(mean="0.5", threads=2)
