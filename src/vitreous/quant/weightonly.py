"""WeightOnly: weights of linear layers in 8 or 4 bits, activations in floats; runtimes unpack them as they multiply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError
from ..steps import Step, step
from ..work import part, tick
from .coverage import coverage
from .gptq import input_grams, second_order_rounding
from .layers import IN_TORCH, Quantizer
from .linears import as_linears, is_linear
from .rounding import SoftRounding, decide

GROUPS = (256, 128, 64, 32, 16)  # what the packed kernels of ONNX Runtime take
GRAMS = 2**27  # numbers of XᵀX held at a time, 512 MB
ITERATIONS = 1000  # of learned rounding, as `learn_rounding`


class GroupQuantizer(Quantizer):
    """A grid for each of `groups` runs of neighbouring inputs in each row of a weight `[O, I]`; scales are `[O, groups]`."""

    def __init__(self, bits: int, outputs: int, groups: int) -> None:
        super().__init__(bits, symmetric=bits == 8, channels=outputs * groups)
        self.scale, self.zero_point = self.scale.reshape(outputs, groups), self.zero_point.reshape(outputs, groups)

    def rows(self, x: Tensor) -> Tensor:
        """`[O · groups, I / groups]`, one row a grid."""
        return x.reshape(self.scale.numel(), -1)

    def quantized(self, x: Tensor) -> Tensor:
        scale, zero_point = self.scale.flatten(), self.zero_point.flatten()
        rows = torch.fake_quantize_per_channel_affine(self.rows(x), scale, zero_point, 0, self.low, self.high)
        return rows.reshape(x.shape)


class WeightOnlyLinear(nn.Linear):
    """A linear layer on a quantized weight, around the parameters of another; its input stays in floats."""

    simulated = IN_TORCH

    def __init__(self, linear: nn.Linear, w: GroupQuantizer) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.quant_w = w
        self.train(linear.training)

    @property
    def low_bits(self) -> str:
        return f"W{self.quant_w.bits}"

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.quant_w(self.weight), self.bias)


@step("quant")
@dataclass(frozen=True)
class WeightOnly(Step):
    """Weights of linear layers in few bits, everything else in floats. Smaller files, and less memory to read a weight from.

    8 bits are symmetric, with one scale for each output; 4 bits have zero points, and a grid for each `group` of
    neighbouring inputs. Both are what the packed formats of ONNX Runtime (MatMulNBits) and OpenVINO hold, so the shipped
    file executes them; the patch embedding, norms and embeddings stay in floats.

    bits: 8 or 4. group: inputs that share a grid, a power of two from 16 to 256; None for 64 at 4 bits and for whole rows
        at 8. Where it does not divide the inputs it is the largest that does; rows that are not longer than it stay whole.
    rounding: "nearest" needs no images. "learned" (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
        Quantization", ICML 2020) and "second-order" (Frantar et al., "GPTQ", ICLR 2023) round such that the outputs of each
        layer change least; both need calibration images. Inputs are those of the float model, in one pass; the papers take
        them behind the layers that are quantized already.
    """

    plans: ClassVar[dict[str, Any]] = {"layers": list[str]}

    bits: Literal[8, 4] = 8
    group: int | None = None
    rounding: Literal["nearest", "learned", "second-order"] = "nearest"

    wide: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise VitreousError(f"{self.name}: bits must be 8 or 4, which runtimes execute, not {self.bits}")
        if self.group is not None and self.group not in GROUPS:
            raise VitreousError(f"{self.name}: group must be one of {', '.join(map(str, GROUPS))}, not {self.group}")
        if self.rounding not in ("nearest", "learned", "second-order"):
            raise VitreousError(f"{self.name}: rounding must be nearest, learned or second-order, not {self.rounding!r}")

    def refuse_after(self, done: Sequence[Step]) -> str:
        if any(s.family == "quant" for s in done):
            return "the model is quantized already, a second grid would only add its error; start from the float model"
        return ""

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        if self.rounding != "nearest" and calibration is None:
            raise VitreousError(f"{self} needs calibration images: pass calibration=, a [N, C, H, W] tensor")
        if self.rounding != "nearest" and calibration is not None and len(calibration) == 0:
            raise VitreousError(f"{self} was given no calibration images: give at least one, 32 are usual")
        as_linears(model)
        layers = [name for name, m in model.named_modules() if is_linear(m)]
        if not layers:
            raise VitreousError(f"{self.name} finds no linear layer in {type(model).__name__}")
        return {"layers": layers}

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        as_linears(model)
        for name in plan["layers"]:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            w = GroupQuantizer(self.bits, linear.out_features, self._groups(linear.in_features))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, WeightOnlyLinear(linear, w.to(linear.weight.device)))

    def _groups(self, inputs: int) -> int:
        wanted = self.group or (64 if self.bits == 4 else inputs)
        sizes = [size for size in GROUPS if size <= wanted and inputs % size == 0]
        return inputs // sizes[0] if sizes and wanted < inputs else 1

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        """Weights are set to their values on the grid, where no runtime's rounding can move them."""
        layers = {name: m for name, m in model.named_modules() if isinstance(m, WeightOnlyLinear)}
        with torch.no_grad():
            for layer in layers.values():
                w = layer.quant_w
                w.set(*w.grid(*w.rows(layer.weight.float()).aminmax(dim=1)))
            if self.rounding == "nearest":
                rounded = {name: layer.quant_w(layer.weight.float()) for name, layer in layers.items()}
            else:
                assert calibration is not None
                rounded = self._rounded(model, layers, calibration)
            for name, weight in rounded.items():
                layers[name].weight.copy_(weight)

    def covers(self, model: nn.Module, calibration: Tensor | None) -> str:
        return str(coverage(model, calibration))

    def _rounded(self, model: nn.Module, layers: dict[str, WeightOnlyLinear], calibration: Tensor) -> dict[str, Tensor]:
        method = second_order_rounding if self.rounding == "second-order" else learned_rounding
        rounded = {}
        for names in _at_a_time(layers):
            for name, gram in _float_grams(model, layers, names, calibration).items():
                layer = layers[name]

                def make(layer: WeightOnlyLinear = layer, gram: Tensor = gram) -> dict[str, Tensor]:
                    return {"weight": method(layer.weight, gram, layer.quant_w)}

                rounded[name] = part(name, make)["weight"]
                tick(len(rounded) / len(layers))
        return rounded


def learned_rounding(weight: Tensor, gram: Tensor, quantizer: GroupQuantizer) -> Tensor:
    """`weight` `[O, I]` on its grid, as `rounding.learn_rounding`, from the mean of x·xᵀ `[I, I]` alone.

    Inputs are those of the float layer, so the squared error of its outputs is a quadratic form in the weight's error.
    """
    soft = SoftRounding(quantizer.rows(weight), quantizer)
    decide(soft, gram, weight.detach() @ gram, ITERATIONS)
    return soft.hard().reshape(weight.shape).to(weight.dtype)


def _at_a_time(layers: dict[str, WeightOnlyLinear]) -> Iterator[list[str]]:
    """The names of `layers`, in runs whose matrices XᵀX fit in memory together."""
    names, numbers = [], 0
    for name, layer in layers.items():
        size = layer.in_features**2
        if names and numbers + size > GRAMS:
            yield names
            names, numbers = [], 0
        names.append(name)
        numbers += size
    yield names


def _float_grams(model: nn.Module, layers: dict[str, WeightOnlyLinear], names: list[str], images: Tensor) -> dict[str, Tensor]:
    """XᵀX of the layers called `names`, on the inputs that they have while no weight is quantized."""
    try:
        for layer in layers.values():
            layer.quant_w.watcher = lambda weight: None
        return input_grams(model, names, images)
    finally:
        for layer in layers.values():
            layer.quant_w.watcher = None
