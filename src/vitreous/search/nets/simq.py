"""SimQ-NAS: shape and bits of every layer in one search, by predictors that are fitted on what was measured.

Sridhar et al., "SimQ-NAS: Simultaneous Quantization Policy and Neural Architecture Search" (2023). The loop is LINAS: Cummings et
al., "A Hardware-Aware Framework for Accelerating Neural Architecture Search Across Modalities" (2022). Facts from the official
package, IntelLabs/DyNAS-T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy

from ...errors import VitreousError
from .evolve import Evolution, Genes, evolve

ALPHAS = np.arange(0.1, 10.1, 0.1)  # of ridge regression
COSTS = np.arange(1.0, 101.0)  # of support vector regression
FOLDS = 5


class OneHot:
    """Vectors of choices as zeros and ones: a column for each value that a gene had among those seen, in ascending order. A value
    never seen has none."""

    def __init__(self, seen: np.ndarray) -> None:
        self.values = [np.unique(column) for column in seen.T]

    def __call__(self, genes: np.ndarray) -> np.ndarray:
        return np.concatenate([(genes[:, i, None] == v).astype(float) for i, v in enumerate(self.values)], 1)


class Predictor:
    """Ridge regression or support vectors with a radial kernel, whichever has the smaller mean percentage error in 5-fold
    cross-validation over its strengths; features `[N, F]` to labels `[N]`, which are scaled to two digits before the point."""

    def __init__(self, x: np.ndarray, y: np.ndarray, quick: bool = False) -> None:
        try:
            from sklearn.linear_model import Ridge
            from sklearn.model_selection import GridSearchCV
            from sklearn.svm import SVR
        except ImportError:
            raise VitreousError("predicting networks needs scikit-learn: pip install 'vitreous[search]'") from None
        if len(x) < FOLDS:
            raise VitreousError(f"a predictor is fitted on {FOLDS} networks at least, not {len(x)}")
        largest = float(np.abs(y).max())
        self.scale = 10 ** (math.floor(math.log10(largest)) - 1.0) if largest > 0 else 1.0
        every = 10 if quick else 1  # of the strengths
        kinds: list[tuple[Any, dict[str, Any]]] = [
            (Ridge(), {"alpha": ALPHAS[::every]}),
            (SVR(kernel="rbf", gamma="auto", epsilon=0.0), {"C": COSTS[::every]}),
        ]
        found = [GridSearchCV(kind, grid, scoring="neg_mean_absolute_percentage_error", cv=FOLDS) for kind, grid in kinds]
        for search in found:
            search.fit(x, y / self.scale)
        self.best = max(found, key=lambda s: s.best_score_).best_estimator_

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.best.predict(x) * self.scale


def quality(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Mean error as a share of what was measured, and Kendall's τ."""
    guess, true = np.asarray(predicted, float), np.asarray(measured, float)
    rank: Any = scipy.stats.kendalltau(guess, true)
    return float(np.mean(np.abs(guess - true) / np.maximum(np.abs(true), 1e-12))), float(rank.statistic)


def linas(
    choices: Sequence[int],
    measure: Callable[[Genes], Sequence[float]],
    *,
    encode: Callable[[Genes], Genes] = lambda g: g,
    over: Callable[[Genes], float] | None = None,
    population: int = 50,
    rounds: int = 5,
    predicted: int = 40,
    seed: int = 0,
) -> Evolution:
    """Measure a random population, then `rounds` times: fit a predictor to each objective on all that was measured, let NSGA-II
    run `predicted` generations on the predictors alone, and measure its front (at most `population`).

    encode: to one vector for all that are the same network, as genes beyond the depth count for nothing. Published: a population
    of 50, 20,000 predictions a round, 5 to 20 rounds.
    """
    first = evolve(choices, measure, over=over, population=population, generations=1, seed=seed)
    found = Evolution({encode(g): v for g, v in first.found.items()})
    for turn in range(rounds):
        seen = np.array(list(found.found))
        if len(seen) < FOLDS:
            break  # so narrow a space is measured whole
        one_hot, values = OneHot(seen), np.array(list(found.found.values()))
        predictors = [Predictor(one_hot(seen), column, quick=True) for column in values.T]

        def predict(genes: Genes, one_hot: OneHot = one_hot, predictors: list[Predictor] = predictors) -> list[float]:
            row = one_hot(np.array([encode(genes)]))
            return [float(p(row)[0]) for p in predictors]

        start = found.front()[:population]
        likely = evolve(
            choices, predict, over=over, population=population, generations=predicted, mutation=max(0.02, 1 / len(choices)),
            ordered=True, start=start, seed=seed + turn + 1,
        )  # fmt: skip
        fresh = [g for g in dict.fromkeys(map(encode, likely.front())) if g not in found.found][:population]
        if not fresh:
            break
        for genes in fresh:
            found.found[genes] = tuple(map(float, measure(genes)))
    return found
