"""Experts weights averaging: a mixture without a router while training, the plain model afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from .objective import Batch, Now, Objective, Seen, objective, share


class Experts(nn.Module):
    """Copies of one MLP. In training the tokens of the batch are dealt out evenly at random, one expert each; in evaluation the
    MLP is the experts' mean, as it will be."""

    def __init__(self, mlp: nn.Module, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, *(copy.deepcopy(mlp) for _ in range(experts - 1))])

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return torch.func.functional_call(self.experts[0], dict(self.mean()), (x,))
        tokens = x.flatten(0, -2)
        order = torch.randperm(len(tokens)).to(x.device)
        dealt = order.tensor_split(len(self.experts))
        out = torch.cat([e(tokens[place]) for e, place in zip(self.experts, dealt, strict=True)])
        return torch.empty_like(out).index_copy(0, order, out).view(*x.shape[:-1], -1)

    def mean(self) -> Iterator[tuple[str, Tensor]]:
        for name, _ in self.experts[0].named_parameters():
            yield name, torch.stack([e.get_parameter(name) for e in self.experts]).mean(0)

    @torch.no_grad()
    def average(self, share: float) -> None:
        """W_i ← (1 − share) W_i + share · mean of the others: their mean stays what it was."""
        for name, _ in self.experts[0].named_parameters():
            all_of_them = torch.stack([e.get_parameter(name) for e in self.experts])
            others = (all_of_them.sum(0) - all_of_them) / (len(self.experts) - 1)
            for e, own, other in zip(self.experts, all_of_them, others, strict=True):
                e.get_parameter(name).copy_((1 - share) * own + share * other)


def with_experts(model: nn.Module, experts: int = 4, every: int = 2) -> nn.Module:
    """A copy of `model` whose every `every`-th MLP is `experts` copies of itself; train it with `EWA`, then `merged`.

    Huang et al., "Experts Weights Averaging: A New General Training Scheme for Vision Transformers" (2023).
    """
    if experts < 2 or every < 1:
        raise VitreousError(f"EWA needs at least two experts in every block or every few, not {experts} in every {every}")
    new = copy.deepcopy(model)
    found = [b for b in read(new).blocks if b.mlp]
    if len(found) < every:
        raise VitreousError(f"EWA wants the MLP of every {every}th block, and {type(model).__name__} has {len(found)} with one")
    for block in found[every - 1 :: every]:
        holder = new.get_submodule(block.name)
        setattr(holder, cast(str, block.mlp), Experts(cast(nn.Module, getattr(holder, cast(str, block.mlp))), experts))
    return new


def merged(model: nn.Module) -> nn.Module:
    """A copy of `model` with the mean of its experts in their place: the architecture that it was made of."""
    new = copy.deepcopy(model)
    for name, experts in list(new.named_modules()):
        if isinstance(experts, Experts):
            mlp = cast(nn.Module, experts.experts[0])
            with torch.no_grad():
                for part, mean in experts.mean():
                    mlp.get_parameter(part).copy_(mean)
            parent, _, child = name.rpartition(".")
            setattr(new.get_submodule(parent), child, mlp)
    return new


@objective
@dataclass(frozen=True)
class EWA(Objective):
    """After each step the experts of `with_experts` move towards the mean of the others, by a share that rises linearly to `most`
    over the run. The states of the optimiser are not averaged. No loss of its own: add one.

    The paper has no code; how the share rises and that the optimiser is left alone is our reading.
    """

    wants = ()
    most: float = 0.3

    def __post_init__(self) -> None:
        share(self, "most")

    def after_step(self, now: Now) -> None:
        for module in now.model.modules():
            if isinstance(module, Experts):
                module.average(self.most * now.share)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        return {}
