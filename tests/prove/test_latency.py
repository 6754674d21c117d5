import gc
import itertools

import numpy as np
import pytest
import torch

from vitreous.prove.latency import MOST_ROUNDS, PATIENCE, WARMUP, interleave, latencies


class Bench:
    """A clock that only moves when a model runs, and a record of who ran."""

    def __init__(self, **costs):
        self.now, self.calls, self.costs = 0.0, [], costs

    def runs(self):
        return {name: lambda name=name: self.run(name) for name in self.costs}

    def run(self, name):
        self.calls.append(name)
        cost = self.costs[name]
        self.now += next(cost) if hasattr(cost, "__next__") else cost

    def clock(self):
        return self.now


def test_each_has_its_turn_a_round_and_first_calls_are_discarded():
    cold_then_warm = itertools.chain([100.0] + [0.5] * (WARMUP - 1), itertools.cycle([0.5, 0.125]))
    bench = Bench(a=cold_then_warm, b=0.25, c=0.5)
    times = interleave(bench.runs(), rounds=20, clock=bench.clock)
    assert {name: t.tolist() for name, t in times.items()} == {"a": [0.125] * 20, "b": [0.25] * 20, "c": [0.5] * 20}
    calls = "".join(bench.calls).removeprefix("a" * WARMUP + "b" * WARMUP + "c" * WARMUP)
    turns = [calls[i : i + 6] for i in range(0, len(calls), 6)]
    assert len(turns) == 20 and all(sorted(t[::2]) == ["a", "b", "c"] and t[::2] == t[1::2] for t in turns)
    assert len(set(turns)) > 3  # nobody always follows the same one


def test_what_takes_seconds_is_not_run_twice_in_a_turn():
    bench = Bench(short=0.5, long=2.0)
    times = interleave(bench.runs(), rounds=6, clock=bench.clock)
    assert bench.calls.count("long") == 2 + 6 and bench.calls.count("short") == WARMUP + 2 * 6
    assert times["long"].tolist() == [2.0] * 6


@pytest.mark.parametrize(("cost", "seconds", "rounds"), [(0.5, 20, 18), (100, 20, 5), (1e-6, 20, 300)])
def test_rounds_fit_the_time(cost, seconds, rounds):
    bench = Bench(a=cost / 2, b=cost / 2)
    assert len(interleave(bench.runs(), seconds=seconds, clock=bench.clock)["a"]) == rounds
    if rounds == 18:
        assert bench.now == pytest.approx(seconds, abs=0.5)


def test_no_garbage_is_collected_meanwhile():
    seen = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=4)
    assert seen[WARMUP:] == [False] * 8 and gc.isenabled()


@pytest.mark.parametrize(("slower", "times"), [(0.54, 1), (1.0, PATIENCE)])
def test_it_goes_on_until_it_is_sure(monkeypatch, slower, times):
    """A model that now and then takes longer than the reference: by less than a tenth is sure enough."""
    bench = Bench(before=0.5, after=itertools.cycle([0.5, 0.5, slower, slower]))
    monkeypatch.setitem(interleave.__kwdefaults__, "clock", bench.clock)
    calls = {name: lambda x, name=name: bench.run(name) for name in bench.costs}
    found = latencies(calls, torch.zeros(1, 1, 2, 2), reference="before", batches=(1,), seconds=1e6)
    assert len(found["before"][0].samples) == len(found["after"][0].samples) == times * MOST_ROUNDS


def test_latencies_are_per_image_and_paired(monkeypatch):
    bench = Bench(slow=itertools.cycle([0.5, 0.5, 1.0, 1.0]), fast=itertools.cycle([0.125, 0.125, 0.25, 0.25]))
    seen = []

    def call(name):
        return lambda x: (seen.append(tuple(x.shape)), bench.run(name))

    timer = interleave.__kwdefaults__["clock"]
    monkeypatch.setitem(interleave.__kwdefaults__, "clock", bench.clock)
    found = latencies(
        {name: call(name) for name in bench.costs}, torch.zeros(3, 1, 2, 2), reference="slow", batches=(1, 8), rounds=6
    )
    assert timer is not bench.clock
    assert set(seen) == {(1, 1, 2, 2), (8, 1, 2, 2)}  # three images are repeated to make eight
    one, eight = found["fast"]
    assert one.batch == 1 and eight.batch == 8
    assert np.median(one.samples) == one.median == 187.5
    assert eight.median == one.median / 8
    assert one.ratio is not None and one.ratio.value == 4.0 and one.ratio.low == one.ratio.high == 4.0
    assert found["slow"][0].ratio is None
