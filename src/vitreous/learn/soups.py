"""Model soups: average models that were fine-tuned apart from one start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.func import functional_call

from ..errors import VitreousError
from ..outputs import answer
from ..score import two
from .merging import Kitchen, MergingRule, State, mean_of, rule
from .objective import several


@rule
@dataclass(frozen=True)
class UniformSoup(MergingRule):
    """Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
    inference time" (ICML 2022): the mean of all."""

    def __call__(self, states: Sequence[State], kitchen: Kitchen) -> State:
        return mean_of(states)


@rule
@dataclass(frozen=True)
class GreedySoup(MergingRule):
    """Of the same paper, recipe 1: from the best model on, each next one joins if the average gets better on held-out images.

    Better is strict, as in the official code (the paper has "at least as good"); ties in the order are taken from the last. The
    soup is never worse there than the best model alone.
    """

    needs_data: ClassVar[bool] = True

    def __call__(self, states: Sequence[State], kitchen: Kitchen) -> State:
        assert kitchen.judge is not None
        alone = [kitchen.judge(s) for s in states]
        order = sorted(range(len(states)), key=lambda i: alone[i])[::-1]
        kept, best = [order[0]], alone[order[0]]
        soup = states[order[0]]
        for i in order[1:]:
            k = len(kept)
            candidate = mean_of([soup, states[i]], [k / (k + 1), 1 / (k + 1)])
            if (found := kitchen.judge(candidate)) > best:
                soup, best = candidate, found
                kept.append(i)
        said = ", ".join(f"{i + 1}: {100 * a:.1f} %" for i, a in enumerate(alone))
        kitchen.say(f"models alone {said}; kept {', '.join(str(i + 1) for i in kept)}: {100 * best:.1f} % on the held-out images")
        return soup


@rule
@dataclass(frozen=True)
class LearnedSoup(MergingRule):
    """Of the same paper: shares (a softmax) and a temperature, by gradient of the held-out cross-entropy.

    `steps` of AdamW over the held-out images; one share for the whole model.
    """

    needs_data: ClassVar[bool] = True
    steps: int = 100
    lr: float = 0.05

    def __call__(self, states: Sequence[State], kitchen: Kitchen) -> State:
        assert kitchen.model is not None and kitchen.batches is not None
        free, beta = torch.zeros(len(states), requires_grad=True), torch.zeros((), requires_grad=True)
        optimiser = torch.optim.AdamW([free, beta], lr=self.lr, weight_decay=0.0)
        done = 0
        while done < self.steps:
            for x, y in kitchen.batches():
                if y is None:
                    raise VitreousError("LearnedSoup needs labels on its held-out images")
                if several(y):
                    raise VitreousError("LearnedSoup needs one class an image, and these labels mark several: GreedySoup does")
                mixed = mean_of(states, free.softmax(0))
                mixed |= {k: mixed[k].detach() for k, _ in kitchen.model.named_buffers() if k in mixed}
                logits = two(answer(functional_call(kitchen.model, mixed, (x,))).float())
                loss = F.cross_entropy(beta.exp() * logits, y)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                done += 1
                if done == self.steps:
                    break
        shares = free.detach().softmax(0)
        kitchen.say("shares " + ", ".join(f"{s:.2f}" for s in shares))
        return mean_of(states, shares)
