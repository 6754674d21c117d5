"""Which models to ship: as few tokens as the budget allows, in floats and in the integers that still keep to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..data import Data
from ..errors import VitreousError
from ..outputs import embeds
from ..processor import multiplies_bf16
from ..prove import compare
from ..quant import Auto, RepQ
from ..steps import Step, slim
from .budget import Goal, Loss, loss
from .ways import Way, ladders

BATCH = 64
RACE = 4  # the first 1/RACE of the images are enough to drop what loses far too much

INTEGERS: tuple[Step, ...] = (RepQ(weights=8, activations=8), Auto(weights=8, activations=8))


class Judge:
    """Says what a model loses against the original on `data`, whose images and whose answers by the original it holds."""

    def __init__(self, net: nn.Module, data: Data) -> None:
        self.batches = [(x, y.numpy()) for x, y in data.batches(BATCH)]
        self.classes = data.classes
        x = self.batches[0][0]
        with torch.inference_mode():
            known = {id(x): net(x) for x, _ in self.batches}
        self.original: Callable[[Tensor], Any] = lambda x: known[id(x)]
        vars(self.original)["vitreous_embeds"] = embeds(net, x)

    def loss(self, model: Callable[[Tensor], Any], batches: int | None = None) -> Loss:
        """On the first `batches`, or on all."""
        models = {"original": self.original, "model": model}
        return loss(compare(models, self.batches[:batches], classes=self.classes)[0]["model"])

    def keeps(self, model: Callable[[Tensor], Any], budget: Goal) -> tuple[bool, Loss]:
        """Whether `model` keeps to the budget, and what it loses; soon, if it is far from that."""
        few = len(self.batches) // RACE
        if few:
            found = self.loss(model, few)
            if found.value - 3 * found.error > budget.allowed(found.criterion):
                return False, found
        found = self.loss(model)
        return found.within(budget.allowed(found.criterion)), found


@dataclass
class Chooser:
    """`options()`, by the recipe that made each; `notes` says in sentences what was tried and why it was left."""

    net: nn.Module
    judge: Judge
    calibrate: Tensor
    goal: Goal
    progress: Callable[[str, float], None]
    notes: list[str] = field(default_factory=list)

    def options(self) -> dict[str, nn.Module]:
        """Models that keep to the budget as torch computes them: in floats, and each way of integers; the original at least."""
        ways = self.tokens()
        found = {_name(ways[0], None): self._made(ways[0])}
        if self.goal.targets and len(ways) > 2:
            found[_name(ways[1], None)] = self._made(ways[1])
        for method in INTEGERS:
            self.progress(f"calibrating {type(method).__name__}", 0.0)
            try:
                found |= self._in_integers(method, ways)
            except VitreousError as reason:
                self.notes.append(f"{type(method).__name__} left out: {reason}")
            if _name(ways[0], method) in found and not multiplies_bf16():
                break  # Auto loses less than RepQ, but it leaves more in floats: ahead only where these are quick
        return found

    def tokens(self) -> list[Way | None]:
        """The strongest token step within the budget, one that removes about half as much, and None."""
        anatomy = read(self.net)
        reduced = any(len(getattr(self.net.get_submodule(b.name), "reducers", ())) for b in anatomy.blocks)
        if reduced or not anatomy.plain:
            self.notes.append(f"tokens left as they are: {self._why_no_tokens(reduced)}")
            return [None]
        best: tuple[Way, list[Way]] | None = None
        families = ladders(anatomy)
        for i, ladder in enumerate(families):
            self.progress("choosing how many tokens to keep", i / len(families))
            found = self._strongest(ladder)
            if found is not None and (best is None or found.work < best[0].work):
                best = found, ladder
        if best is None:
            return [None]
        strongest, ladder = best
        gentler = min(ladder, key=lambda way: abs(way.work - (1 + strongest.work) / 2))
        return [strongest, *([gentler] if gentler is not strongest else []), None]

    def _strongest(self, ladder: Sequence[Way]) -> Way | None:
        """By bisection, for a gentler step loses less; None when even the gentlest loses too much."""
        found: Way | None = None
        low, high = 0, len(ladder) - 1  # the answer, if there is one, lies from low to high
        middle = high
        while low <= high:
            try:
                keeps, lost = self.judge.keeps(slim(self.net, ladder[middle].step), self.goal)
            except VitreousError as reason:
                self.notes.append(f"{ladder[middle].step} left out: {reason}")
                return None
            self.notes.append(f"{ladder[middle].step}: {lost}{'' if keeps else ', too much'}")
            if keeps:
                found, high = ladder[middle], middle - 1
            elif middle == len(ladder) - 1:
                return None
            else:
                low = middle + 1
            middle = (low + high) // 2
        return found

    def _in_integers(self, method: Step, ways: Sequence[Way | None]) -> dict[str, nn.Module]:
        """With the strongest token step that leaves it within the budget; nothing when it loses too much by itself."""
        alone: tuple[bool, nn.Module] | None = None
        for way in [None] if ways[0] is None else [None, *ways[:-1]]:
            told = lambda _, share, way=way: self.progress(f"calibrating {_name(way, method)}", share)
            small = slim(self._made(way), method, self.calibrate, told)
            self.progress(f"what {_name(way, method)} loses", 0.0)
            keeps, lost = self.judge.keeps(small, self.goal)
            self.notes.append(f"{_name(way, method)}: {lost}{'' if keeps else ', too much'}")
            if way is None:
                if not keeps:
                    return {}
                alone = keeps, small
            elif keeps:
                return {_name(way, method): small}
        return {_name(None, method): alone[1]} if alone else {}

    def _made(self, way: Way | None) -> nn.Module:
        return self.net if way is None else slim(self.net, way.step)

    def _why_no_tokens(self, reduced: bool) -> str:
        try:
            read(self.net).require_plain("a token step")
        except VitreousError as reason:
            return str(reason)
        return "the model already drops or merges some" if reduced else "its blocks are not plain"


def _name(way: Way | None, method: Step | None) -> str:
    parts = [str(way.step).split(".", 1)[1]] if way else []
    parts.append(type(method).__name__ if method else "floats")
    return ", ".join(parts)
