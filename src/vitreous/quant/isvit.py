"""I&S-ViT: a logarithmic quantizer that covers all of the softmax, and weights learned on a loss that stays smooth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..steps import step
from .calibration import Watch, set_grids, watch
from .layers import FLOOR, FakeQuantizer, Quantizer, QuantLinear, quant_layers, straight_through
from .posttraining import PostTraining, norm_readers
from .reconstruction import bake, descend, in_floats, unchanged, walk
from .reparameterization import channel_grids, reparameterize

SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)  # η
WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)
RATE = 4e-5  # of Adam


class ShiftUniformLog2(FakeQuantizer):
    """SULQ, the shift-uniform-log2 quantizer (section 4.1): uniform steps on log2(x + η), which reach all of the domain.

    q = clip(⌊(log2(x + η) − m)/Δ⌉, 0, 2^bits − 1), and back: 2^⌊q·Δ + m⌉ − η, powers of two less the shift. The paper quantizes
    −log2, which is the same from the other end.
    """

    shift: Tensor
    low: Tensor
    width: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        for name in ("shift", "low", "width"):
            self.register_buffer(name, torch.ones(()))

    def quantized(self, x: Tensor) -> Tensor:
        return straight_through(x, self.on_grid)

    def on_grid(self, x: Tensor) -> Tensor:
        q = (x.float() + self.shift).log2_().sub_(self.low).div_(self.width).round_().clamp_(0, 2**self.bits - 1)
        return q.mul_(self.width).add_(self.low).round_().exp2_().sub_(self.shift).to(x)

    def cover(self, low: Tensor, high: Tensor, shift: float) -> None:
        """Use the shift η, and spread the steps from `low` to `high`."""
        self.shift.fill_(shift)
        self.low.copy_(torch.log2(low + shift))
        self.width.copy_(((torch.log2(high + shift) - self.low) / (2**self.bits - 1)).clamp_min(FLOOR))

    def search(self, seen: Watch) -> None:
        """Of the published shifts the one with the least squared error."""
        low, high, best = seen.low[0].clamp_min(0), seen.high[0].clamp_min(0), (torch.inf, SHIFTS[0])
        for shift in SHIFTS:
            self.cover(low, high, shift)
            best = min(best, (float((self.on_grid(seen.samples) - seen.samples).square().mean()), shift))
        self.cover(low, high, best[1])


class ChannelWise(FakeQuantizer):
    """A uniform fake quantizer with a scale and zero point, which may lie outside of the integers, for each channel."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__(bits)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def quantized(self, x: Tensor) -> Tensor:
        high = 2**self.bits - 1
        inside = x.clamp(-self.zero_point * self.scale, (high - self.zero_point) * self.scale)
        return straight_through(
            inside,
            lambda x: (x / self.scale).round().add_(self.zero_point).clamp_(0, high).sub_(self.zero_point).mul_(self.scale),
        )


@step("quant")
@dataclass(frozen=True)
class ISViT(PostTraining):
    """Zhong et al., "I&S-ViT: An Inclusive & Stable Method for Pushing the Limit of Post-Training ViTs Quantization", 2023.

    Softmax goes through `ShiftUniformLog2`. Weights and biases of the quantized layers are learned block by block (patch
    embedding and classifier by themselves) in three stages, the smooth optimization strategy (section 4.2): (1) weights in
    floats, inputs of layers quantized, those behind LayerNorms with a scale for each channel; the block reads what the float
    model gives it; (2) the scales of channels move into LayerNorms and weights, as in RepQ-ViT; (3) weights quantized too, the
    block reads what the quantized model gives it. Models whose blocks are not plain, and those whose blocks give up tokens, are
    learned layer by layer, their inputs have one scale for the tensor in all stages.

    iterations: of Adam in each of the two stages and for each block. The authors take 1000 for 3 and 4 bits and 200 for 6, of
        64 images out of 1024, at a rate of 4e-5. That is hours on two cores; here fewer go proportionally faster.
    batch: images of an iteration.

    With 8 and 8 bits (deployable; the paper reports 3, 4 and 6) softmax, when quantized at all, lies on 256 uniform steps of
    1/255, and ranges are exact, both as in `RepQ`. Other departures: SULQ has 2^bits values in the search and after it (the
    official code adds one after it); activations are observed on the float model; shared zero points are rounded; no more than
    `reconstruction.IMAGES` images are learned from.

    What is quantized, and the other parameters, are described at `PostTraining`.
    """

    iterations: int = 100
    batch: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 0 or self.batch < 1:
            raise VitreousError(f"{self.name}: iterations must be 0 or more and batch 1 or more")

    def softmax_quantizer(self, bits: int) -> FakeQuantizer:
        return ShiftUniformLog2(bits) if bits < 8 else Quantizer(bits)

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        floats, readers = in_floats(model), norm_readers(model)
        with torch.no_grad():
            fine = self._calibrate(model, calibration, readers)
            for layer in quant_layers(model).values():
                layer.quant_w.watcher = unchanged
            for norm, inputs in readers.items():
                for layer in inputs.values():
                    layer.quant_x = ChannelWise(self.activations, *fine[norm])
        walk(model, floats, calibration, self._learn, "float-weights", own_inputs=False, done=(0.0, 0.4))
        with torch.no_grad():
            for norm, inputs in readers.items():
                for layer in inputs.values():
                    layer.quant_x = Quantizer(self.activations).to(layer.weight.device)
                reparameterize(model.get_submodule(norm), list(inputs.values()), *fine[norm])
            for layer in quant_layers(model).values():
                layer.quant_w.watcher = None
                fit_weight(layer.quant_w, layer.weight)
        walk(model, floats, calibration, self._learn, "quantized-weights", done=(0.4, 1.0))
        bake(model)

    def _calibrate(
        self, model: nn.Module, calibration: Tensor, readers: dict[str, dict[str, QuantLinear]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Sets the quantizers of activations; returns scale and zero point of the channels of each LayerNorm in `readers`."""
        by_channel = {name for inputs in readers.values() for name in inputs}
        watches = watch(model, calibration, by_channel, sample=True)
        set_grids(model, {name: seen for name, seen in watches.items() if name not in by_channel})
        for name, seen in watches.items():
            quantizer = model.get_submodule(name)
            if isinstance(quantizer, ShiftUniformLog2):
                quantizer.search(seen)
        return {norm: channel_grids(watches[next(iter(inputs))], self.activations) for norm, inputs in readers.items()}

    def _learn(self, unit: nn.Module, x: Tensor, y: Tensor) -> None:
        layers = quant_layers(unit).values()
        parameters = [p for layer in layers for p in (layer.weight, layer.bias) if isinstance(p, nn.Parameter)]
        published = 1000 if self.weights < 6 else 200
        rate = RATE * published / max(self.iterations, 1)
        descend(unit, x, y, parameters, self.iterations, rate, self.batch)


def fit_weight(quantizer: Quantizer, weight: Tensor) -> None:
    """Set the grid of a weight's output channels: exact at 8 bits, else of nine percentile ranges the least squared error.

    As the official code of I&S-ViT does; ranges are widened to hold 0.
    """
    rows = weight.detach().float().flatten(1)
    low, high = rows.aminmax(dim=1)
    scale, zero = quantizer.grid(low, high)
    if quantizer.bits < 8:
        best = torch.full_like(scale, torch.inf)
        for p in WEIGHT_PERCENTILES:
            s, z = quantizer.grid(torch.quantile(rows, 1 - p, dim=1), torch.quantile(rows, p, dim=1))
            q = ((rows / s[:, None]).round() + z[:, None]).clamp(quantizer.low, quantizer.high)
            error = ((q - z[:, None]) * s[:, None] - rows).square().mean(1)
            better = error < best
            best, scale, zero = best.where(~better, error), scale.where(~better, s), zero.where(~better, z)
    quantizer.set(scale, zero)
