"""`vitreous heads`: tables, files, and one line for what the user can mend."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support import command

import vitreous as vt


def test_tables_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--limit", "12", "--csv", str(tmp_path / "heads.csv"), "--json", str(tmp_path / "heads.json"))
    status, said, error = command(monkeypatch, capsys, "heads", *arguments)
    assert status == 0, error
    for title in ("importance", "mean attention distance", "entropy of attention", "pattern", "Kendall's τ", "heads.csv"):
        assert title in said
    with open(tmp_path / "heads.csv") as file:
        rows = list(csv.DictReader(file))
    stored: list[dict[str, Any]] = json.loads((tmp_path / "heads.json").read_text())
    assert len(rows) == len(stored) == 8 * 4
    model = vt.open()
    far = vt.see.distance(model, vt.data.open_data("sample", model, limit=12))
    for row, kept, expected in zip(rows, stored, far.rows(), strict=True):
        assert float(row["distance"]) == kept["distance"] == pytest.approx(expected["distance"], rel=1e-4)
        assert row["pattern"] == kept["pattern"] and {"loss", "loss_low", "taylor", "entropy", "cluster"} <= set(row)
    status, _, error = command(monkeypatch, capsys, "heads", *arguments)
    assert status == 2 and "exists" in error


def test_parquet_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not there
    status, _, error = command(monkeypatch, capsys, "heads", "--parquet", str(tmp_path / "h.parquet"))
    assert status == 2 and "vitreous[parquet]" in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_vit"], "unknown model"),
        (["--data", "nowhere"], "no data set and no folder"),
        (["--csv", "missing/folder/h.csv"], "there is no folder"),
        (["--limit", "0"], "limit"),
        (["--precision", "f16"], "one of f32, bf16"),
        (["resnet10t", "--limit", "1"], "none in its blocks"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, error = command(monkeypatch, capsys, "heads", *arguments)
    assert status == 2 and message in error.splitlines()[-1] and "Traceback" not in error and out == ""


def test_a_saved_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = vt.open()
    vt.save(vt.slim(model, vt.tokens.EViT(keep=0.5, at=(0,))), tmp_path / "m.safetensors")
    status, said, error = command(monkeypatch, capsys, "heads", str(tmp_path / "m.safetensors"), "--limit", "8")
    assert status == 0 and "one pass a head" in said, error
