"""A part of a model in integers, the rest in floats: which parts harm least, found without calibrating for each choice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import PlainBlock
from ..outputs import answer
from ..quant.layers import quant_layers
from ..quant.linears import as_linears, attention_blocks

IMAGES = 16  # on which the harm of each part is measured


class Mixer:
    """Models that are `net` but for some parts, which they have from `quantized`, the same model with all in integers.

    A part is the attention or the MLP of a plain block with the norm before it, and elsewhere a layer: no quantizer moves scales
    from one part to another. `weights` tells the numbers in the weights of each.
    """

    def __init__(self, net: nn.Module, quantized: nn.Module) -> None:
        with torch.inference_mode(False):
            self.floats = copy.deepcopy(net)
            as_linears(self.floats)
            attention_blocks(self.floats)
        self.quantized = quantized
        blocks = [m.name for m in quantized.modules() if isinstance(m, PlainBlock)]
        self.norms: dict[str, str] = {}
        for block in blocks:
            self.norms |= {f"{block}.attn": f"{block}.norm1", f"{block}.mlp": f"{block}.norm2"}
        self.weights: dict[str, int] = {}
        for name, layer in quant_layers(quantized).items():
            part = next((p for p in self.norms if name.startswith(f"{p}.")), name)
            self.weights[part] = self.weights.get(part, 0) + layer.weight.numel()

    def mixed(self, parts: Iterable[str]) -> nn.Module:
        """With `parts` in integers."""
        model = copy.deepcopy(self.floats)
        for part in parts:
            for name in (part, self.norms.get(part)):
                if name:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, self.quantized.get_submodule(name))
        return model.eval()

    @torch.inference_mode()
    def gentlest_first(self, images: Tensor, wanted: Any, tick: Callable[[float], None]) -> list[str]:
        """The parts in the order of their squared error of the outputs on `images`, alone in integers, for each of their weights.

        wanted: what `net` answers there. Errors of parts add up in squares, as far as they do not depend on one another.
        """
        true, harm = answer(wanted)[: len(images)].flatten(1), {}
        for i, part in enumerate(self.weights):
            off = answer(self.mixed([part])(images)).flatten(1) - true
            harm[part] = float((off.norm(dim=1) / true.norm(dim=1).clamp_min(1e-12)).square().mean()) / self.weights[part]
            tick((i + 1) / len(self.weights))
        return sorted(harm, key=lambda part: harm[part])
