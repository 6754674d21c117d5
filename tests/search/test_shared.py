"""A search that several processes share: no trial is made twice, and what a killed one was at is made again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from searching import ABOUT, Tried
from support import command
from torch import Tensor

from vitreous.errors import VitreousError
from vitreous.search import explore, run
from vitreous.search.budget import Goal
from vitreous.search.shared import SharedRecord


def finished(record: SharedRecord) -> Counter[tuple[str, str]]:
    """How many trials of the study hold a finding, by finding."""
    with_value = [t for t in record._trials() if t.state != record.states.FAIL and "value" in t.user_attrs]
    return Counter((t.user_attrs["kind"], t.user_attrs["key"]) for t in with_value if t.user_attrs["kind"] != "about")


@pytest.mark.parametrize("kind", ["file", "database"])
def test_one_claims_and_all_see(kind: str, tmp_path: Path) -> None:
    storage = str(tmp_path / "s.log") if kind == "file" else f"sqlite:///{tmp_path / 's.db'}"
    a, b = (SharedRecord(storage, ABOUT, beat=0.02, dead=0.3) for _ in range(2))
    assert a.claim("alone", "x") and not b.claim("alone", "x") and b.busy == {("alone", "x")}
    assert a.add("alone", "x", {"lost": 1.0}) == {"lost": 1.0}
    b.refresh()
    assert b.get("alone", "x") == {"lost": 1.0} and not b.busy and not b.claim("alone", "x")
    assert b.claim("trial", "y")
    b.release("trial", "y")
    assert a.claim("trial", "y"), "given back"
    time.sleep(0.4)
    assert not b.claim("trial", "y"), "alive, however long it takes"
    a.mine["trial", "y"][1].set()  # no more signs of life, as of a process that was killed
    b.refresh()
    time.sleep(0.4)
    assert b.claim("trial", "y")
    ours = {"runs": {"OpenVINO": {"ms": [2.0], "lost": 0.5}}}
    assert b.add("trial", "y", ours) == a.add("trial", "y", {"runs": {}}) == ours, "who was taken for dead learns what counts"
    assert finished(a) == {("alone", "x"): 1, ("trial", "y"): 1}
    assert [t.values for t in a._trials() if t.state == a.states.COMPLETE] == [[2.0, 0.5]]


def test_of_something_else(tmp_path: Path) -> None:
    SharedRecord(str(tmp_path / "s.log"), ABOUT)
    with pytest.raises(VitreousError, match=r"s\.log holds a search of another model \(a, not c\): give another --storage"):
        SharedRecord(str(tmp_path / "s.log"), ABOUT | {"model": "c"})
    for wrong in (
        str(tmp_path / "none" / "s.log"),
        str(tmp_path),
        "",
        "nosuch://x/y",
        "redis://x",
        f"sqlite:///{tmp_path}/none/s.db",
    ):
        with pytest.raises(VitreousError, match="opening --storage"):
            SharedRecord(wrong, ABOUT)


def test_without_optuna(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(VitreousError, match=r"pip install 'vitreous\[share\]'"):
        SharedRecord(str(tmp_path / "s.log"), ABOUT)


OTHER = """
import pytest, sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from searching import ABOUT, Tried
from vitreous.search.budget import Goal
from vitreous.search.shared import SharedRecord

torch.set_num_threads(1)
patch = pytest.MonkeyPatch()
tried = Tried(patch, Goal(budget=1.5), torch.load({images!r}))
tried.dies(patch, after=2, pause=0.2)  # in the second trial: before it came the original's, and the first
tried.search(Path({out!r}), 3, SharedRecord({storage!r}, ABOUT, beat=0.1))
"""


def test_two_processes_make_nothing_twice_and_one_may_be_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Tensor
) -> None:
    """Another process begins, this one joins it; the other is killed with SIGKILL while it times, and this one makes that too."""
    monkeypatch.setattr(explore, "POLL", 0.1)
    torch.save(images, tmp_path / "images.pt")
    storage, tests = str(tmp_path / "s.log"), str(Path(__file__).parent.parent)
    script = OTHER.format(tests=tests, images=str(tmp_path / "images.pt"), out=str(tmp_path / "other"), storage=storage)
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    record, until = SharedRecord(storage, ABOUT, beat=0.1, dead=2.0), time.monotonic() + 300
    while record.get("trial", "[]") is None and child.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
        record.refresh()
    tried = Tried(monkeypatch, Goal(budget=1.5), images)
    tried.search(tmp_path / "mine", 3, record)
    assert child.wait(60) == -signal.SIGKILL, child.communicate()[1][-2000:]
    once = finished(record)
    assert max(once.values()) == 1 and {key for kind, key in once if kind == "trial"} == record.all("trial").keys()
    killed = [t.user_attrs["key"] for t in record._trials() if t.state == record.states.FAIL and t.user_attrs["kind"] == "trial"]
    assert killed and set(killed) <= record.all("trial").keys(), "what was being made is made again"
    assert "no step" not in tried.made and len(tried.made) == len(record.all("trial")) - 1, "the other's are not"


def test_refused_at_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(run, "opened", lambda storage: pytest.fail("too early"))
    words = ("search", "vit_tiny_patch16_224", "--axes", "toes", "--storage", "x://y", "--out", str(tmp_path / "o"))
    status, _, err = command(monkeypatch, capsys, *words)
    assert status == 2 and "no axis 'toes'" in err
    monkeypatch.undo()
    words = ("search", "--axes", "runtime", "--storage", str(tmp_path / "none" / "s.log"), "--out", str(tmp_path / "o"))
    status, _, err = command(monkeypatch, capsys, *words)
    assert status == 2 and "opening --storage" in err.splitlines()[-1] and not (tmp_path / "o").exists()
