"""What steps that set weights to zero have in common; the model keeps its shape, and whoever trains it keeps the zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..blocks import merged
from ..errors import VitreousError
from ..outputs import answer
from ..steps import Step

BATCH = 16


@dataclass(frozen=True)
class Zeros(Step):
    """A step that says which weights go (`masks`). They stay in the model as zeros: file and speed are those of the dense one,
    wherever no runtime skips them. `vt.heal` keeps them zero (`learn.KeepZeros`). Comes before quantization."""

    zeros: ClassVar[bool] = True
    plans: ClassVar[dict[str, Any]] = {"zeros": dict[str, float]}

    def masks(self, model: nn.Module, calibration: Tensor | None) -> tuple[dict[str, Tensor], str]:
        """By the name of each parameter, which of its entries stay, of bool; and what to say of it."""
        raise VitreousError(f"{self.name} does not say which weights go")

    def refuse_after(self, done: Sequence[Step]) -> str:
        quantized = any(s.family == "quant" for s in done)
        return "the scales were calibrated with all weights: prune first" if quantized else ""

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        merged(model)

    def fit(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        """`zeros`: the share of each parameter that was set to zero."""
        if self.needs_calibration and not len(calibration if calibration is not None else ()):
            raise VitreousError(f"{self.name} was given no calibration images: give at least one, 32 are usual")
        masks, said = self.masks(model, calibration)
        if not masks:
            raise VitreousError(f"{self.name}: this model has no layer whose weights could go")
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
        return {"zeros": {name: 1 - mask.float().mean().item() for name, mask in masks.items()}, "covers": said}


@dataclass
class Weighed:
    """A linear layer or convolution: its parameter `[out, in·k·k]` by name, the channels that enter it, and its
    multiply-accumulates for one image."""

    name: str
    weight: Tensor
    inputs: int
    macs: int
    module: nn.Linear | nn.Conv2d


def weighed(model: nn.Module, x: Tensor) -> list[Weighed]:
    """Every linear layer and convolution that runs on an image `x` `[1, C, H, W]`, in the order of the model."""
    rows: dict[nn.Module, int] = {}

    def ran(module: Any, _: Any, out: Tensor) -> None:
        rows[module] = rows.get(module, 0) + out.numel() // module.weight.shape[0]

    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    handles = [m.register_forward_hook(ran) for m in layers.values()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, m in layers.items():
        if m in rows:
            w = m.weight.detach()
            found.append(Weighed(f"{name}.weight", w.flatten(1), w.shape[1], w.numel() * rows[m], m))
    return found


def gradients(model: nn.Module, images: Tensor, layers: Sequence[Weighed]) -> list[Tensor]:
    """Of each layer's weight, `[out, in·k·k]`: the gradient of the mean squared output over `images`, the mean over batches."""
    weights = [layer.module.weight for layer in layers]
    asked = [w.requires_grad for w in weights]
    totals = [torch.zeros_like(layer.weight) for layer in layers]
    try:
        for w in weights:
            w.requires_grad_()
        with torch.inference_mode(False), torch.enable_grad():
            for x in images.split(BATCH):
                loss = answer(model(x.clone().to(weights[0]))).float().square().mean() * len(x) / len(images)
                for total, g in zip(totals, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                    if g is not None:
                        total += g.flatten(1)
    finally:
        for w, was in zip(weights, asked, strict=True):
            w.requires_grad_(was)
    if not all(torch.isfinite(t).all() for t in totals):
        raise VitreousError("gradients hold NaN or infinity, by which no weights can be chosen; try it in float32")
    return totals
