"""Bridge blocks: where convolution and transformer meet in a hybrid model, found and run alone."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..anatomy import attention_names
from .layers import FakeQuantizer

FEW = 4  # images at a time
BORDER_IMAGES = 8  # images that run through bridge blocks


def running_order(model: nn.Module, image: Tensor) -> list[tuple[str, Tensor]]:
    """The convolutions and linear layers that run on `image` `[1, C, H, W]`, in their order, each with what it reads."""
    ran: list[tuple[str, Tensor]] = []

    def before(_: nn.Module, given: tuple[Tensor, ...], name: str) -> None:
        ran.append((name, given[0]))

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_pre_hook(functools.partial(before, name=n)) for n, m in layers]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def bridges(model: nn.Module, image: Tensor) -> list[list[str]]:
    """The bridge blocks of `model`: the last convolution before a transformer block, then what reads the block's input.

    A transformer block is the module around an attention module. From one such block to the next there is no bridge.
    """
    attentions = attention_names(model)
    blocks = [a.rpartition(".")[0] or a for a in attentions]
    found: list[list[str]] = []
    before = ""  # the last layer that ran, unless that was in a transformer block
    ran = running_order(model, image)
    for i, (name, read) in enumerate(ran):
        attention = next((a for a in attentions if name.startswith(a + ".")), "")
        if not any(name.startswith(block + ".") for block in blocks):
            before = name
        elif not attention:
            before = before and name
        else:
            if before and isinstance(model.get_submodule(before), nn.Conv2d):
                found.append([before, *(n for n, r in ran[i:] if r is read and n.startswith(attention + "."))])
            before = ""
    return found


@contextmanager
def floats(model: nn.Module, but: list[str] | None = None) -> Iterator[None]:
    """Let tensors pass unchanged through all quantizers but those of the layers named in `but`."""
    kept = {id(q) for n in but or [] for q in model.get_submodule(n).modules() if isinstance(q, FakeQuantizer)}
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantizer) and id(m) not in kept]
    try:
        for quantizer in quantizers:
            quantizer.watcher = lambda x: None
        yield
    finally:
        for quantizer in quantizers:
            quantizer.watcher = None


def damped(slopes: Tensor) -> Tensor:
    """Squared slopes and their mean, by which outputs that few slopes reached count too; ones where there are none."""
    return slopes + slopes.mean() if slopes.any() else torch.ones_like(slopes)


class _Done(Exception):
    """The bridge block has run."""


class Bridge:
    """A bridge block that runs alone: what comes before it returns what it returned in floats, what follows does not run."""

    def __init__(self, model: nn.Module, names: list[str], images: Tensor, slopes: dict[str, list[Tensor]]) -> None:
        self.model, self.names, self.ends = model, names, names[1:]
        self.runs: list[tuple[Tensor, dict[nn.Module, Any], list[Tensor], list[Tensor]]] = []
        with floats(model):
            for i, batch in enumerate(images[:BORDER_IMAGES].split(FEW)):
                before = self._before(batch)
                self.runs.append((batch, before, self._run(batch, before), [slopes[n][i] for n in self.ends]))

    def error(self) -> float:
        total = 0.0
        for batch, before, expected, slopes in self.runs:
            for out, wanted, g in zip(self._run(batch, before), expected, slopes, strict=True):
                total += float(((out - wanted).square() * damped(g)).sum())
        return total

    def _run(self, batch: Tensor, before: dict[nn.Module, Any]) -> list[Tensor]:
        outs: dict[str, Tensor] = {}

        def after(_: nn.Module, __: Any, out: Tensor, name: str) -> None:
            outs[name] = out.clone()
            if len(outs) == len(self.ends):
                raise _Done

        handles = [self.model.get_submodule(n).register_forward_hook(functools.partial(after, name=n)) for n in self.ends]
        try:
            for module, out in before.items():
                module.forward = functools.partial(_cloned, out)
            with torch.no_grad():
                self.model(batch)
        except _Done:
            pass
        finally:
            for module in before:
                del module.forward
            for handle in handles:
                handle.remove()
        return [outs[n] for n in self.ends]

    def _before(self, batch: Tensor) -> dict[nn.Module, Any]:
        """The largest modules that run once and end before the block begins, with what they return."""
        calls: Counter[nn.Module] = Counter()
        outs: dict[nn.Module, Any] = {}
        began: list[bool] = []

        def after(module: nn.Module, _: Any, out: Any) -> None:
            calls[module] += 1
            if not began:
                for inner in module.modules():
                    outs.pop(inner, None)
                outs[module] = _cloned(out)

        handles = [m.register_forward_hook(after) for m in self.model.modules()]
        first = self.model.get_submodule(self.names[0])
        handles.append(first.register_forward_pre_hook(lambda *_: began.append(True)))
        try:
            with torch.no_grad():
                self.model(batch)
        finally:
            for handle in handles:
                handle.remove()
        return {m: out for m, out in outs.items() if calls[m] == 1}


def _cloned(out: Any, *_: Any, **__: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, out)
