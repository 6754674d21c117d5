"""The training engine: what it computes, that nothing is lost, and what it refuses."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from learning import pictures, vit
from safetensors.torch import load_file, save_file
from torch import nn

import vitreous as vt
from vitreous.learn import CrossEntropy, Objective, engine

KEYS = dict(epochs=3, batch=16, augment=None, seed=1)


def apart(a, b):
    return max(float((p - q).abs().max()) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns_and_leaves_the_argument_alone():
    model, data = vit(), pictures()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    taught = vt.train(model, data, epochs=12, batch=16, augment=None)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (taught(data[0]).argmax(1) == data[1]).float().mean() > 0.9
    assert not taught.training


def test_the_first_step_is_that_of_the_hand():
    """One step of SGD on cross-entropy, without warm-up or clipping."""
    model, (x, y) = vit(), pictures(16)
    taught = vt.train(
        model, (x, y), optimiser=vt.learn.SGD(lr=0.1, weight_decay=0.0), epochs=1, batch=16, augment=None, warmup=0, clip=None
    )
    loss = F.cross_entropy(model.train()(x), y)
    for (name, p), g in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert torch.allclose(taught.get_parameter(name), p - 0.1 * 1.9 * g, atol=1e-5), name  # Nesterov's first step: 1 + µ


def test_accumulation_changes_nothing():
    model, data = vit(), pictures()
    assert apart(vt.train(model, data, **KEYS), vt.train(model, data, **KEYS, micro=4)) < 1e-5


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches a kill."""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """With dropout, mixup, augmentation, an average of the weights and momentum."""
    model, data = vit(drop_rate=0.1, drop_path_rate=0.1), pictures()
    settings = KEYS | dict(augment="shift", mixup=0.2, ema=0.9, every=0.0)
    whole = vt.train(model, data, **settings)
    steps = 0

    def progress(_: str, share: float) -> None:
        nonlocal steps
        steps += 1
        if steps in (1, 2, 5, 7, 8, 12):
            raise Killed

    for _ in range(6):
        with pytest.raises(Killed):
            vt.train(model, data, **settings, out=tmp_path / "run", progress=progress)
    went_on = vt.train(model, data, **settings, out=tmp_path / "run", progress=progress)
    assert apart(whole, went_on) == 0
    assert steps < 30  # it did not begin anew each time: 12 steps a run
    assert apart(vt.load(tmp_path / "run" / "model.safetensors", base=model), whole) == 0


def test_other_settings_or_weights_do_not_go_on(tmp_path):
    model, data = vit(), pictures()
    vt.train(model, data, **KEYS, out=tmp_path)
    with pytest.raises(vt.VitreousError, match="other seed"):
        vt.train(model, data, **{**KEYS, "seed": 2}, out=tmp_path)
    with torch.no_grad():
        model.head.bias += 1
    with pytest.raises(vt.VitreousError, match="other weights"):
        vt.train(model, data, **KEYS, out=tmp_path)


def test_a_damaged_checkpoint_is_said(tmp_path):
    model, data = vit(), pictures()
    vt.train(model, data, **KEYS, out=tmp_path)
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(vt.VitreousError, match="damaged"):
        vt.train(model, data, **KEYS, out=tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model, data = vit(), pictures()
    save, calls = torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(vt.VitreousError, match="No space left"):
        vt.train(model, data, **KEYS, out=tmp_path, every=0.0)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2
    assert not list(tmp_path.glob(".*.part"))
    monkeypatch.setattr(torch, "save", save)
    assert apart(vt.train(model, data, **KEYS, out=tmp_path, every=0.0), vt.train(model, data, **KEYS)) == 0


@dataclass(frozen=True)
class Centred(Objective):
    """Uses the mean over the whole batch."""

    whole_batch = True

    def __call__(self, seen, batch, now):
        mean = now.gather(seen.logits).mean(0)
        return {"centred": (seen.logits - mean).square().mean()}


STOP = []


@dataclass(frozen=True)
class Stops(Objective):
    """Ends a run in its middle, in every process."""

    def before_step(self, now):
        if STOP and now.share >= 0.5:
            raise Killed

    def __call__(self, seen, batch, now):
        return {}


def cut(out, stop=False, fsdp=True):
    """A run of two objectives and averaged weights that is cut over the processes there are."""
    STOP[:] = [True] * stop
    teach = [CrossEntropy(), Centred(), Stops()]
    return vt.train(vit(), pictures(), teach, **KEYS | dict(epochs=1, ema=0.9, every=0.0), out=out, fsdp=fsdp)


def all_ways(folder: Path, devices: int) -> None:
    made = {
        "one": vt.train(vit(), pictures(), **KEYS, devices=devices),
        "whole": vt.train(vit(), pictures(), [vt.learn.CrossEntropy(), Centred()], **KEYS, devices=devices),
        "cut": cut(None),
    }
    first = os.environ.get("RANK", "0") == "0"
    if devices > 1:
        with pytest.raises(Killed):
            cut(folder / "run", stop=True)
        if first:
            shutil.copytree(folder / "run", folder / "copy")
        made["went on"] = cut(folder / "run")
    if first:
        for name, model in made.items():
            save_file(model.state_dict(), folder / f"{name}{devices}.safetensors")


TWO = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_engine import all_ways
all_ways(Path({out!r}), 2)
"""


def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=[str(p) for p in Path(__file__).parents[:2]], out=str(tmp_path)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    outside = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "RANK", "LOCAL_", "WORLD_", "MASTER_", "NODE_"))
    }
    said, runs = tmp_path / "said", [torchrun | {"RANK": r, "LOCAL_RANK": r} for r in "01"]
    with said.open("w") as log:  # apart, so that no signal between them reaches what runs these tests
        keys = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        both = [subprocess.Popen([sys.executable, str(script)], env=outside | run, **keys) for run in runs]
        codes = [process.wait(timeout=600) for process in both]
    assert codes == [0, 0], said.read_text()[-3000:]
    all_ways(tmp_path, 1)
    saved = {p.stem: load_file(p) for p in tmp_path.glob("*.safetensors")}
    differ = lambda a, b: max(float((saved[a][k] - saved[b][k]).abs().max()) for k in saved[a])
    assert all(differ(f"{name}1", f"{name}2") < 1e-5 for name in ("one", "whole", "cut"))
    # What was cut over two processes is kept whole: two go on to the same weights, and so does one.
    assert differ("went on2", "cut2") < 1e-6
    steps = torch.load(tmp_path / "copy" / "last.pt", weights_only=True)["step"]
    assert steps == 2
    alone = cut(tmp_path / "copy", fsdp=False).state_dict()
    assert max(float((alone[k] - saved["cut1"][k]).abs().max()) for k in alone) < 1e-5


def test_what_cannot_be_cut_is_refused(monkeypatch):
    with pytest.raises(vt.VitreousError, match="USKD has weights of its own"):
        engine._can_be_cut(engine.Lesson(vit(), [CrossEntropy(), vt.learn.USKD()]))
    with pytest.raises(vt.VitreousError, match="SlimFit has weights"):
        engine._can_be_cut(engine.Lesson(vit(), [CrossEntropy(), vt.learn.SlimFit()]))
    engine._can_be_cut(engine.Lesson(vit(), [CrossEntropy(), vt.learn.NKD(vit())]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(vt.VitreousError, match="loss scale"):
        vt.train(vit(), pictures(), **KEYS, precision="16-mixed", fsdp=True)


def test_sam_counts_batch_norms_once_and_repeats_dropout():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    data = pictures(16)
    once = KEYS | dict(epochs=1)
    taught = vt.train(net, data, optimiser=vt.learn.SAM(vt.learn.SGD(lr=1e-9), rho=1e-6), **once)
    plain = vt.train(net, data, optimiser=vt.learn.SGD(lr=1e-9), **once)
    assert torch.equal(taught[2].running_mean, plain[2].running_mean)
    assert int(taught[2].num_batches_tracked) == 1
    # With an ascent of nearly nothing the second gradient is the first, if dropout is drawn alike.
    a = vt.train(net, data, optimiser=vt.learn.SAM(vt.learn.SGD(lr=0.1), rho=1e-6), **once)
    b = vt.train(net, data, optimiser=vt.learn.SGD(lr=0.1), **once)
    assert apart(a, b) < 1e-4
    assert apart(vt.train(net, data, optimiser=vt.learn.SAM(vt.learn.SGD(lr=0.1), rho=1.0), **once), b) > 1e-3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(batch=100), "fewer than a batch"),
        (dict(batch=16, micro=3), "multiple of 3"),
        (dict(objective=vt.learn.NKD(vit(5))), "teacher of the same classes"),
        (dict(objective=vt.learn.KD()), "needs a teacher"),
        (dict(optimiser=vt.learn.SGD(lr=1e30), clip=None), "not finite at step"),
        (dict(augment="twirl"), "no augmentation"),
        (dict(objective=Centred(), micro=4), "leave micro out"),
        (dict(objective=vt.learn.USKD(), model=nn.Sequential(nn.Flatten(), nn.Linear(768, 4))), "no blocks of attention"),
    ],
)
def test_refusals(change, match):
    settings = KEYS | change
    model = settings.pop("model", None) or vit()
    with pytest.raises(vt.VitreousError, match=match):
        vt.train(model, pictures(), settings.pop("objective", CrossEntropy()), **settings)


def test_labels_out_of_range_and_nothing_to_train():
    x, y = pictures()
    with pytest.raises(vt.VitreousError, match="image 5 has the label 9"):
        vt.train(vit(), (x, torch.where(torch.arange(64) == 5, 9, y)), **KEYS)
    frozen = vit().requires_grad_(False)
    with pytest.raises(vt.VitreousError, match="nothing to train"):
        vt.train(frozen, (x, y), **KEYS)


def test_a_teacher_is_asked_anew_about_images_that_only_passed_by():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
    ask = engine._Teachers([], torch.device("cpu"))
    for i in range(50):
        assert float(ask(teacher, torch.full((1, 1, 2, 2), float(i))).logits) == pytest.approx(i * float(teacher[1].weight.sum()))
