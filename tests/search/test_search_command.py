"""`vitreous search` at the command line: what it refuses and what it says, each in a line and with exit status 2."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.table import Table
from searching import ABOUT, Tried
from support import command, small_vit
from torch import Tensor

import vitreous as vt
from vitreous.errors import VitreousError
from vitreous.schema import read_json
from vitreous.search import run
from vitreous.search.budget import AGREEMENT, Goal, Loss
from vitreous.search.record import Record
from vitreous.search.trial import Trial, best

ARGUMENTS = [a for v in ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=3") for a in ("--model-arg", v)]
SMALL = ["vit_tiny_patch16_224", "--num-classes", "10", "--img-size", "32", *ARGUMENTS]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*SMALL, "--axes", "toes"], "there is no axis 'toes'"),
        ([*SMALL, "--axes", ","], "needs an axis"),
        ([*SMALL, "--axes", "bits,runtime", "--macs", "1e6"], "none of the axes bits, runtime changes macs"),
        ([*SMALL, "--axes", "tokens,bits", "--energy", "0.5"], "none of the axes tokens, bits changes energy as LPViT models it"),
        ([*SMALL, "--energy", "0"], "energy=0: must be above 0"),
        ([*SMALL, "--energy", "2"], "energy=2: a share of what the original takes"),
        ([*SMALL, "--energy", "inf"], "finite"),
        ([*SMALL, "--speedup", "-1"], "speedup=-1: must be above 0"),
        ([*SMALL, "--macs", "0"], "macs=0: must be above 0"),
        ([*SMALL, "--bytes", "-5"], "megabytes=-5e-06: must be above 0"),
        ([*SMALL, "--memory", "nan"], "finite"),
        ([*SMALL, "--minutes", "0", "--trials", "3"], "0 minutes leave no time for 3 trials"),
        ([*SMALL, "--latency", "0"], "latency=0: must be above 0"),
        ([*SMALL, "--budget", "nan"], "finite"),
        (["swin_tiny_patch4_window7_224", "--model-arg", "depths=(1, 1)", "--axes", "tokens"], "this model has no axis 'tokens'"),
    ],
)
def test_refusals(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = command(monkeypatch, capsys, "search", *words, "--out", str(tmp_path / "s"))
    assert status == 2 and said in err.splitlines()[-1], err
    assert not (tmp_path / "s").exists(), "nothing is begun"


def test_a_model_that_is_quantized_already(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    size = dict(patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=10)
    net = vt.open("vit_tiny_patch16_224", img_size=32, **size)
    vt.save(vt.slim(net, vt.quant.MinMax(), torch.randn(4, 3, 32, 32).clamp(-1, 1)), tmp_path / "m.safetensors")
    status, _, err = command(monkeypatch, capsys, "search", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "s"))
    assert status == 2 and "quantized already by quant.MinMax" in err.splitlines()[-1]


def test_memory_that_holds_no_batch(images: Tensor) -> None:
    with pytest.raises(VitreousError, match=r"1000 bytes of memory do not hold a batch of 4 pictures, which takes 49152"):
        run._room(Goal(memory=0.001, batch=4), images)
    run._room(Goal(memory=1, batch=4), images)


def test_a_folder_of_another_models_search(tmp_path: Path) -> None:
    judge = SimpleNamespace(batches=[(torch.zeros(2, 3, 4, 4), None)])
    about = [
        run._about(SimpleNamespace(net=small_vit(seed=i), judge=judge, calibrate=torch.zeros(1, 3, 4, 4)), "d", Goal(), 1)  # type: ignore[arg-type]
        for i in range(2)
    ]
    Record(tmp_path / "trials.jsonl", about[0])
    with pytest.raises(VitreousError, match=r"holds a search of another model .*: give another --out"):
        Record(tmp_path / "trials.jsonl", about[1])


def test_what_nothing_meets_is_said_with_the_closest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def trial(name: str, ms: float, lost: float) -> Trial:
        made: Any = SimpleNamespace(engine="OpenVINO", bytes=10)
        return Trial(name, tmp_path, None, made, times=(ms,), lost=Loss(AGREEMENT, lost, 0.0))

    trials = [trial("quick", 1.0, 9.0), trial("true", 3.0, 1.5)]
    for goal, said in (
        (Goal(budget=1), "nothing keeps to the budget: true in OpenVINO comes closest, with 1.5 % of the answers changed"),
        (Goal(budget=2, latency=0.5), "nothing within the budget reaches 0.5 ms an image: true in OpenVINO comes closest, 3 ms"),
    ):
        notes: list[str] = []
        best(trials, goal, notes, lambda t: t.lost)
        assert notes[0].startswith(said)
        found = run.Found([], [], Table(), 1.0, notes, [], notes[0])  # type: ignore[arg-type]
        monkeypatch.setattr("vitreous.search.search", lambda *_, found=found, **__: found)
        status, out, err = command(monkeypatch, capsys, "search", *SMALL, "--out", str(tmp_path / "s"))
        assert status == 2 and said in err.splitlines()[-1] and "trials.jsonl" in out


def test_stopped_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitreous.search.search", stopped)
    status, _, err = command(monkeypatch, capsys, "search", *SMALL, "--out", str(tmp_path / "s"))
    assert status == 2 and "to go on: vitreous search" in err


KILLED = """
import pytest, sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from searching import Tried
from vitreous.search.budget import Goal

torch.set_num_threads(1)
patch = pytest.MonkeyPatch()
tried = Tried(patch, Goal(budget=1.5), torch.load({images!r}))
tried.dies(patch, after=3)
tried.search(Path({out!r}), 2)
"""


def test_killed_it_goes_on_and_repeats_no_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Tensor) -> None:
    """A process is killed with SIGKILL while it times its third trial; the next one repeats none, and ends as one would that
    was never stopped."""
    goal = Goal(budget=1.5)
    whole, _ = Tried(monkeypatch, goal, images).search(tmp_path / "whole", 2)
    torch.save(images, tmp_path / "images.pt")
    tests, held, out = str(Path(__file__).parent.parent), str(tmp_path / "images.pt"), str(tmp_path / "killed")
    script = KILLED.format(tests=tests, images=held, out=out)
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    before = (tmp_path / "killed" / "trials.jsonl").read_bytes()
    again, _ = Tried(monkeypatch, goal, images).search(tmp_path / "killed", 2)
    after = (tmp_path / "killed" / "trials.jsonl").read_bytes()
    assert after.startswith(before) and len(after) > len(before)
    rows = [read_json(line, "") for line in after.splitlines()][1:]
    assert max(Counter((row["kind"], row["key"]) for row in rows).values()) == 1
    assert again.record.all("trial").keys() == whole.record.all("trial").keys()
    assert again.predictor.seen.keys() == whole.predictor.seen.keys()
    assert all(len(known) == len(again.predictor.seen[kind]) for kind, known in whole.predictor.seen.items()), "it knows as much"
    assert Record(tmp_path / "killed" / "trials.jsonl", ABOUT).found == again.record.found
