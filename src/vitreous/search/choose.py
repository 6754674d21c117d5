"""Which models to ship: as few tokens as the budget allows, in floats and in the integers that still keep to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from ..quant.posttraining import PostTraining
from ..steps import Step, slim
from .budget import Goal, Loss, loss
from .partly import IMAGES, Mixer
from .ways import Way, ladders

BATCH = 32
RACE = 4  # the first 1/RACE of the images are enough to drop what loses far too much

STEPS = 8  # in so many steps the number of parts in integers grows
FEWEST = 3  # of these steps; fewer parts in integers are not worth the trouble
SHORT = 3  # steps in a ladder

INTEGERS: tuple[PostTraining, ...] = (RepQ(weights=8, activations=8), Auto(weights=8, activations=8))


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
    lost: dict[str, Loss] = field(default_factory=dict)
    """By each token step that was tried."""
    free: Way | None = None
    """Of the token steps tried the strongest that loses nothing, as in the last block where only the class token is read on."""

    def options(self) -> dict[str, nn.Module]:
        """Models that keep to the budget as torch computes them: in floats, and each way of integers; the original at least."""
        ways = self.tokens()
        found = {_name(ways[0], None): self._made(ways[0])}
        if multiplies_bf16() and ways[0] is not self.free:  # bf16 loses a little too, and what is within the budget may fall out
            found[_name(self.free, None)] = self._made(self.free)
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
            found = self._strongest([way for way in ladder if best is None or way.work < best[0].work])
            if found is not None:
                best = found, ladder
        if best is None:
            return [None]
        strongest, ladder = best
        gentler = min(ladder, key=lambda way: abs(way.work - (1 + strongest.work) / 2))
        return [strongest, *([gentler] if gentler is not strongest else []), None]

    def _strongest(self, ladder: Sequence[Way]) -> Way | None:
        """By bisection, for a gentler step loses less; None when even the gentlest loses too much. Of few the strongest is tried
        first, for models trained that way stand it."""
        found: Way | None = None
        low, high = 0, len(ladder) - 1  # the answer, if there is one, lies from low to high
        middle = 0 if len(ladder) <= SHORT else high
        while low <= high:
            try:
                keeps, lost = self.judge.keeps(slim(self.net, ladder[middle].step), self.goal)
            except VitreousError as reason:
                self.notes.append(f"{ladder[middle].step} left out: {reason}")
                return None
            self.notes.append(f"{ladder[middle].step}: {lost}{'' if keeps else ', too much'}")
            self.lost[str(ladder[middle].step)] = lost
            if keeps:
                found, high = ladder[middle], middle - 1
                if lost.value <= 0 and (self.free is None or found.work < self.free.work):
                    self.free = found
            elif middle == len(ladder) - 1:
                return None
            else:
                low = middle + 1
            middle = len(ladder) - 1 if found is None and middle == 0 else (low + high) // 2
        return found

    def _in_integers(self, method: PostTraining, ways: Sequence[Way | None]) -> dict[str, nn.Module]:
        """With the strongest token step that leaves it within the budget; when it loses too much by itself, parts of it."""
        nothing = self.free if self.free is not None and self.free.last else None
        order = [nothing, *(way for way in ways[:-1] if way is not nothing)]
        if ways[0] is not None and ways[0] is not nothing and self._leaves_half(ways[0]):
            order[:2] = [ways[0], nothing]
        alone: nn.Module | None = None
        for way in order:
            small, keeps = self._tried(_name(way, method), way, method)
            if way is nothing:
                if not keeps:
                    return self._in_part(method, small) if method is INTEGERS[-1] else {}
                alone = small
            elif keeps:
                return {_name(way, method): small}
        return {_name(nothing, method): alone} if alone else {}

    def _leaves_half(self, way: Way) -> bool:
        """Whether a token step leaves half of the budget to integers, so that they are likely to keep to it together."""
        lost = self.lost[str(way.step)]
        return lost.value <= self.goal.allowed(lost.criterion) / 2

    def _in_part(self, method: PostTraining, small: nn.Module) -> dict[str, nn.Module]:
        """The parts that harm least in integers, as many as keep to the budget, and with them a token step that loses nothing."""
        mixer = Mixer(self.net, small)
        images = self.judge.batches[0][0][:IMAGES]
        told = lambda share: self.progress("finding out which parts to leave in floats", share)
        order = mixer.gentlest_first(images, self.judge.original(self.judge.batches[0][0]), told)
        best, low, middle, high = 0, FEWEST, FEWEST, STEPS - 1  # the answer, if there is one, lies from low to high
        while low <= high:
            self.progress("what parts in integers lose", middle / STEPS)
            parts = order[: len(order) * middle // STEPS]
            keeps, lost = self.judge.keeps(mixer.mixed(parts), self.goal)
            self.notes.append(
                f"{type(method).__name__} of {len(parts)} of {len(order)} parts: {lost}{'' if keeps else ', too much'}"
            )
            best, low, high = (middle, middle + 1, high) if keeps else (best, low, middle - 1)
            middle = (low + high + 1) // 2
        for step in range(best, max(best - 2, FEWEST - 1), -1):  # calibrated alone it loses about the same, on either side
            parts = order[: len(order) * step // STEPS]
            part = replace(method, floats=tuple(p for p in mixer.weights if p not in parts))
            name = f"{type(method).__name__} of {len(parts)} of {len(order)} parts"
            if self.free is not None:
                name = f"{_name(self.free, None).removesuffix('floats')}{name}"
            made, keeps = self._tried(name, self.free, part)
            if keeps:
                return {name: made}
        return {}

    def _tried(self, name: str, way: Way | None, method: PostTraining) -> tuple[nn.Module, bool]:
        """The model with fewer tokens and in integers, and whether it keeps to the budget."""
        steps = [method] if way is None else [method, way.step] if way.last else [way.step, method]
        small = slim(self.net, steps, self.calibrate, lambda _, share: self.progress(f"calibrating {name}", share))
        self.progress(f"what {name} loses", 0.0)
        keeps, lost = self.judge.keeps(small, self.goal)
        self.notes.append(f"{name}: {lost}{'' if keeps else ', too much'}")
        return small, keeps

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
