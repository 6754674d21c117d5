"""`vitreous systems`: what is published beside what is measured."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from support import command

from vitreous.cli.systems import listed, measured
from vitreous.prove.cost import macs


def test_one_system_with_its_variants_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(monkeypatch, capsys, "systems", "van", "--json")
    [row] = json.loads(out)
    assert status == 0 and row["slug"] == "van"
    for figures in row["variants"].values():
        assert figures["measured"]["params"] == pytest.approx(figures["params"], rel=0.02)
        assert figures["measured"]["gmacs"] == pytest.approx(figures["gmacs"], rel=0.05)
    known = {variant: figures["measured"] for variant, figures in row["variants"].items()}
    monkeypatch.setattr(sys.modules["vitreous.cli.systems"], "measured", known.__getitem__)
    monkeypatch.setenv("COLUMNS", "160")
    status, out, _ = command(monkeypatch, capsys, "systems", "van")
    first = next(line for line in out.splitlines() if line.lstrip("│ ").startswith("van_b0"))
    assert status == 0 and "75.4" in first and "224" in first and "4.11" in first and "0.86" in first


def test_a_list_of_all_measures_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.modules["vitreous.cli.systems"], "measured", lambda _: pytest.fail("measured"))
    status, out, _ = command(monkeypatch, capsys, "systems", "--json")
    assert status == 0 and len(json.loads(out)) == len(listed())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vann"], "did you mean van"),
        (["van", "--family", "tokens"], "no system of the family"),
        (["zzz"], "vitreous systems lists"),
    ],
)
def test_unknown_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    status, _, err = command(monkeypatch, capsys, "systems", *words)
    assert status == 2 and said in err


def test_the_meta_device_counts_as_the_processor_does() -> None:
    import timm

    model = timm.create_model("van_b0").eval()
    assert measured("van_b0")["gmacs"] == macs(model, torch.zeros(1, 3, 224, 224)) / 1e9


@pytest.mark.parametrize("family", ["prune", "deploy", "data"])
def test_entries_are_there(family: str) -> None:
    for row in listed(family):
        for entry in row["entry"].split(", "):
            module, _, name = entry.rpartition(".")
            assert hasattr(importlib.import_module(module), name), entry
