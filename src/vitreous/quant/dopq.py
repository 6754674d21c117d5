"""DopQ-ViT: softmax on a tangent grid, and the median as the scale that the channels of a LayerNorm share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..steps import step
from ..work import tick
from .calibration import Watch
from .fpcs import fpcs
from .layers import FakeQuantizer, Quantizer, QuantLinear, straight_through
from .posttraining import PostTraining
from .reparameterization import channel_grids, fit_reparameterized

VALUES = 2**16  # of a softmax, on which grids are tried


@step("quant")
@dataclass(frozen=True)
class DopQ(PostTraining):
    """Yang et al., "DopQ-ViT: Towards Distribution-Friendly and Outlier-Aware Post-Training Quantization for Vision
    Transformers", 2024 (arXiv 2408.03291).

    TanQ: softmax lies on a grid that a tangent makes dense near 0, where most values are, and near 1, where the few that
    matter are (`TanQ`). MOSF: the scale that all channels of a LayerNorm's output share is the median of their scales, which
    no outlier moves; of all it has the least mean absolute deviation from them, which is how the paper's last version
    introduces it. All else is as in RepQ-ViT (`RepQ`).

    There is no official code, and of the paper only the abstract and descriptions of the method were at hand: the form of
    TanQ is ours, made to have its described properties. Its two parameters are searched (`fpcs`) for the least squared
    error. The paper's reconstruction of blocks, which its figures include, is left out. Without it MOSF does not change the
    result: a shared scale cancels between a LayerNorm and the layers that read it, as weights are quantized for each output
    channel (`reparameterize`), whether it is RepQ-ViT's mean or the median.

    With 8 and 8 bits (deployable; the paper reports 3, 4 and 6) softmax, when quantized at all, lies on 256 uniform steps,
    and ranges are exact: that is RepQ with 8 bits.

    What is quantized, and the parameters, are described at `PostTraining`.
    """

    def softmax_quantizer(self, bits: int) -> FakeQuantizer:
        return TanQ(bits) if bits < 8 else Quantizer(bits)

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None

        def grids(seen: Watch, _: list[QuantLinear]) -> tuple[Tensor, Tensor, Tensor]:
            scale, zero_point = channel_grids(seen, self.activations)
            return scale, zero_point, scale.median()

        watches = fit_reparameterized(model, calibration, grids)
        tans = {name: m for name in watches if isinstance(m := model.get_submodule(name), TanQ)}
        with torch.no_grad():
            for i, (name, quantizer) in enumerate(tans.items()):
                fit_tan(quantizer, watches[name].samples.flatten())
                tick((i + 1) / len(tans))


class TanQ(FakeQuantizer):
    """Values in 0 … 1 on 2^`bits` levels that are evenly spaced in tan((α + β)·x − β), for angles 0 < α, β < π/2.

    The tangent is steepest at both ends: the closer β is to a right angle, the denser are the levels near 0, and near 1 for
    α. 0 and 1 are levels. `near_zero` is tan β, `near_one` tan α.
    """

    near_zero: Tensor
    near_one: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("near_zero", torch.ones(()))
        self.register_buffer("near_one", torch.ones(()))

    def quantized(self, x: Tensor) -> Tensor:
        return straight_through(x, lambda x: self.on_grid(x, self.near_zero, self.near_one).to(x))

    def on_grid(self, x: Tensor, near_zero: Tensor, near_one: Tensor) -> Tensor:
        beta, last = near_zero.atan(), 2**self.bits - 1
        angle, step = beta + near_one.atan(), (near_zero + near_one) / last
        k = (((angle * x.clamp(0, 1) - beta).tan() + near_zero) / step).round().clamp(0, last)
        tangent = (k * near_one - (last - k) * near_zero) / last  # so that it is exact at both ends
        return (tangent.atan() + beta) / angle

    def extra_repr(self) -> str:
        return f"{self.bits} bits, tan β = {self.near_zero:.3g}, tan α = {self.near_one:.3g}"


def fit_tan(quantizer: TanQ, x: Tensor) -> None:
    """The angles of the grid with the least squared error on the values `x`."""
    x = x[torch.randperm(len(x))[:VALUES].to(x.device)]
    first = torch.linspace(-1, 7, 16).to(x).repeat(8)  # log tan β; beyond 7 single precision loses the tangent
    second = torch.linspace(-3, 5, 8).to(x).repeat_interleave(16)  # log tan α

    def error(zero: Tensor, one: Tensor) -> Tensor:
        return (quantizer.on_grid(x, zero.exp(), one.exp()) - x).square().mean()

    zero, one = fpcs(first, second, first[1] - first[0], error)
    quantizer.near_zero.copy_(zero.exp())
    quantizer.near_one.copy_(one.exp())
