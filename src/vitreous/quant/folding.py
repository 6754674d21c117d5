"""Batch normalization folded into the layer before it, so that one quantized layer is left of the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

LAYERS = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)


class _Readers(TorchFunctionMode):
    """Counts how often each tensor in `count` enters a function that makes a tensor; asking for a shape is no reading."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            for key in {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}:
                if key in self.count:
                    self.count[key] += 1
        return out


def foldable(model: nn.Module, image: Tensor) -> list[tuple[str, str]]:
    """Names of the convolutions and linear layers of `model` that can take in a batch normalization, each with its name.

    Found by running `image` `[1, C, H, W]`: the normalization reads the layer's very output, nothing else does, both run
    once, and running statistics are there. Subclasses with a forward of their own are left alone.
    """
    made: dict[int, tuple[Tensor, str]] = {}
    runs: Counter[str] = Counter()
    pairs: list[tuple[str, str, int]] = []
    readers, handles = _Readers(), []

    def after_layer(name: str, out: Tensor) -> None:
        runs[name] += 1
        made[id(out)] = (out, name)  # the tensor is kept, so that its id stays its own
        readers.count[id(out)] = 0

    def before_norm(name: str, x: Tensor) -> None:
        runs[name] += 1
        if id(x) in made:
            pairs.append((made[id(x)][1], name, id(x)))

    for name, m in model.named_modules():
        if type(m) in LAYERS:
            handles.append(m.register_forward_hook(lambda _, given, out, name=name: after_layer(name, out)))
        elif type(m) in NORMS and m.running_var is not None:
            handles.append(m.register_forward_pre_hook(lambda _, given, name=name: before_norm(name, given[0])))
    try:
        with torch.no_grad(), readers:
            model(image.to(next(model.parameters())))
    finally:
        for handle in handles:
            handle.remove()
    return [(layer, norm) for layer, norm, key in pairs if runs[layer] == runs[norm] == readers.count[key] == 1]


@torch.no_grad()
def fold(model: nn.Module, pairs: Sequence[Sequence[str]]) -> None:
    """Fold each (layer, normalization) in place: W·γ/√(σ² + ε) and β + (b − μ)·γ/√(σ² + ε), computed in double precision.

    In the place of the normalization stays the identity, or the activation function that timm's holds.
    """
    for layer_name, norm_name in pairs:
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        shift = torch.zeros_like(factor)
        if norm.weight is not None:
            factor, shift = factor * norm.weight.double(), norm.bias.double()
        bias = 0 if layer.bias is None else layer.bias.double()
        shift = shift + (bias - norm.running_mean.double()) * factor
        layer.weight.copy_(layer.weight.double() * factor.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.empty_like(shift, dtype=layer.weight.dtype))
        layer.bias.copy_(shift)
        rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
        parent, _, child = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), child, rest.train(norm.training))
