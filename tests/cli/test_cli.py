"""The command line as a person uses it: the main job, and what it says to bad input."""

from __future__ import annotations

import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support import command

import vitreous as vt
import vitreous.search.job
import vitreous.search.trial
from vitreous.cli import main
from vitreous.quant.layers import QuantLinear

WRITTEN = {"manifest.json", "report.html", "proof.json", "model.safetensors", "model.onnx", "model.xml", "model.bin"}
WRITTEN |= {"preprocess.json", "labels.txt", "recipe.json"}
SMALL = ["vit_tiny_patch16_224", "--num-classes", "10", "--img-size", "32"]
SMALL += [word for size in ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=3") for word in ("--model-arg", size)]


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Let the job not wait until timing is sure."""
    for room in (vitreous.search.trial, vitreous.search.job):
        patch.setattr(room, "SECONDS", 0.1)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole run of the main job."""
    out = tmp_path_factory.mktemp("job") / "out"
    words = ["slim", "--limit", "100", "--calibrate", "32", "--out", str(out), "--steps", "EViT(keep=0.5), RepQ()"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as error:
        hurry(patch)
        patch.setattr(sys, "argv", ["vitreous", *words])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0, error.getvalue()
    assert "shipped" in said.getvalue() and "Traceback" not in error.getvalue()
    return out


def test_a_stopped_job_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    learned: list[int] = []
    learn = vitreous.quant.weightonly.learned_rounding

    def counted(*arguments: Any) -> torch.Tensor:
        learned.append(1)
        return learn(*arguments)

    def stopped(*_: Any, **__: Any) -> None:
        raise vt.VitreousError("stopped here")

    monkeypatch.setattr(vitreous.quant.weightonly, "learned_rounding", counted)
    monkeypatch.setattr(vitreous.quant.weightonly, "ITERATIONS", 5)
    monkeypatch.setattr(vitreous.search.trial, "ship_all", stopped)
    steps = "WeightOnly(bits=4, rounding='learned')"
    arguments = ["slim", "--limit", "8", "--calibrate", "4", "--steps", steps, "--resume", str(tmp_path / "kept")]
    counts = []
    for _ in range(2):
        status, _, error = command(monkeypatch, capsys, *arguments, "--out", str(tmp_path / "out"))
        assert status and "stopped here" in error
        counts.append(len(learned))
    assert counts[0] > 0 and counts[1] == counts[0], "the second run must take what the first one made"


def test_main_job_writes_everything(job: Path) -> None:
    assert {p.name for p in job.iterdir()} == WRITTEN
    assert not [p for p in job.parent.iterdir() if p != job], "nothing may be left beside the folder"
    proof = json.loads((job / "proof.json").read_text())
    assert [m["name"] for m in proof["models"]] == ["original", "slimmed", "shipped"]
    assert proof["images"] == 100 and proof["machine"]
    shipped = proof["models"][2]
    assert shipped["latency"] and shipped["kind"] in ("OpenVINO int8", "ONNX Runtime int8"), "whichever is faster here"
    assert proof["models"][1]["simulated"], "torch only simulates integers: no speed"
    assert shipped["answers"]["difference"]["low"] <= shipped["answers"]["difference"]["value"]
    report = (job / "report.html").read_text()
    assert "<html" in report and "tokens.EViT(keep=0.5)" in report
    assert [str(step) for step in vt.Recipe.read(job / "recipe.json").steps] == ["tokens.EViT(keep=0.5)", "quant.RepQ()"]
    assert json.loads((job / "preprocess.json").read_text()) == vt.Runtime(job / "model.onnx").card["preprocess"]
    assert (job / "labels.txt").read_text().split("\n")[:2] == ["t-shirt", "trouser"]


def test_main_job_result_loads_and_agrees_with_its_files(job: Path) -> None:
    small = vt.load(job / "model.safetensors")
    x = vt.data.open_data("sample").tensor(range(32))
    with torch.no_grad():
        expected = small(x)
    for name in ("model.xml", "model.onnx"):
        out = vt.Runtime(job / name)(x)
        assert (out.argmax(1) == expected.argmax(1)).float().mean() >= 0.9


def test_default_recipe_ships_float_when_integers_do_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hurry(monkeypatch)
    real, refused = vitreous.search.trial.ship_all, []

    def no_integers(model: torch.nn.Module, paths: list[Path], **kwargs: Any) -> list[vt.Shipment]:
        if any(isinstance(m, QuantLinear) for m in model.modules()):
            refused.append(model)
            raise vt.VitreousError("this machine has no integers")
        return real(model, paths, **kwargs)

    monkeypatch.setattr(vitreous.search.trial, "ship_all", no_integers)
    arguments = ["slim", *SMALL, "--limit", "16", "--calibrate", "8", "--budget", "100", "--out", str(tmp_path / "out")]
    status, out, _ = command(monkeypatch, capsys, *arguments)
    assert status == 0 and refused
    assert "RepQ was not shipped: this machine has no integers" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == WRITTEN - {"labels.txt"}, "its classes have no names"
    kinds = [m["kind"] for m in json.loads((tmp_path / "out" / "proof.json").read_text())["models"]]
    assert "int8" not in kinds[2]
    assert [m.keep for m in vt.load(tmp_path / "out" / "model.safetensors").modules() if hasattr(m, "keep")] == [0.2]


def test_a_second_run_does_not_overwrite(job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = (job / "proof.json").read_bytes()
    status, _, error = command(monkeypatch, capsys, "slim", "--out", str(job))
    assert status == 2 and "not empty" in error and error.count("\n") == 1
    assert (job / "proof.json").read_bytes() == before


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "vitreous", "slim", "--out", str(tmp_path / "out")]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background does not hear it
    child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while not list(tmp_path.glob(".out.*")):
        assert child.poll() is None, child.communicate()
        time.sleep(0.1)
    time.sleep(1.0)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate()
    assert child.returncode == 130 and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_within_compiled_code_is_still_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def compiled(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("a callback failed") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(vitreous.cli, "app", compiled)
    try:
        status, _, error = command(monkeypatch, capsys, "slim")
    finally:
        signal.signal(signal.SIGINT, before)
        vitreous.cli._interrupts.clear()
    assert (status, error) == (130, "vitreous: stopped: nothing was written\n")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on file size stands in for a full disk: the same kind of error, from the same call."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        arguments = [
            "slim",
            *SMALL,
            "--limit",
            "16",
            "--calibrate",
            "4",
            "--steps",
            "EViT(keep=0.5)",
            "--out",
            str(tmp_path / "out"),
        ]
        status, _, error = command(monkeypatch, capsys, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2, error
    assert "cannot" in error.splitlines()[-1] and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def folder(root: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (28, 28), np.uint8)).save(root / name / f"{i}.png")
    return root


BAD = {
    "unknown model": (["slim", "deit_smal_patch16_224"], "did you mean"),
    "unknown step": (["slim", "--steps", "EVit7()"], "unknown step"),
    "unknown option": (["slim", "--bogus"], "bogus"),
    "unknown command": (["slimm"], "slimm"),
    "steps that cannot be read": (["slim", "--steps", "EViT("], "cannot read"),
    "wrong key": (["slim", "--recipe", "wrong_key.json"], "no parameter 'kep'"),
    "wrong type": (["slim", "--recipe", "wrong_type.json"], "must be float"),
    "no such recipe": (["slim", "--recipe", "absent.json"], "cannot read the recipe"),
    "both recipe and steps": (["slim", "--recipe", "wrong_key.json", "--steps", "EViT"], "not both"),
    "checkpoint that does not fit": (["slim", "vit_tiny_patch16_224", "--checkpoint", "other.safetensors"], "do not fit"),
    "truncated file": (["slim", "vit_tiny_patch16_224", "--checkpoint", "cut.safetensors"], "not a whole safetensors"),
    "truncated slimmed model": (["slim", "cut.safetensors"], "not a whole safetensors"),
    "weights without recipe": (["slim", "other.safetensors"], "no recipe"),
    "pickle": (["slim", "vit_tiny_patch16_224", "--checkpoint", "pickled.pth"], "pickled code"),
    "NaN in weights": (["slim", "vit_fashion", "--checkpoint", "nan.safetensors"], "holds NaN"),
    "no such data": (["slim", "--data", "absent"], "absent"),
    "misspelt data": (["slim", "--data", "fashon-mnist"], "fashion-mnist"),
    "empty data folder": (["slim", "--data", "empty"], "empty"),
    "unreadable data folder": (["slim", "--data", "broken"], "broken"),
    "one class only": (["slim", "--data", "one"], "class"),
    "output under a file": (["slim", "--out", "cut.safetensors/out"], "cannot write"),
    "output is a file": (["slim", "--out", "cut.safetensors"], "is a file"),
    "model without attention": (["slim", "resnet10t", "--steps", "EViT", "--data", "two"], "has none"),
    "windowed model": (["slim", "swin_tiny_patch4_window7_224", "--steps", "ToMe", "--data", "two"], "not one"),
    "picture that is none": (["see", "cut.safetensors"], "picture"),
    "unknown method": (["see", "good.png", "--method", "rolout"], "did you mean rollout"),
    "no tokens to draw": (["see", "good.png", "--tokens"], "drops and merges no tokens"),
    "unknown family": (["systems", "--family", "token"], "did you mean tokens"),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    (root / "wrong_key.json").write_text('[{"step": "tokens.EViT", "kep": 0.7}]')
    (root / "wrong_type.json").write_text('[{"step": "tokens.EViT", "keep": "0.7"}]')
    model = vt.open()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, root / "other.safetensors")
    (root / "cut.safetensors").write_bytes((root / "other.safetensors").read_bytes()[:5000])
    save_file({k: v * float("nan") if k == "head.weight" else v for k, v in state.items()}, root / "nan.safetensors")
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=1), root / "pickled.pth")
    folder(root / "one", {"a": 4})
    folder(root / "two", {"a": 4, "b": 4})
    (root / "empty").mkdir()
    for name in ("a", "b"):
        (root / "broken" / name).mkdir(parents=True)
        (root / "broken" / name / "x.png").write_bytes(b"no picture")
    Image.new("L", (28, 28), 99).save(root / "good.png")
    return root


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, odd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[case]
    monkeypatch.chdir(odd)
    before = {p: p.stat().st_mtime_ns for p in odd.rglob("*")}
    status, out, error = command(monkeypatch, capsys, *arguments)
    assert status == 2, error
    line = error.strip().splitlines()[-1]
    assert line.startswith("vitreous: ") and message in line and "Traceback" not in error and out == ""
    assert {p: p.stat().st_mtime_ns for p in odd.rglob("*")} == before, "bad input must leave nothing behind"


def test_see_writes_a_picture_and_does_not_overwrite(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("rollout", "attention", "grad_cam"):
        out = tmp_path / f"{method}.png"
        status, said, _ = command(monkeypatch, capsys, "see", str(odd / "good.png"), "--method", method, "--out", str(out))
        assert status == 0 and "class" in said
        assert Image.open(out).size[0] > 2 * 200
    status, _, error = command(monkeypatch, capsys, "see", str(odd / "good.png"), "--out", str(out))
    assert status == 2 and "exists" in error


def test_see_draws_tokens(tmp_path: Path, odd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    vt.save(vt.slim(vt.open(), vt.tokens.EViT(keep=0.5)), tmp_path / "s.safetensors")
    arguments = ("see", str(odd / "good.png"), str(tmp_path / "s.safetensors"), "--tokens", "--out", str(tmp_path / "t.png"))
    status, _, error = command(monkeypatch, capsys, *arguments)
    assert status == 0, error
    assert Image.open(tmp_path / "t.png").size[0] > 4 * 200, "the picture and three reductions"


def test_anatomy_and_systems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(monkeypatch, capsys, "anatomy")
    assert status == 0 and "grid (7, 7)" in out and "plain" in out
    status, out, _ = command(monkeypatch, capsys, "systems", "--json")
    rows = json.loads(out)
    assert status == 0 and {"evit", "tome", "repq-vit"} <= {r["slug"] for r in rows}
    commands = {c.callback.__name__ for c in vitreous.cli.app.registered_commands if c.callback}
    for row in rows:
        for entry in row["entry"].split(", "):
            if entry.startswith("vitreous "):
                assert entry.split()[1] in commands, entry
                continue
            part = pkgutil.resolve_name(entry)
            assert callable(part) or part.__name__ == entry, entry
    status, out, _ = command(monkeypatch, capsys, "systems", "--family", "quant")
    assert status == 0 and "tokens" not in out


def test_no_download_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm name alone makes random weights; nothing tries the network."""
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    vt.open("vit_tiny_patch16_224", depth=1)
    os.environ.pop("HF_HUB_OFFLINE", None)
