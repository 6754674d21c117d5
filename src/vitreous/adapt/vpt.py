"""Visual prompt tuning: a few learned tokens in each block, and nothing else of the backbone learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..anatomy import read
from ..blocks import plain_blocks
from ..errors import VitreousError
from ..steps import Step, step
from .frozen import after_integers, learn_only

OWN_ATTENTION = ("tokens.Sparsifiner", "tokens.SemanticTokens")


@step("adapt")
@dataclass(frozen=True)
class VPT(Step):
    """Jia et al., "Visual Prompt Tuning" (ECCV 2022), deep: `prompts` learned tokens enter each block and are dropped after it.

    Prompts, the classifier and, with `biases`, all biases (Ben Zaken et al., "BitFit", ACL 2022) go on learning; the rest is
    frozen. `biases=True` with ten prompts is the feature path of Ren et al., "Learning Semantic Proxies from Visual Prompts for
    Parameter-Efficient Fine-Tuning in Deep Metric Learning" (ICLR 2024); see `adapt.Embed` and `learn.SemanticProxies`.

    What becomes of a prompt in its block is read by nobody, so only its keys and values are computed: exactly what the paper
    computes, for less. They have no place where attention knows places. New prompts are random, from a fixed seed, until they are
    trained. Comes before quantization; deployable.
    """

    prompts: int = 10
    biases: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.prompts <= 1000:
            raise VitreousError(f"adapt.VPT: prompts must lie in 1 to 1000, not {self.prompts}")

    def refuse_after(self, done: Sequence[Step]) -> str:
        if any(isinstance(s, VPT) for s in done):
            return "each block has its prompts already: ask for more of them at once"
        if any(s.name in OWN_ATTENTION for s in done):
            return "its own attention would not see prompts"
        return after_integers(done)

    def refuse_before(self, following: Step) -> str:
        return "its own attention would not see the prompts" if following.name in OWN_ATTENTION else ""

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        anatomy = read(model)
        blocks = plain_blocks(model, self.name)
        head = model.get_submodule(anatomy.classifier).parameters() if anatomy.classifier else ()
        biases = [p for n, p in model.named_parameters() if n.rsplit(".")[-1] == "bias"] if self.biases else []
        for block in blocks:
            block.prompts = new_prompts(model, self.prompts, next(block.parameters()))
        learn_only(model, [b.prompts for b in blocks if b.prompts is not None] + [*head, *biases])


def new_prompts(model: nn.Module, prompts: int, like: torch.Tensor) -> nn.Parameter:
    """`[prompts, C]`, drawn as in the official code: uniform within √(6 / (numbers in a patch + C))."""
    width = read(model).width
    assert width is not None
    patch = next((m.weight[0].numel() for m in model.modules() if isinstance(m, nn.Conv2d)), width)
    bound = math.sqrt(6 / (patch + width))
    return nn.Parameter(torch.empty(prompts, width).uniform_(-bound, bound).to(like))
