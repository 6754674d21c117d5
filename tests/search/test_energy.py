"""Energy: the processor's counters where there are any, LPViT's model of power elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import small_vit
from torch import Tensor

from vitreous.prove.energy import Counters
from vitreous.prune import Heads, NViT, SparseThenPrune
from vitreous.prune.lpvit import power
from vitreous.quant import RepQ
from vitreous.search import space, trial
from vitreous.search.budget import Goal
from vitreous.search.predict import counted_power, shape
from vitreous.search.trial import Trial, best, timed
from vitreous.steps import slim
from vitreous.tokens import EViT


def zone(root: Path, name: str, kind: str, microjoules: int, most: int = 1000) -> Path:
    (root / name).mkdir()
    for file, text in (("name", kind), ("energy_uj", str(microjoules)), ("max_energy_range_uj", str(most))):
        (root / name / file).write_text(f"{text}\n")
    return root / name / "energy_uj"


def test_counters_add_up_packages_and_begin_again(tmp_path: Path) -> None:
    assert not Counters(tmp_path).there and Counters(tmp_path)() == 0
    first, second = zone(tmp_path, "intel-rapl:0", "package-0", 900), zone(tmp_path, "intel-rapl:1", "package-1", 0)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    psys = zone(tmp_path, "intel-rapl:2", "psys", 0)
    counters = Counters(tmp_path)
    for file, now in ((first, 100), (second, 50), (core, 70), (psys, 90)):
        file.write_text(str(now))
    assert counters.there and counters() == pytest.approx(250e-6), "the first began again at 1000, parts of packages count once"
    assert counters() == pytest.approx(250e-6)


def test_model_of_power_is_that_of_what_is_left(images: Tensor) -> None:
    net = small_vit()
    whole = power(net, images[:1])
    assert power(slim(net, EViT(keep=0.5)), images[:1]) == whole == power(slim(net, RepQ(), images), images[:1])
    fewer = slim(net, [Heads(share=0.5), NViT(keep=0.6, structures=("mlp",), rounds=1)], images)
    assert power(fewer, images[:1]) < 0.8 * whole
    assert power(slim(net, SparseThenPrune(share=0.5), images), images[:1]) > 0.9 * whole, "single zeros leave blocks as they are"
    blocks = sum(power(b, images.new_zeros(1, 17, 48)) for b in net.blocks)
    assert counted_power(shape(net, images)) == pytest.approx(blocks)


def run(name: str, joules: float, meter: list[float]) -> Trial:
    made: Any = Run(joules, meter)
    return Trial(name, Path(), None, made)


class Run:
    """Takes `joules` a call."""

    engine, bytes = "OpenVINO", 1

    def __init__(self, joules: float, meter: list[float]) -> None:
        self.joules, self.meter = joules, meter

    def __call__(self, x: Tensor) -> None:
        self.meter[0] += self.joules


def test_measured_beside_the_original(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    meter = [0.0]
    monkeypatch.setattr(trial, "Counters", lambda: Fake(meter))
    trials = [run("a", 1.0, meter), run("b", 2.0, meter)]
    net: Any = Run(4.0, meter)
    timed(trials, net, images, Goal(energy=0.3), lambda *_: None, 0.01)
    assert [t.energy for t in trials] == [0.25, 0.5]
    assert [t.reaches(Goal(energy=0.3)) for t in trials] == [True, False] and trials[0].cost(Goal(energy=0.3)) == 0.25


class Fake:
    there = True

    def __init__(self, meter: list[float]) -> None:
        self.meter = meter

    def __call__(self) -> float:
        return self.meter[0]


def test_modelled_where_there_are_no_counters(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    net, notes = small_vit(), []
    trials = [run("a", 1.0, [0.0])]
    trials[0].power = 0.5 * power(net, images[:1])
    timed(trials, net, images, Goal(energy=0.3), lambda *_: None, 0.01)
    assert trials[0].energy == pytest.approx(0.5)
    best(trials, Goal(energy=0.3), notes, lambda t: None)
    assert "reaches 0.3 of the energy: a in OpenVINO comes closest" in notes[0] and "0.5 of the energy" in notes[0]
    assert "not measured" in space.told_by()
    assert set(space.space(net, ["tokens", "mlp"], Goal(energy=0.5))) == {"tokens", "mlp"}
