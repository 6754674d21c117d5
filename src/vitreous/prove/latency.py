"""Interleaved timing: every model once a round, in a new order each, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .statistics import Interval, median_ratio

WARMUP = 3
LEAST_ROUNDS, MOST_ROUNDS = 5, 300
LONG = 1.0  # seconds of a call that a cold cache or a spinning thread no longer changes
SURE = 1.1  # an interval narrower than this factor is good enough
PATIENCE = 3  # times the seconds that may be spent while one is wider


@dataclass(frozen=True)
class Latency:
    """Times of one model at one batch size, milliseconds an image; one sample a round, in the order they were taken."""

    batch: int
    median: float
    q1: float
    q3: float
    ratio: Interval | None
    """Times faster than the reference, the median of the per-round ratios; None for the reference itself."""
    samples: list[float]


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[float], None] = lambda fraction: None,
) -> dict[str, np.ndarray]:
    """Seconds that each of `runs` took in each round, `[rounds]` apiece.

    Each is called `WARMUP` times first, unrecorded. In a round each has its turn, in an order drawn from `seed`: it runs twice
    and the second is recorded, for the first meets a cache full of another model and threads that still spin for it, which is
    not how a model is used. What takes longer than `LONG` is called twice first, and once in a turn. Without `rounds`, there
    are as many as fit into `seconds` by the cost of the last warm-up, but 5 to 300.
    """
    names = list(runs)

    def timed(name: str) -> float:
        start = clock()
        runs[name]()
        return clock() - start

    turn, warm = {}, {}
    for name in names:
        for call in range(WARMUP):
            warm[name] = timed(name)
            if call and warm[name] > LONG:
                break
        turn[name] = 1 if warm[name] > LONG else 2
    if rounds is None:
        left = seconds - WARMUP * sum(warm.values())
        fit = math.floor(left / max(sum(turn[name] * warm[name] for name in names), 1e-9))
        rounds = min(max(fit, LEAST_ROUNDS), MOST_ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in names}
    order = np.random.default_rng(seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # as timeit does: a collection would be charged to whichever model it happens to hit
    try:
        for r in range(rounds):
            for i in order.permutation(len(names)):
                times[names[i]].append([timed(names[i]) for _ in range(turn[names[i]])][-1])
            tick((r + 1) / rounds)
    finally:
        if collecting:
            gc.enable()
    return {name: np.array(t) for name, t in times.items()}


def latencies(
    calls: Mapping[str, Callable[[Tensor], object]],
    images: Tensor,
    *,
    reference: str,
    batches: Sequence[int] = (1, 64),
    rounds: int | None = None,
    seconds: float = 20.0,
    seed: int = 0,
    tick: Callable[[float], None] = lambda fraction: None,
) -> dict[str, list[Latency]]:
    """A `Latency` for each model and each batch size; `seconds` is for all of them together.

    `images` `[n, C, H, W]` are repeated where a batch needs more than there are. Where a ratio stays unsure, because others use
    the machine, it goes on for up to three times as long.
    """
    found: dict[str, list[Latency]] = {name: [] for name in calls}
    for i, batch in enumerate(batches if calls else ()):
        x = images[torch.arange(batch) % len(images)].contiguous()
        runs = {name: partial(call, x) for name, call in calls.items()}
        with torch.inference_mode():
            times = _until_sure(
                runs, reference, rounds, seconds / len(batches), seed, lambda f, i=i: tick((i + f) / len(batches))
            )
        for name, t in times.items():
            ms = t * 1000 / batch
            q1, median, q3 = np.percentile(ms, (25, 50, 75))
            paired = name != reference and reference in times
            ratio = median_ratio(times[reference], t) if paired else None
            found[name].append(Latency(batch, float(median), float(q1), float(q3), ratio, ms.tolist()))
    return found


def _until_sure(
    runs: Mapping[str, Callable[[], object]],
    reference: str,
    rounds: int | None,
    seconds: float,
    seed: int,
    tick: Callable[[float], None],
) -> dict[str, np.ndarray]:
    """Rounds for `seconds`, and as many again while an interval is wide, up to `PATIENCE` times; or `rounds`, once."""
    times: dict[str, np.ndarray] = {}
    began = time.perf_counter()
    for turn in range(PATIENCE):
        more = interleave(runs, rounds=rounds, seconds=seconds, seed=seed + turn, tick=tick)
        times = {name: np.concatenate([times.get(name, t[:0]), t]) for name, t in more.items()}
        others = [t for name, t in times.items() if name != reference] if reference in times else []
        intervals = [median_ratio(times[reference], t) for t in others]
        late = time.perf_counter() - began > PATIENCE * seconds  # the fewest rounds may take longer than was meant
        if rounds is not None or late or all(r.high <= SURE * r.low for r in intervals):
            break
    return times
