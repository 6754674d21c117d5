"""Intervals for paired measurements: everything here is 95 %, and what is random takes a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy

RESAMPLES = 10_000
TAILS = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """A figure and the 95 % interval around it, in the unit of the figure."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int) -> Interval:
    """The share `successes / n` with Wilson's score interval (Wilson 1927)."""
    around = scipy.stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return Interval(successes / n, float(around.low), float(around.high))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of McNemar's test: `lost` pairs went from right to wrong, `gained` from wrong to right.

    Under the null hypothesis each pair that changed is a fair coin (McNemar 1947); 1.0 when none changed.
    """
    return float(scipy.stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def paired_difference(lost: int, gained: int, n: int, seed: int = 0) -> Interval:
    """The accuracy difference `(gained - lost) / n` of two models on the same `n` images, by the paired bootstrap.

    Resampling pairs with replacement is drawing the three counts from a multinomial, so no pair is touched. Half a pair
    is added to each cell of the 2x2 table first (Agresti & Min 2005): a plain bootstrap says "exactly zero" when no
    answer changed, and covers too little when few did.
    """
    cells = np.array([lost + 0.5, n - lost - gained + 1, gained + 0.5])
    draws = np.random.default_rng(seed).multinomial(n, cells / cells.sum(), size=RESAMPLES)
    low, high = np.percentile((draws[:, 2] - draws[:, 0]) / n, TAILS)
    return Interval((gained - lost) / n, float(low), float(high))


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of `values` `[N]` with its percentile bootstrap interval (Efron 1979)."""
    return _bootstrap(np.asarray(values, float), np.mean, seed)


def median_ratio(reference: np.ndarray, other: np.ndarray) -> Interval:
    """How many times faster `other` is: the median over rounds of `reference[r] / other[r]`, both `[rounds]`.

    The ratio is taken inside each round, so that a machine that slows down for a while slows both down. The interval is that of
    the order statistics (Conover 1999, section 3.2), right for any distribution and as few rounds as six; of fewer it is the
    range of all.
    """
    ratios = np.sort(np.asarray(reference, float) / np.asarray(other, float))
    k = max(int(scipy.stats.binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)  # P(fewer than k + 1 ratios below the median) < 0.025
    return Interval(float(np.median(ratios)), float(ratios[k]), float(ratios[len(ratios) - 1 - k]))


def _bootstrap(values: np.ndarray, statistic, seed: int) -> Interval:
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(statistic(values[picks], axis=1), TAILS)
    return Interval(float(statistic(values)), float(low), float(high))
