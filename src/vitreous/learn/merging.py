"""Merge models that were trained apart: the contract of a merging rule, and `merge`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import VitreousError
from .batches import Pair, in_turn
from .measure import accuracy_on

RULES: dict[str, type[MergingRule]] = {}
Kind = TypeVar("Kind", bound="type[MergingRule]")
State = dict[str, Tensor]


@dataclass
class Kitchen:
    """What a rule may use beside the state dicts: names of the weights of linear layers and of parameters of modules that have
    children, the model they came from, how good a state dict is on held-out images (a share), and notes for people."""

    linear: frozenset[str]
    base: State | None = None
    roots: frozenset[str] = frozenset()
    judge: Callable[[State], float] | None = None
    model: nn.Module | None = None
    batches: Callable[[], Any] | None = None
    notes: list[str] | None = None

    def say(self, line: str) -> None:
        if self.notes is not None:
            self.notes.append(line)


@dataclass(frozen=True)
class MergingRule:
    """A published way to make one state dict of several: a frozen dataclass under `@rule`.

    It is called with state dicts of floating-point tensors alone, of equal names and shapes; `merge` copies the rest.
    """

    needs_base: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def __call__(self, states: Sequence[State], kitchen: Kitchen) -> State:
        raise VitreousError(f"{type(self).__name__} does not say how to merge")


def rule(cls: Kind) -> Kind:
    """Class decorator: register a merging rule under its name."""
    RULES[cls.__name__] = cls
    return cls


def mean_of(states: Sequence[State], shares: Sequence[float] | Tensor | None = None) -> State:
    """Σ shares · states; their mean without shares."""
    weights = [1 / len(states)] * len(states) if shares is None else list(shares)
    return {k: torch.stack([w * s[k] for w, s in zip(weights, states, strict=True)]).sum(0) for k in states[0]}


def merge(
    models: Sequence[nn.Module],
    rule: MergingRule,
    *,
    base: nn.Module | None = None,
    data: Data | Pair | None = None,
    notes: list[str] | None = None,
) -> nn.Module:
    """One model of several of the same shape, in eval mode; none of the arguments is touched.

    Args:
        base: the model that all were fine-tuned from, for rules that add up what each learnt.
        data: held-out labelled images, for rules that try (never those that the result is measured on); batch norms are
            re-estimated on it where the model has any.
        notes: gets what the rule has to say: what it kept, how good each was.

    Integer buffers are those of the first model. Raises `VitreousError` for fewer than two models, other shapes, and a base or
    data that the rule needs and lacks.
    """
    if len(models) < 2:
        raise VitreousError(f"there is nothing to merge in {len(models)} model: give at least two")
    states: list[State] = [m.state_dict() for m in models]
    begin: list[State] = [base.state_dict()] if base is not None else []
    for i, state in enumerate([*states[1:], *begin], 1):
        who = f"model {i + 1}" if i < len(models) else "the base"
        for name in states[0].keys() | state.keys():
            a, b = states[0].get(name), state.get(name)
            if a is None or b is None or a.shape != b.shape:
                said = " and ".join("nothing" if t is None else str(list(t.shape)) for t in (a, b))
                raise VitreousError(
                    f"{who} differs from the first at '{name}' ({said}): merge models of one architecture and head"
                )
    name = type(rule).__name__
    if rule.needs_base and base is None:
        raise VitreousError(f"{name} adds up what each model learnt, so it needs the model they came from: give base=")
    if rule.needs_data and data is None:
        raise VitreousError(f"{name} tries models on held-out images: give data=")
    floats = [{k: v.detach().cpu() for k, v in s.items() if v.is_floating_point()} for s in states]
    merged = copy.deepcopy(models[0]).cpu().eval()
    rest = {k: v for k, v in states[0].items() if k not in floats[0]}

    def filled(state: State) -> nn.Module:
        merged.load_state_dict({**state, **rest})
        if data is not None:
            _reestimate(merged, data)
        return merged

    def judge(state: State) -> float:
        found = accuracy_on(filled(state), data) if data is not None else None
        if found is None:
            raise VitreousError(f"{name} needs labels on its held-out images")
        return found

    linear = {f"{n}.weight" for n, m in models[0].named_modules() if isinstance(m, nn.Linear)}
    linear |= {f"{n}.in_proj_weight" for n, m in models[0].named_modules() if isinstance(m, nn.MultiheadAttention)}
    begun = {k: v.detach().cpu() for k, v in begin[0].items() if k in floats[0]} if begin else None
    holders = [(n, m) for n, m in models[0].named_modules() if [*m.children()]]
    roots = frozenset(f"{n}.{p}".strip(".") for n, m in holders for p, _ in m.named_parameters("", False))
    held = None if data is None else lambda: in_turn(data)
    kitchen = Kitchen(
        frozenset(linear),
        begun,
        roots,
        judge,
        model=merged,
        batches=held,
        notes=notes,
    )
    return filled(rule(floats, kitchen))


@torch.no_grad()
def _reestimate(model: nn.Module, data: Data | Pair) -> None:
    """Batch norms anew, as the plain mean over `data`: averaged weights do not have averaged statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momentum = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    for x, _ in in_turn(data):
        model(x)
    for m, was in zip(norms, momentum, strict=True):
        m.momentum = was
        m.eval()
