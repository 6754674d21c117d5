"""A slimmed model learns to be what it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from learning import pictures, vit
from PIL import Image

import vitreous as vt
from vitreous.search import Goal, Job, choose
from vitreous.search.budget import ACCURACY, Loss
from vitreous.search.choose import Judge
from vitreous.search.healed import healed_options
from vitreous.search.split import to_heal

FAST = dict(batch=8, augment=None, optimiser=vt.learn.AdamW(lr=2e-4))


@pytest.fixture(scope="module")
def original():
    return vt.open()


@pytest.fixture(scope="module")
def data(original):
    sample = vt.data.open_data("sample", original, limit=32)
    return sample.tensor(range(32)), torch.from_numpy(sample.labels)


STEPS = {
    "evit": vt.tokens.EViT(keep=0.1, fuse=False),
    "mctf": vt.tokens.MCTF(r=40),
    "slimming": vt.tokens.TokenSlimming(keep=0.5),
    "sparsifiner": vt.tokens.Sparsifiner(budget=0.2),
    "heads": vt.prune.Heads(share=0.5),
}


@pytest.mark.parametrize("name", STEPS)
def test_healing_brings_a_model_back(original, data, name, tmp_path):
    small = vt.slim(original, STEPS[name], calibration=data[0][:16])

    def distance(model):
        """From the original's answers; of MCTF, which learns from labels alone, from the labels."""
        with torch.no_grad():
            wanted = F.one_hot(data[1], 10) if name == "mctf" else original(data[0]).softmax(1)
            return float((model(data[0]).softmax(1) - wanted).abs().mean())

    healed = vt.heal(small, original, data, epochs=3, **FAST)
    assert distance(healed) < 0.8 * distance(small)
    assert [str(s) for s in healed.vitreous.steps()] == [str(s) for s in small.vitreous.steps()]
    vt.save(healed, tmp_path / "healed.safetensors")
    again = vt.load(tmp_path / "healed.safetensors", base=original)
    assert torch.equal(again(data[0][:4]), healed(data[0][:4]))


def test_integers_come_last(original, data):
    int8 = vt.slim(original, vt.quant.RepQ(), calibration=data[0][:16])
    with pytest.raises(vt.VitreousError, match="before integers"):
        vt.heal(int8, original, data)


def test_features_heal_without_labels(original, data):
    x, body = data[0], copy.deepcopy(original)
    body.reset_classifier(0)
    small = vt.slim(body, vt.tokens.EViT(keep=0.1, fuse=False))
    healed = vt.heal(small, body, (x, None), epochs=3, **FAST)
    with torch.no_grad():
        before, after = ((m(x) - body(x)).norm() for m in (small, healed))
    assert after < 0.8 * before


def test_the_keep_rate_falls(original, data):
    small = vt.slim(original, vt.tokens.EViT(keep=0.5, at=(1,)))
    kept = []

    class Watch(vt.learn.Objective):
        def before_step(self, now):
            kept.append(now.model.get_submodule("blocks.1").reducers[0].keep)

        def __call__(self, seen, batch, now):
            return {}

    teach = [vt.learn.CrossEntropy(), vt.learn.KeepRate(0.5, 0, 2), Watch()]
    vt.train(small, data, teach, epochs=3, batch=8, augment=None)
    assert kept[0] == 1.0 and kept[-1] == 0.5 and 0.5 < kept[4] < 1 and kept == sorted(kept, reverse=True)


def test_the_job_heals_before_integers(original, tmp_path):
    learn_from = vt.data.open_data("sample", original, part="train", limit=32)
    job = Job(tmp_path, "sample", 0, None, Goal(), 16, lambda *_: None, heal=1)
    recipe = vt.Recipe.parse("EViT(keep=0.1, fuse=False), RepQ()")
    calibrate = learn_from.tensor(range(8))
    small = job._made(original, recipe, calibrate, learn_from)
    assert [s.name for s in small.vitreous.steps()] == ["tokens.EViT", "quant.RepQ"]
    plain = vt.slim(original, recipe, calibrate)
    x = learn_from.tensor(range(16))
    with torch.no_grad():
        assert (small(x) - original(x)).norm() < (plain(x) - original(x)).norm()
    with pytest.raises(vt.VitreousError, match="integers come last"):
        job._made(original, vt.Recipe.parse("RepQ(), EViT()"), calibrate, learn_from)


def test_healing_allows_a_stronger_step(monkeypatch):
    """Without a recipe: a step that loses too much untrained is taken once it is taught, and left when teaching is no help."""
    monkeypatch.setattr(choose, "INTEGERS", ())
    net, x = vit(patch_size=4), pictures(8)[0]

    class Judged(Judge):  # of a budget of 1: three times as much is lost by any step, and a half once it is taught
        def __init__(self) -> None: ...

        def loss(self, model, batches=None):
            return Loss(ACCURACY, 0.0 if model is net else 0.5 if hasattr(model, "taught") else 3.0, 0.0)

        def keeps(self, model, budget):
            return (lost := self.loss(model)).value <= budget.budget, lost

    def taught(small):
        small.taught = True
        return small

    log: list[str] = []
    given = net, Judged(), x, Goal(budget=1.0)
    options = healed_options(*given, taught, lambda *_: None, log)
    assert all("healed" in name and model.taught for name, model in options.items())
    options = healed_options(*given, lambda small: small, lambda *_: None, log)
    assert [*options.values()] == [net] and "nothing is healed" in " ".join(log)


def test_images_to_heal_on_are_not_those_of_the_proof(original, tmp_path):
    for i in range(20):
        folder = tmp_path / "photos" / ("bag", "coat")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), i).save(folder / f"{i}.png")
    whole = vt.data.open_data(tmp_path / "photos", original)
    learn_from, prove = to_heal(tmp_path / "photos", original, whole, seed=0, download=False)
    seen = [{float(d.tensor([i]).mean()) for i in range(len(d))} for d in (learn_from, prove)]
    assert len(seen[0]) == len(seen[1]) == 10 and not seen[0] & seen[1]
    train, test = (vt.data.open_data("sample", original, part=p, limit=3) for p in ("train", "test"))
    learn_from, prove = to_heal("sample", original, test, seed=0, download=False)
    assert len(learn_from) == 256 and prove is test and torch.equal(learn_from.tensor([0, 1, 2]), train.tensor([0, 1, 2]))
