"""`vitreous prove`: models and shipped files side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import command

import vitreous as vt
from vitreous.ship import ship_all

QUICK = ("--limit", "40", "--seconds", "0.1", "--batches", "1,4")


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    model = vt.slim(vt.open(), vt.tokens.EViT(keep=0.5, at=(0,)))
    vt.save(model, tmp_path / "small.safetensors")
    ship_all(model, [tmp_path / "small[red].onnx"], example=vt.data.open_data("sample", limit=4).tensor(range(4)))
    return tmp_path


def test_models_and_files(shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(shipped / name) for name in ("small.safetensors", "small[red].onnx")]
    out = ("--json", str(shipped / "p.json"), "--report", str(shipped / "r.html"))
    status, said, error = command(monkeypatch, capsys, "prove", "vit_fashion", *files, *QUICK, *out)
    assert status == 0, error
    assert "vit_fashion" in said and "small[red].onnx" in said.replace("\n", ""), "brackets are no markup"
    proof = json.loads((shipped / "p.json").read_text())
    assert [m["name"] for m in proof["models"]] == ["vit_fashion", "small.safetensors", "small[red].onnx"]
    assert proof["models"][1]["answers"]["agreement"] == proof["models"][2]["answers"]["agreement"]
    assert proof["models"][2]["kind"].startswith("ONNX Runtime") and proof["images"] == 40
    assert "small[red].onnx" in (shipped / "r.html").read_text("utf-8")
    status, _, error = command(monkeypatch, capsys, "prove", *QUICK, *out)
    assert status == 2 and "exists" in error
    status, said, error = command(monkeypatch, capsys, "prove", files[1], *QUICK, "--json", "-")
    assert status == 0, error
    assert json.loads(said)["models"][0]["answers"]["accuracy"]["value"] > 0.7, "a shipped file prepares its own images"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit_fashion", "absent.onnx"), "absent.onnx"),
        (("vit_fashion", "vit_fashon"), "did you mean"),
        (("--batches", "1,x"), "whole numbers"),
        (("--batches", "0"), "batch sizes"),
        (("--batches", "1", "--seconds", "nan"), "--seconds"),
        (("--json", "p", "--report", "./p"), "a file of its own"),
        (("--batches", "99999999999", "--limit", "8"), "not enough memory"),
        (("--report", "absent/r.html"), "absent"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = command(monkeypatch, capsys, "prove", *arguments, *(() if "--batches" in arguments else QUICK))
    line = error.strip().splitlines()[-1]
    assert status == 2 and line.startswith("vitreous: ") and message in line, error
    assert list(tmp_path.iterdir()) == []
