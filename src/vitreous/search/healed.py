"""With time to heal: more tokens are taken than the budget allows untrained, and as many stay away as it allows once taught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from ..steps import slim
from .budget import Goal
from .choose import Chooser, Judge

MORE = 4.0  # times the budget that a token step may lose before it is healed


def healed_options(
    net: nn.Module,
    judge: Judge,
    calibrate: Tensor,
    goal: Goal,
    heal: Callable[[nn.Module], nn.Module],
    progress: Callable[[str, float], None],
    log: list[str],
) -> dict[str, nn.Module]:
    """Models that keep to the budget, by the recipe that made each: the strongest token step that `heal` brings within it, in
    floats and in integers; without such a step what is chosen without healing."""
    budget = goal.allowed(judge.loss(net, 1).criterion)
    loose = replace(goal, budget=MORE * budget)
    for way in Chooser(net, judge, calibrate, loose, progress, log).tokens():
        if way is None:
            break
        small = heal(slim(net, way.step))
        keeps, lost = judge.keeps(small, goal)
        name = f"{str(way.step).split('.', 1)[1]}, healed"
        log.append(f"{name}: {lost}{'' if keeps else ', too much'}")
        if keeps:
            return {f"{name}, {n}": m for n, m in Chooser(small, judge, calibrate, goal, progress, log).options().items()}
    log.append("healing brought no token step within the budget: nothing is healed")
    return Chooser(net, judge, calibrate, goal, progress, log).options()
