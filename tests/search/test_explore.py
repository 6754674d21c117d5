"""The search beyond the chooser: what is combined, in which order, what is kept and refused. Runtimes are stood in for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from searching import ABOUT, Tried
from support import small_vit
from torch import Tensor

from vitreous.errors import VitreousError
from vitreous.prune import NViT
from vitreous.quant import RepQ
from vitreous.search.budget import Goal
from vitreous.search.front import Point, drawn, front, written
from vitreous.search.predict import Predictor, joined, shape, work
from vitreous.search.record import Record
from vitreous.search.space import space
from vitreous.steps import Recipe, slim
from vitreous.tokens import EViT, ToMe


class TestRecord:
    def test_a_line_that_was_being_written_is_cut_off(self, tmp_path: Path) -> None:
        record = Record(tmp_path / "r.jsonl", ABOUT)
        record.add("trial", "x", {"ms": 1})
        with record.path.open("ab") as file:
            file.write(b'{"kind": "trial", "key": "y", "val')
        again = Record(record.path, ABOUT)
        assert again.get("trial", "x") == {"ms": 1} and again.get("trial", "y") is None
        again.add("trial", "y", 2)
        assert Record(record.path, ABOUT).all("trial") == {"x": {"ms": 1}, "y": 2}

    def test_of_something_else(self, tmp_path: Path) -> None:
        Record(tmp_path / "r.jsonl", ABOUT)
        with pytest.raises(VitreousError, match="another model"):
            Record(tmp_path / "r.jsonl", ABOUT | {"model": "c"})
        for text, said in (("{}\n", "no record"), ("not json\n", "not JSON"), ("", "no record")):
            (tmp_path / "w.jsonl").write_text(text)
            with pytest.raises(VitreousError, match=said):
                Record(tmp_path / "w.jsonl", ABOUT)


class TestSpace:
    def test_axes_of_a_plain_model(self) -> None:
        found = space(small_vit(), None, Goal())
        assert set(found) == {"tokens", "heads", "mlp", "bits", "runtime"}
        assert [s.keep for s in found["tokens"][0]] == sorted((s.keep for s in found["tokens"][0]), reverse=True), "gentle first"

    def test_refusals(self, images: Tensor) -> None:
        import timm

        net = small_vit()
        for axes, goal, said in (
            (["token"], Goal(), "did you mean tokens"),
            ([], Goal(), "needs an axis"),
            (["bits", "runtime"], Goal(macs=1e6), "none of the axes bits, runtime changes macs"),
            (["tokens"], Goal(megabytes=1), "changes megabytes"),
        ):
            with pytest.raises(VitreousError, match=said):
                space(net, axes, goal)
        with pytest.raises(VitreousError, match=r"no axis 'tokens'.*drops or merges"):
            space(slim(net, EViT(keep=0.5)), ["tokens"], Goal())
        with pytest.raises(VitreousError, match=r"quantized already by quant\.RepQ"):
            space(slim(net, RepQ(), images), None, Goal())
        swin = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), embed_dim=24, num_heads=(1, 2)
        ).eval()
        with pytest.raises(VitreousError, match="no axis 'heads'"):
            space(swin, ["heads"], Goal())
        assert set(space(swin, None, Goal())) == {"bits", "runtime"}


# ---- latency


def test_shapes_of_several_axes_are_those_of_each(images: Tensor) -> None:
    net = small_vit()
    steps = {"tokens": ToMe(r=2), "mlp": NViT(keep=0.8, structures=("mlp",), rounds=1)}
    apart = {axis: shape(slim(net, s, images), images) for axis, s in steps.items()}
    whole = shape(net, images)
    assert (apart["tokens"][1:, 0] < whole[1:, 0]).all() and (apart["mlp"][:, 6] <= whole[:, 6]).all()
    together = shape(slim(net, [steps["mlp"], steps["tokens"]], images), images)
    np.testing.assert_array_equal(joined(whole, apart), together)


def test_latency_of_what_was_not_measured_is_told_from_what_was() -> None:
    """Time that is a sum over kinds of work is found again from nine shapes, by less than 5 % on others; MACs are not enough."""
    draw = np.random.default_rng(0)
    cost = np.array([2e-9, 1e-9, 8e-9, 2e-8, 3e-8, 0, 0.3])

    def some() -> np.ndarray:
        n, h, u = draw.integers(40, 200), draw.integers(1, 7), draw.integers(100, 1600)
        return np.array([[n, n, 384, h, 64 * h, 64 * h, u]] * 6, float)

    known, others = [some() for _ in range(9)], [some() for _ in range(20)]
    guess = Predictor()
    for rows in known:
        guess.learn("a", rows, float(work(rows) @ cost))
    errors = [abs((guess("a", rows, "a") or 0) / float(work(rows) @ cost) - 1) for rows in others]
    assert np.mean(errors) < 0.05
    by_macs = [work(rows)[:3].sum() * float(work(known[0]) @ cost) / work(known[0])[:3].sum() for rows in others]
    assert np.mean([abs(m / float(work(r) @ cost) - 1) for m, r in zip(by_macs, others)]) > 0.1
    guess.learn("b", known[0], 0.5 * float(work(known[0]) @ cost))
    assert guess("b", others[0], "a") == pytest.approx(0.5 * float(work(others[0]) @ cost), rel=0.1), "as its relative, by halves"
    assert guess("c", known[0], "c") is None


# ---- the whole of it


def test_a_search_goes_on_where_it_was_and_repeats_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Tensor
) -> None:
    goal = Goal(budget=1.5)
    first = Tried(monkeypatch, goal, images)
    explorer, _ = first.search(tmp_path, 1)
    assert len(first.made) == len(set(first.made)) == 3, "the original, the chooser's, and one more"
    second = Tried(monkeypatch, goal, images)
    monkeypatch.setattr(second, "options", lambda: pytest.fail("chosen again"))
    explorer, models = second.search(tmp_path, 4)
    assert not set(first.made) & set(second.made) and len(second.made) == len(set(second.made))
    points = explorer.points()
    on = front(points, goal)
    assert [p.lost for p in on] == sorted(p.lost for p in on) and [p.ms for p in on] == sorted((p.ms for p in on), reverse=True)
    best = min((p for p in points if p.lost <= 1.5), key=lambda p: p.ms)
    assert len(best.steps) > 1 and best.engine == "OpenVINO", "steps together, in the runtime that is ahead"
    assert str(Recipe(best.steps)) in models and "no step" in models
    assert "mean error" in explorer.accuracy()
    written(on, tmp_path)
    rows = json.loads((tmp_path / "front.json").read_text())
    assert [Recipe.read(tmp_path / r["recipe"]).steps for r in rows] == [p.steps for p in on]
    assert "budget" in drawn(points, goal, 1.5, "title")


def test_with_a_limit_it_looks_for_what_reaches_it_and_loses_least(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Tensor
) -> None:
    tried = Tried(monkeypatch, Goal(budget=1.5), images)
    chosen = 1e-6 * float(work(shape(slim(tried.net, ToMe(r=1)), images))[:5].sum()) / 2
    tried.goal = goal = Goal(budget=1.5, latency=0.97 * chosen)
    explorer, _ = tried.search(tmp_path, 3)
    reached = [p for p in explorer.points() if p.first <= goal.latency]
    assert reached and min(p.lost for p in reached) < 1.5


def test_front_and_what_it_costs() -> None:
    def point(ms: float, lost: float, size: int) -> Point:
        return Point((), "OpenVINO", ms, ms, lost, 0.1, "points", size, 1, None, None)

    a, b, c = point(3, 0, 9), point(2, 1, 10), point(2.5, 2, 8)
    assert front([c, b, a], Goal()) == [a, b] and front([a, b, c], Goal(megabytes=1)) == [a, c]
