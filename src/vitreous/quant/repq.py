"""RepQ-ViT: quantize finely, then move the fine scales into neighbouring layers so that inference stays simple."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..steps import step
from .layers import FakeQuantizer, LogSqrt2, Quantizer
from .posttraining import PostTraining
from .reparameterization import channel_grids, fit_reparameterized


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

    def softmax_quantizer(self, bits: int) -> FakeQuantizer:
        return LogSqrt2(bits) if bits < 8 else Quantizer(bits)

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        fit_reparameterized(model, calibration, lambda seen, _: (*channel_grids(seen, self.activations), None))
