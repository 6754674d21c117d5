"""Budgets in a measure that is defined, disjoint images, and which model is taken; the whole job runs in tests/cli."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import small_vit

from vitreous import read
from vitreous.data import Data, open_data
from vitreous.errors import VitreousError
from vitreous.prove import Answers, FeatureError, Interval
from vitreous.quant import Auto, MinMax, RepQ
from vitreous.quant.layers import quant_layers
from vitreous.search import choose
from vitreous.search.budget import ACCURACY, AGREEMENT, ERROR, NEIGHBOURS, Criterion, Goal, Loss, loss
from vitreous.search.choose import Chooser, Judge
from vitreous.search.partly import Mixer
from vitreous.search.split import split
from vitreous.search.trial import Trial, best
from vitreous.search.ways import ladders
from vitreous.steps import history_of, slim


def interval(value: float) -> Interval:
    return Interval(value, value - 0.0196, value + 0.0196)


def features(neighbours: Interval | None, mean: float = 0.2) -> FeatureError:
    return FeatureError(mean, mean, 0.9, 0.9, [mean, mean], [0.9, 0.9], neighbours)


@pytest.mark.parametrize(
    ("answers", "criterion", "value"),
    [
        (Answers(difference=interval(-0.01), agreement=interval(0.9)), ACCURACY, 1.0),
        (Answers(difference=interval(0.02)), ACCURACY, -2.0),
        (Answers(agreement=interval(0.97), features=features(None)), AGREEMENT, 3.0),
        (Answers(features=features(interval(0.9))), NEIGHBOURS, 10.0),
        (Answers(features=features(None)), ERROR, 20.0),
    ],
)
def test_what_is_lost_is_said_in_a_measure_that_is_defined(answers: Answers, criterion: Criterion, value: float) -> None:
    found = loss(answers)
    assert found.criterion is criterion and found.value == pytest.approx(value)


def test_nothing_to_compare_is_no_loss_of_zero() -> None:
    with pytest.raises(VitreousError, match="neither classes nor features"):
        loss(Answers())


def test_budgets() -> None:
    assert Loss(ACCURACY, 1.0, 0.7).within(1.0) and not Loss(ACCURACY, 1.1, 0.0).within(1.0)
    assert not Loss(NEIGHBOURS, 4.5, 0.8).within(5.0) and Loss(NEIGHBOURS, 4.1, 0.8).within(5.0)
    assert Loss(NEIGHBOURS, 0.0, 0.8).within(0.0), "the same answers keep to any budget"
    assert str(Loss(ACCURACY, -0.2, 0)) == "0.2 points of accuracy gained"
    assert str(Loss(ACCURACY, 0.2, 0)) == "0.2 points of accuracy lost" and str(Loss(ACCURACY, -0.01, 0)) == "no accuracy lost"
    assert str(Loss(NEIGHBOURS, 3, 0)) == "3.0 % of the nearest neighbours lost"
    assert Goal().allowed(NEIGHBOURS) == 5 and Goal(budget=0.0).allowed(NEIGHBOURS) == 0
    for wrong in (dict(speedup=0.0), dict(budget=-1.0), dict(latency=float("nan"))):
        with pytest.raises(VitreousError, match="must be above 0 and finite"):
            Goal(**wrong)


# ---- images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(30):
        home = tmp_path / "photos" / "abc"[i % 3]
        home.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(noise).resize((40, 40), Image.Resampling.BICUBIC).save(home / f"{i}.png")
    return tmp_path / "photos"


def pictures(x: torch.Tensor) -> set[bytes]:
    return {i.numpy().tobytes() for i in x}


def everything(data: Data) -> torch.Tensor:
    return data.tensor(range(len(data)))


@pytest.mark.parametrize(("limit", "sizes"), [(None, (6, 10, 14)), (12, (6, 5, 7)), (28, (6, 10, 14))])
def test_no_image_is_used_twice(photos: Path, limit: int | None, sizes: tuple[int, int, int]) -> None:
    found = split(photos, small_vit(), choosing=True, limit=limit)
    assert found.choose is not None
    parts = [found.calibrate, everything(found.choose), everything(found.prove)]
    assert tuple(map(len, parts)) == sizes
    assert len(set.union(*map(pictures, parts))) == sum(sizes)
    assert f"{sizes[1]} to choose the recipe" in str(found) and f"{sizes[2]} to prove" in str(found)


def test_a_training_part_calibrates(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "parted"
    root.mkdir()
    photos.rename(root / "test")
    for name in ("a", "b", "c"):
        (root / "train" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (99, ord(name), 3)).save(root / "train" / name / "x.png")
    found = split(root, small_vit(), choosing=False, calibrate=2)
    assert found.choose is None and len(found.prove) == 30 and len(found.calibrate) == 2
    assert not pictures(found.calibrate) & pictures(everything(found.prove))


def test_too_few_images(photos: Path) -> None:
    with pytest.raises(VitreousError, match="too few to calibrate on 29, choose and prove"):
        split(photos, small_vit(), choosing=True, calibrate=29)


# ---- choosing


def test_ladders_go_from_strong_to_gentle() -> None:
    for ladder in ladders(read(small_vit())):
        work = [way.work for way in ladder]
        assert work == sorted(work) and work[0] > 0 and work[-1] < 1


def test_nothing_is_lost_where_only_the_class_token_is_read_on() -> None:
    net, x = small_vit(depth=3), torch.randn(2, 3, 32, 32)
    last = ladders(read(net))[1][-1]
    assert (
        last.last
        and str(last.step) == "tokens.EViT(keep=0.01, at=(2,))"
        and last.work == pytest.approx((2 + 1 / 3 + 0.01 * 2 / 3) / 3)
    )
    torch.testing.assert_close(slim(net, last.step)(x), net(x), atol=1e-5, rtol=1e-5)
    assert len(ladders(read(small_vit(class_token=False, global_pool="avg")))) == 3


def test_parts_in_integers_and_which_harm_least() -> None:
    net, x = small_vit(depth=2), torch.rand(4, 3, 32, 32) - 0.5
    with torch.no_grad():
        net.blocks[1].norm2.weight[0] *= 100  # one channel that the others' integers cannot stand
    mixer = Mixer(net, slim(net, MinMax(), x))
    assert list(mixer.weights) == ["patch_embed.proj", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "head"]
    assert mixer.weights["blocks.0.attn"] == 4 * 48 * 48
    assert torch.equal(mixer.mixed([])(x), net(x)) and torch.equal(mixer.mixed(mixer.weights)(x), mixer.quantized(x))
    with torch.no_grad():
        order = mixer.gentlest_first(x, net(x), lambda share: None)
    assert [part for part in order if "blocks" in part][-1] == "blocks.1.mlp" and set(order) == set(mixer.weights)


def test_as_many_parts_as_the_budget_allows(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    net = small_vit(depth=4)
    net.reset_classifier(0)
    data = open_data(photos, net)
    judge = Judge(net, data)

    def keeps(model: Any, goal: Goal) -> tuple[bool, Loss]:
        lost = 2.0 * len(quant_layers(model))
        return lost <= 18, Loss(NEIGHBOURS, lost, 0)

    monkeypatch.setattr(judge, "keeps", keeps)
    chooser = Chooser(net, judge, everything(data)[:4], Goal(), lambda what, share: None)
    chooser.free = ladders(read(net))[1][-1]
    found = chooser._in_part(MinMax(), slim(net, MinMax(), chooser.calibrate))
    ((name, model),) = found.items()
    assert name == "EViT(keep=0.01, at=(3,)), MinMax of 4 of 9 parts" and 8 <= len(quant_layers(model)) <= 9
    assert str(history_of(model).steps()[0]).startswith("quant.MinMax(floats=(")
    monkeypatch.setattr(judge, "keeps", lambda *_: (False, Loss(NEIGHBOURS, 50, 0)))
    assert not chooser._in_part(MinMax(), slim(net, MinMax(), chooser.calibrate))


class Made:
    """A stand-in for a model made by steps, which only knows which."""

    def __init__(self, model: Any, step: Any) -> None:
        self.steps = [*(model.steps if isinstance(model, Made) else []), *(step if isinstance(step, list) else [step])]


def judged(monkeypatch: pytest.MonkeyPatch, goal: Goal, photos: Path, bad: tuple[type, ...] = ()) -> tuple[Chooser, list[str]]:
    """A chooser on a small model that embeds, for which `bad` steps lose everything, ToMe 10 a token, and the others 9 each."""
    net = small_vit()
    net.reset_classifier(0)
    data = open_data(photos, net)
    judge = Judge(net, data)
    tried: list[str] = []

    def keeps(model: Any, goal: Goal) -> tuple[bool, Loss]:
        tried.append(", ".join(map(str, model.steps)))
        lost = (
            100.0 if any(isinstance(s, bad) for s in model.steps) else float(sum(10 * getattr(s, "r", 0.9) for s in model.steps))
        )
        return lost <= goal.allowed(NEIGHBOURS), Loss(NEIGHBOURS, lost, 0)

    monkeypatch.setattr(judge, "keeps", keeps)
    monkeypatch.setattr(choose, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(choose, "slim", lambda model, step, *_: Made(model, step))
    monkeypatch.setattr(Chooser, "_in_part", lambda *_: {})
    return Chooser(net, judge, everything(data)[:4], goal, lambda what, share: None), tried


def test_the_judge_measures_features_by_their_neighbours(photos: Path) -> None:
    net = small_vit()
    net.reset_classifier(0)
    judge = Judge(net, open_data(photos, net))
    same = judge.loss(net)
    assert same.criterion is NEIGHBOURS and same.value == 0
    generator = torch.Generator().manual_seed(0)
    noise = lambda x: torch.randn(len(x), 48, generator=generator)
    assert judge.loss(noise).value > 60 and not judge.keeps(noise, Goal())[0]


def test_strongest_tokens_within_the_budget(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    from vitreous.tokens import EViT

    chooser, tried = judged(monkeypatch, Goal(budget=20), photos, bad=(EViT,))
    ways = chooser.tokens()
    assert ways[0] is not None and str(ways[0].step) == "tokens.ToMe(r=2)" and ways[-1] is None
    assert sum("EViT" in t for t in tried) == 4, "one for a family whose gentlest loses too much, two for one of three"


def test_both_ways_of_integers_are_tried_and_the_strongest_kept(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    options = list(judged(monkeypatch, Goal(budget=50), photos)[0].options())
    assert [o.rsplit(", ", 1)[-1] for o in options] == ["floats", "floats", "RepQ", "Auto"]
    assert options.pop(1) == "floats", "where bf16 may lose what the token step left"
    assert all(o.startswith("EViT(keep=0.2, at=(0,))") for o in options), "the least work, in all"
    chooser, tried = judged(monkeypatch, Goal(budget=50), photos, bad=(RepQ,))
    assert [o.rsplit(", ", 1)[-1] for o in chooser.options()] == ["floats", "floats", "Auto"]
    assert sum("RepQ" in t for t in tried) == 2, "with tokens that leave half of the budget first, and then alone"
    chooser, _ = judged(monkeypatch, Goal(budget=50), photos, bad=(RepQ, Auto))
    assert [o.rsplit(", ", 1)[-1] for o in chooser.options()] == ["floats", "floats"]
    chooser, _ = judged(monkeypatch, Goal(budget=0.0), photos)
    assert list(chooser.options()) == ["floats"] and any("too much" in note for note in chooser.notes)


def trial(name: str, ms: float, lost: float, size: int = 100, speedup: float = 1.0) -> Trial:
    runtime: Any = SimpleNamespace(engine="OpenVINO", bytes=size * 10**6)
    return Trial(name, Path(name), None, runtime, (ms, ms), (speedup,), Loss(ACCURACY, lost, 0.0))


def test_best_of_what_was_tried() -> None:
    known = lambda t: t.lost
    fast, middle, slow = trial("a", 1, 2.0, 10, 8), trial("b", 2, 0.6, 30, 4), trial("c", 3, 0.0, 20, 3)
    notes: list[str] = []
    assert best([fast, middle, slow], Goal(), notes, known) is middle, "the fastest within a point"
    assert best([fast, middle, slow], Goal(speedup=2.5), notes, known) is slow, "fast enough, and loses least"
    assert best([fast, middle, slow], Goal(latency=2.5), notes, known) is middle
    assert best([fast, middle, slow], Goal(megabytes=25), notes, known) is slow and not notes
    assert (
        best([fast, middle, slow], Goal(speedup=6), notes, known) is middle and "nothing within the budget reaches 6" in notes[-1]
    )
    assert best([fast, middle, slow], Goal(megabytes=5), notes, known) is slow and "5 MB" in notes[-1]
    assert best([fast, middle], Goal(budget=0.1), notes, known) is middle and "nothing keeps to the budget" in notes[-1]
