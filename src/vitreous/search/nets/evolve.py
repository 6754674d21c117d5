"""The one evolutionary loop: pymoo's NSGA-II over vectors of choices; with one objective it keeps the best of all history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import VitreousError

Genes = tuple[int, ...]
TRIES = 200  # random draws for each individual that is wanted at the start


@dataclass
class Evolution:
    """What was measured, `{genes: objectives}`, all of which are to be small."""

    found: dict[Genes, tuple[float, ...]] = field(default_factory=dict)

    def front(self) -> list[Genes]:
        """Those that no other beats in every objective, by the first objective."""
        order = sorted(self.found, key=lambda g: (self.found[g], g))
        return [g for g in order if not any(_beats(self.found[h], self.found[g]) for h in order)]

    def best(self) -> Genes:
        """The least of the first objective."""
        return min(self.found, key=lambda g: (self.found[g], g))


def evolve(
    choices: Sequence[int],
    measure: Callable[[Genes], Sequence[float]],
    *,
    over: Callable[[Genes], float] | None = None,
    generations: int = 20,
    population: int = 50,
    mutation: float = 0.2,
    ordered: bool = False,
    start: Sequence[Genes] = (),
    seed: int = 0,
) -> Evolution:
    """Look for vectors of choices whose `measure` is small, none measured twice.

    Args:
        choices: how many there are for each gene; genes are numbers from 0.
        measure: objectives of a vector.
        over: by how much it breaks a constraint, 0 or less where it keeps to all. Such vectors are not measured.
        mutation: probability that a gene changes.
        ordered: whether neighbouring numbers are alike, as widths are: then children come from simulated binary crossover (η 15,
            probability 0.9) and polynomial mutation (η 20), rounded (Deb et al., 2002), else from uniform crossover and genes
            drawn anew.
        start: vectors to begin with; the rest of the first population is random, of those that keep to the constraints.

    Raises `VitreousError` without pymoo, and where nothing that keeps to the constraints is found.
    """
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.mutation import Mutation
        from pymoo.core.problem import ElementwiseProblem
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.crossover.ux import UX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.optimize import minimize
    except ImportError:
        raise VitreousError("searching networks needs pymoo: pip install 'vitreous[search]'") from None

    found, sizes = Evolution(), np.array(choices)
    draw = np.random.default_rng(seed)
    excess = over or (lambda genes: 0.0)

    class Problem(ElementwiseProblem):
        def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            genes = tuple(int(g) for g in x)
            out["G"] = [excess(genes)]
            if out["G"][0] <= 0 and genes not in found.found:
                found.found[genes] = tuple(map(float, measure(genes)))
            out["F"] = found.found.get(genes, (np.inf,) * objectives)

    class Redraw(Mutation):
        def _do(self, problem: Any, X: Any, **kwargs: Any) -> Any:
            return np.where(draw.random(X.shape) < mutation, draw.integers(0, sizes, X.shape), X)

    first = [tuple(g) for g in start]
    for _ in range(TRIES * population):
        if len(first) >= population:
            break
        genes = tuple(draw.integers(0, sizes).tolist())
        if excess(genes) <= 0 and genes not in first:
            first.append(genes)
    while len(first) < population:  # a narrow space: what breaks the constraints least is where children start from
        first.append(min((tuple(draw.integers(0, sizes).tolist()) for _ in range(20)), key=excess))
    known = next((g for g in first if excess(g) <= 0), None)
    objectives = len(tuple(measure(known))) if known is not None else 1
    problem = Problem(n_var=len(sizes), n_obj=objectives, n_ieq_constr=1, xl=0, xu=sizes - 1, vtype=int)
    operators: dict[str, Any] = (
        dict(
            crossover=SBX(prob=0.9, eta=15, vtype=float, repair=RoundingRepair()),
            mutation=PM(prob=1.0, prob_var=mutation, eta=20, vtype=float, repair=RoundingRepair()),
        )
        if ordered
        else dict(crossover=UX(prob=0.5), mutation=Redraw(prob=1.0))
    )
    operators["sampling"] = np.array(first)
    algorithm = NSGA2(pop_size=population, **operators)
    minimize(problem, algorithm, ("n_gen", generations), seed=seed, verbose=False)
    if not found.found:
        closest = min(first, key=excess)
        raise VitreousError(
            f"no network within the limits was found; of those tried the closest is over by {excess(closest):.3g}"
        )
    return found


def _beats(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)
