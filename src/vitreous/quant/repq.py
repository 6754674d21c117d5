"""RepQ-ViT: quantize finely, then move the fine scales into neighbouring layers so that inference stays simple."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..steps import step
from .calibration import PERCENTILES, Watch, search, watch
from .layers import FLOOR, LogSqrt2, Quantizer, QuantLinear, quant_layers
from .posttraining import PostTraining


@step("quant")
@dataclass(frozen=True)
class RepQ(PostTraining):
    """Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers", ICCV 2023.

    LayerNorm outputs, whose channels differ widely, are calibrated for each channel; then the LayerNorm's affine and
    the layers that read it change so that all channels share one scale and zero point (section 3.2). This needs plain
    blocks; elsewhere inputs of layers are quantized per tensor. Softmax lies on powers of √2 (section 3.3). Weights and
    inputs of the classifier are quantized like others, the patch embedding reads 8-bit images, as published.

    With 8 and 8 bits (deployable; the paper reports 4 and 6) softmax, when quantized at all, lies on 256 uniform steps
    of 1/255, for runtimes know no logarithmic integers; and ranges are exact. The percentile search of the official
    code is for fewer bits: at 8 its clipping of rare, large activations doubles the error on DINOv2.

    Other departures from the official code: activations are observed on the float model, not behind quantized layers,
    so that calibration runs in batches; the shared zero point is rounded, as integers need; ranges of whole tensors
    and of weights are widened to hold 0; of tensors with more than a million values a sample is searched.

    What is quantized, and the parameters, are described at `PostTraining`.
    """

    log_softmax: ClassVar[bool] = True

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        readers: dict[str, dict[str, QuantLinear]] = {}
        for name, layer in quant_layers(model).items():
            if isinstance(layer, QuantLinear) and layer.after:
                readers.setdefault(layer.after, {})[f"{name}.quant_x"] = layer
        by_channel = {name for inputs in readers.values() for name in inputs}
        with torch.no_grad():
            watches = watch(model, calibration, by_channel, sample=True)
            for norm, inputs in readers.items():
                scale, zero_point = channel_grids(watches[next(iter(inputs))], self.activations)
                reparameterize(model.get_submodule(norm), list(inputs.values()), scale, zero_point)
            for name in watches.keys() - by_channel:
                quantizer, seen = model.get_submodule(name), watches[name]
                if isinstance(quantizer, LogSqrt2):
                    quantizer.scale.copy_(search_log(seen.samples, quantizer))
                elif isinstance(quantizer, Quantizer) and name.endswith(".operands.probs"):
                    quantizer.set(torch.tensor(1 / quantizer.high), torch.tensor(0))
                elif isinstance(quantizer, Quantizer) and quantizer.bits == 8:
                    quantizer.set(*quantizer.grid(seen.low, seen.high))
                elif isinstance(quantizer, Quantizer):
                    quantizer.set(*search(seen.samples, quantizer.grid, quantizer.low, quantizer.high))
            for layer in quant_layers(model).values():
                w, q = layer.weight.float().flatten(1).T, layer.quant_w
                q.set(*(q.grid(*w.aminmax(dim=0)) if q.bits == 8 else search(w, q.grid, q.low, q.high)))


def channel_grids(seen: Watch, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[C]` of each channel; zero points may lie outside of 0 … 2^bits − 1."""
    levels = 2**bits - 1
    # A channel that hardly moves must not blow up the weights of the next layer.
    floor = (1e-4 * (seen.high - seen.low).mean() / levels).clamp_min(FLOOR)

    def grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.maximum((high - low) / levels, floor)
        return scale, (-low / scale).round()

    return grid(seen.low, seen.high) if bits == 8 else search(seen.samples, grid, 0, levels)


def reparameterize(norm: nn.Module, layers: list[QuantLinear], scale: Tensor, zero_point: Tensor) -> None:
    """Give all channels of a LayerNorm's output one scale and zero point, without changing what `layers` compute.

    Section 3.2: with s̃ and z̃ the means of s and z, r1 = s/s̃ and r2 = z − z̃, the LayerNorm's γ and β become γ/r1 and
    (β + s·r2)/r1, the next W and b become r1·W and b − W(s·r2). In double precision, for β and s·r2 may cancel.
    """
    assert isinstance(norm, nn.LayerNorm)
    s, z = scale.double(), zero_point.double()
    shared, shared_zero = s.mean(), z.mean().round().clamp(0, layers[0].quant_x.high)
    r1, shift = s / shared, s * (z - shared_zero)
    norm.weight.copy_(norm.weight.double() / r1)
    norm.bias.copy_((norm.bias.double() + shift) / r1)
    for layer in layers:
        w = layer.weight.double()
        layer.bias.copy_(layer.bias.double() - w @ shift)
        layer.weight.copy_(w * r1)
        layer.quant_x.set(shared, shared_zero)


def search_log(x: Tensor, quantizer: LogSqrt2) -> Tensor:
    """The scale of a `LogSqrt2`: of three upper percentiles of `x` the one with the least squared error."""
    candidates = torch.quantile(x.flatten(), x.new_tensor(PERCENTILES)).clamp_min(FLOOR)
    return min(candidates, key=lambda s: float((quantizer.quantized(x, s) - x).square().mean()))
