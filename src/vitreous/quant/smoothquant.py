"""SmoothQuant: move what is hard in activations into the weights, which have room for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..steps import step
from .calibration import watch
from .layers import Quantizer, QuantLinear, quant_layers
from .posttraining import PostTraining, norm_readers


@step("quant")
@dataclass(frozen=True)
class SmoothQuant(PostTraining):
    """Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023.

    Each channel of a LayerNorm's output is divided by s_j = max|X_j|^α / max|W_j|^(1 − α) (equation 4), with W of all
    the layers that read it, and their weights are multiplied by it. The division is folded into the LayerNorm's γ and
    β, so the model costs nothing more and computes the same. Then every range is the whole one, as in `MinMax`.

    alpha: how much of the difficulty moves, 0 to 1. The paper takes 0.5, more where activations are wilder.

    As in the official code only what follows a LayerNorm is smoothed, which needs plain blocks; of other models this
    is `MinMax`. Where the paper's static setting has one symmetric scale for a tensor, grids here are those of
    `PostTraining`: inputs with a zero point, weights for each output channel. What is quantized, and the other
    parameters, are described there.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_alpha(self.name, self.alpha)

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        readers = norm_readers(model)
        with torch.no_grad():
            seen = watch(model, calibration, [name for inputs in readers.values() for name in inputs])
            for norm, inputs in readers.items():
                first, layers = seen[next(iter(inputs))], list(inputs.values())
                s = migration(torch.maximum(-first.low, first.high), layers, self.alpha)
                smooth(model.get_submodule(norm), layers, s)
                for name in inputs:
                    seen[name].low, seen[name].high = seen[name].low / s, seen[name].high / s
            for name, found in seen.items():
                quantizer = model.get_submodule(name)
                assert isinstance(quantizer, Quantizer)
                quantizer.set(*quantizer.grid(found.low.amin(), found.high.amax()))
            for layer in quant_layers(model).values():
                layer.quant_w.set(*layer.quant_w.grid(*layer.weight.float().flatten(1).aminmax(dim=1)))


def refuse_alpha(name: str, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise VitreousError(f"{name}: alpha must be 0 to 1, not {alpha}")


def migration(reach: Tensor, layers: list[QuantLinear], alpha: float) -> Tensor:
    """s `[C]` for channels that reach as far as `reach` `[C]`. The floors are those of the official code."""
    weight = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0).double().clamp_min(1e-5)
    return (reach.double() ** alpha / weight ** (1 - alpha)).clamp_min(1e-5)


def smooth(norm: nn.Module, layers: list[QuantLinear], s: Tensor, shift: Tensor | float = 0.0) -> None:
    """Make the LayerNorm's output x `[…, C]` (x − shift)/s, without changing what the `layers` that read it compute."""
    assert isinstance(norm, nn.LayerNorm)
    shift = torch.zeros_like(s) + shift
    norm.weight.copy_(norm.weight.double() / s)
    norm.bias.copy_((norm.bias.double() - shift) / s)
    for layer in layers:
        weight = layer.weight.double()
        layer.bias.copy_(layer.bias.double() + weight @ shift)
        layer.weight.copy_(weight * s)
