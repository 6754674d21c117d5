"""`vitreous see --method` with every explanation, and `vitreous faithful`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import command

import vitreous as vt
from vitreous.data.transform import preparation
from vitreous.see import methods


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(vt.data.fashion.sample_arrays("test")[0][0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_methods_and_classes(photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = {}
    three, deep, early = ["--target", "3"], ["--layer", "blocks.7.norm1"], ["--layer", "blocks.1.norm1"]
    asked = (("layer_cam", []), ("lrp", three), ("layer_cam", three), ("layer_cam", deep), ("layer_cam", early))
    for i, (method, options) in enumerate(asked):
        file = photo.with_name(f"{method}{i}.png")
        status, said, error = command(monkeypatch, capsys, "see", str(photo), "--method", method, *options, "--out", str(file))
        assert status == 0 and f"{method} written to {file}" in said, error
        drawn[file.name] = np.asarray(Image.open(file), int)
    assert np.abs(drawn["layer_cam0.png"] - drawn["layer_cam2.png"]).max() > 10, "another class, another map"
    assert np.abs(drawn["layer_cam3.png"] - drawn["layer_cam4.png"]).max() > 10, "another layer, another map"
    refused = (
        (["--method", "layercam"], "layer_cam"),
        (["--method", "lrp", "--target", "10"], "no target 10"),
        (["--target", "3"], "whatever the class"),
        (["--layer", "blocks.7"], "no layer of your choice"),
        (["--method", "grad_cam", "--layer", "blocks.99"], "blocks.99"),
    )
    for options, match in refused:
        status, _, error = command(monkeypatch, capsys, "see", str(photo), *options, "--out", str(photo.with_name("no.png")))
        assert status == 2 and match in error.splitlines()[-1] and "Traceback" not in error
    assert not photo.with_name("no.png").exists()


def test_a_picture_may_have_several_classes(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vt.open()
    with torch.no_grad():
        prepared = preparation(model)
        logits = model(prepared.to_tensor(Image.open(photo).convert(prepared.mode))[None])[0]
    _, one, _ = command(monkeypatch, capsys, "see", str(photo), "--method", "attention")
    _, several, _ = command(monkeypatch, capsys, "see", str(photo), "--method", "attention", "--multi-label", "--overwrite")
    assert [line.count("probability") for line in (one, several)] == [1, max(1, int((logits > 0).sum()))]
    assert f"{float(logits.sigmoid().max()):.3f}" in several and "(class" in several
    _, said, error = command(
        monkeypatch, capsys, "faithful", "--limit", "2", "--methods", "attention", "--multi-label", "--json", "-"
    )
    assert "sigmoid" in json.loads(said)["score"], error


def test_a_failed_sanity_check_is_said(photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"model": "m", "correlation": 0.9, "bound": 0.5, "passes": False, "images": 4, "date": "2026-01-02"}
    monkeypatch.setattr(methods, "sanity", lambda: {"rollout": {"m": found}})
    _, _, error = command(monkeypatch, capsys, "see", str(photo), "--method", "rollout")
    assert "caution: rollout fails the sanity check" in error
    _, _, error = command(monkeypatch, capsys, "see", str(photo), "--method", "attention")
    assert "caution" not in error


def test_faithful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.json"
    arguments = ("faithful", "--limit", "4", "--methods", "attention, grad_cam", "--json", str(file))
    status, said, error = command(monkeypatch, capsys, *arguments)
    assert status == 0 and "attention" in said and "grad_cam" in said and "insertion" in said, error
    read = json.loads(file.read_text())
    assert [r["name"] for r in read["rows"]] == ["attention", "grad_cam"] and read["images"] == 4
    assert len(read["rows"][0]["sanity"]) == 5
    status, _, error = command(monkeypatch, capsys, *arguments)
    assert status == 2 and "exists" in error and error.count("\n") == 1
    status, _, error = command(monkeypatch, capsys, "faithful", "--methods", "atention")
    assert status == 2 and "did you mean attention" in error
    status, _, error = command(monkeypatch, capsys, "faithful", "--data", str(tmp_path / "none"))
    assert status == 2 and "does not exist" in error and "Traceback" not in error
