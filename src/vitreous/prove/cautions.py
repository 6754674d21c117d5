"""Whether accuracy looks as if the labels were not the model's: at chance, or right but for another order of classes."""

from __future__ import annotations

import numpy as np
import scipy

from .statistics import wilson

LEAST = 30  # images below which nothing is said


def caution(name: str, decided: np.ndarray, truth: np.ndarray, classes: int) -> str:
    """A sentence about class numbers `decided` and `truth`, both `[N]`, or the empty string.

    Another order of the classes is looked for by the assignment of answers to labels that makes most of them right; half of the
    images choose it, so that chance does not, and the other half are counted.
    """
    if len(truth) < LEAST:
        return ""
    accuracy = wilson(int((decided == truth).sum()), len(truth))
    half = np.arange(len(truth)) % 2 == 0
    size = max(classes, int(decided.max()) + 1, int(truth.max()) + 1)
    confusion = np.zeros((size, size))
    np.add.at(confusion, (decided[half], truth[half]), 1)
    to = scipy.optimize.linear_sum_assignment(confusion, maximize=True)[1]
    ordered = wilson(int((to[decided[~half]] == truth[~half]).sum()), int((~half).sum()))
    if ordered.low > max(accuracy.high, 0.5 * ordered.value) and ordered.value > 1.5 * accuracy.value:
        return (
            f"The labels look permuted: {name!r} is right for {accuracy.value:.1%} of the images, and for {ordered.value:.1%} "
            "with its classes in another order. Tell the order of its outputs by `--classes`."
        ).replace("%", " %")
    if accuracy.low <= 1 / size and size > 1:
        return (
            f"{name!r} is right for {accuracy.value:.1%} of the images, no better than guessing one of {size} classes: check "
            "that its weights are loaded, that the labels are its own, and how pictures are prepared."
        ).replace("%", " %")
    return ""
