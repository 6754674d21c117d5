"""MinMax: the plainest post-training quantizer, which every other has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..steps import step
from .calibration import watch
from .layers import Quantizer, quant_layers
from .posttraining import PostTraining


@step("quant")
@dataclass(frozen=True)
class MinMax(PostTraining):
    """Uniform steps from the least to the greatest value: of each output channel of a weight, and of each activation
    tensor over the calibration images. Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (CVPR 2018), section 2.1, without the training.

    What is quantized, and the parameters, are described at `PostTraining`.
    """

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        with torch.no_grad():
            for name, seen in watch(model, calibration).items():
                quantizer = model.get_submodule(name)
                assert isinstance(quantizer, Quantizer)
                quantizer.set(*quantizer.grid(seen.low, seen.high))
            for layer in quant_layers(model).values():
                layer.quant_w.set(*layer.quant_w.grid(*layer.weight.float().flatten(1).aminmax(dim=1)))
