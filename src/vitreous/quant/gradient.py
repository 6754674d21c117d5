"""Gradient-based post-training quantization: rounding is learned, and bits go where gradients say that they matter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..outputs import answer
from ..steps import step
from .calibration import search, set_grids, watch
from .isvit import fit_weight
from .layers import FakeQuantizer, LogSqrt2, QuantConv2d, Quantizer, QuantLinear, quant_layers
from .posttraining import PostTraining, Read
from .reconstruction import in_floats, walk
from .rounding import learn_rounding

EXAMPLES = 8  # images from which importance is estimated
SAMPLE = 2**16  # values of an input from which its grid is searched for that
SPREAD = 2  # bits that a layer may lie above and below the budget


@step("quant")
@dataclass(frozen=True)
class GradientPTQ(PostTraining):
    """Yvinec, Dapogny, Bailly, "Gradient-Based Post-Training Quantization: Challenging the Status Quo", 2023 (arXiv 2308.07662).

    The rounding of each weight is learned, layer after layer (AdaRound, `rounding.learn_rounding`): the layer reads what the
    quantized model gives it and shall give what the float model does. The authors published no code, and what we follow is what
    their abstract states; the choices that it names but leaves open are ours:

    - all weights are learned, from the calibration images as they are: selection of weights, feature augmentation and the
      choice of images hardly matter, they find;
    - loss: squared error of the layer's output; optimizer and variable: Adam on AdaRound's V;
    - degrees of freedom: beside the rounding each layer's bias, which is solved for exactly;
    - non-uniform steps: softmax lies on powers of √2 below 8 bits (`layers.LogSqrt2`), all else on uniform steps;
    - importance-based mixed precision: the importance of bits is the expected squared change of the model's output that
      rounding to them causes, to first order, Σ E[g²]·Δ² with the gradients g of random projections of the output (see
      `importance`). Layers have up to two bits more or fewer; of weights and of inputs each the average over values stays
      within `weights` and `activations`.

    mixed: allot bits by importance. Without effect where both are 8, which stays deployable.
    iterations: of Adam for each layer; AdaRound takes 10 000, here fewer go proportionally faster.

    Ranges: exact at 8 bits, else percentiles with the least squared error, one for a whole activation tensor. At most
    `reconstruction.IMAGES` images are learned from. Layers that a token step runs in pieces are rounded to nearest. What is
    quantized, and the other parameters, are described at `PostTraining`.
    """

    mixed: bool = True
    iterations: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise VitreousError(f"{self.name}: iterations must be 1 or more")

    def softmax_quantizer(self, bits: int) -> FakeQuantizer:
        return LogSqrt2(bits) if bits < 8 else Quantizer(bits)

    def allot(self, model: nn.Module, calibration: Tensor, layers: dict[str, Read]) -> dict[str, tuple[int, int]]:
        if self.deployable or not self.mixed:
            return {}
        weights, inputs, sizes = importance(model, calibration[:EXAMPLES], layers, self.weights, self.activations)
        w_bits = spend(weights, {n: s[0] for n, s in sizes.items()}, self.weights)
        x_bits = spend(inputs, {n: sizes[n][1] for n in inputs}, self.activations)
        return {name: (w_bits[name], x_bits.get(name, self.activations)) for name in layers}

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        floats = in_floats(model)
        with torch.no_grad():
            set_grids(model, watch(model, calibration, sample=True))
            for layer in quant_layers(model).values():
                fit_weight(layer.quant_w, layer.weight)
        walk(model, floats, calibration, self._learn, "rounding", blocks=False)

    def _learn(self, unit: nn.Module, x: Tensor, y: Tensor) -> None:
        assert isinstance(unit, (QuantLinear, QuantConv2d))
        with torch.no_grad():
            x = unit.quant_x(x)
            fit_bias(unit, x, y)  # first, for rounding should not have to make up for what a bias can
            unit.weight.copy_(learn_rounding(unit, x, y, unit.quant_w, self.iterations))
            fit_bias(unit, x, y)


@torch.no_grad()
def fit_bias(layer: QuantLinear | QuantConv2d, x: Tensor, y: Tensor) -> None:
    """Give `layer` the bias, where it has one, with which its output on `x` is nearest to `y`: their means are equal."""
    if layer.bias is not None:
        error = y - layer(x)
        layer.bias += (error.mT if isinstance(layer, QuantLinear) else error.flatten(2)).movedim(-2, 0).flatten(1).mean(1)


Loss = dict[str, dict[int, float]]


def choices(budget: int) -> range:
    return range(max(2, budget - SPREAD), min(8, budget + SPREAD) + 1)


def importance(
    model: nn.Module, images: Tensor, layers: dict[str, Read], weights: int, activations: int
) -> tuple[Loss, Loss, dict[str, tuple[int, int]]]:
    """What rounding the weight, and the input, of each layer costs at each number of bits around `weights` and `activations`.

    The cost is the expected squared change of the model's output, summed over `images`, to first order, and as if rounding
    errors Δ were independent: Σ E[g²]·Δ², where g = ∂(v·f)/∂w with one draw of v ~ N(0, I) an image. Returned as
    `{layer: {bits: cost}}` for weights and for inputs, with the number of values `(weight, input)` of each layer. Inputs of
    convolutions are images, which stay at 8 bits, and have no entry.
    """
    model = copy.deepcopy(model).eval().requires_grad_(True)
    modules = {name: model.get_submodule(name) for name in layers}
    read: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            read[name] = given[0]

        return hook

    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(name))
    tensors = {name: module.get_parameter("weight") for name, module in modules.items()}
    squares = {name: torch.zeros_like(w) for name, w in tensors.items()}
    of_weights: Loss = {name: {} for name in modules}
    images = images.to(next(model.parameters()))
    with torch.no_grad():
        model(images)
        grids = {name: [input_grid(x, bits) for bits in choices(activations)] for name, x in read.items()}
    of_inputs: Loss = {name: dict.fromkeys(choices(activations), 0.0) for name in read}
    with torch.enable_grad():
        for image in images.split(1):
            out = answer(model(image.clone().requires_grad_(True)))
            drawn, asked = (out * torch.randn_like(out)).sum(), [*tensors.values(), *read.values()]
            slopes = torch.autograd.grad(drawn, asked, allow_unused=True, materialize_grads=True)
            for name, slope in zip(tensors, slopes[: len(tensors)], strict=True):
                squares[name] += slope.square()
            for (name, x), slope in zip(read.items(), slopes[len(tensors) :], strict=True):
                for q in grids[name]:
                    of_inputs[name][q.bits] += float(((q(x.detach()) - x.detach()) * slope).square().sum())
    for name, w in tensors.items():
        for bits in choices(weights):
            q = Quantizer(bits, symmetric=bits == 8, channels=len(w)).to(w.device)
            fit_weight(q, w)
            of_weights[name][bits] = float(((q(w.detach()) - w.detach()).square() * squares[name]).sum())
    sizes = {name: (tensors[name].numel(), read[name].numel() if name in read else 0) for name in modules}
    return of_weights, of_inputs, sizes


def input_grid(x: Tensor, bits: int) -> Quantizer:
    values = x.reshape(-1, 1).float()
    if len(values) > SAMPLE:
        values = values[torch.randint(len(values), (SAMPLE,)).to(x.device)]
    q = Quantizer(bits).to(x.device)
    q.set(*search(values, q.grid, q.low, q.high))
    return q


def spend(costs: Loss, sizes: dict[str, int], budget: int) -> dict[str, int]:
    """Bits for each name, on average over `sizes` no more than `budget`: given one after the other where they save most a value.

    A step may be of several bits, for costs need not fall with each of them.
    """
    bits = {name: min(cost) for name, cost in costs.items()}
    left = sum((budget - bits[name]) * sizes[name] for name in bits)
    while True:
        steps = [
            ((costs[name][now] - cost) / (more - now) / sizes[name], name, more)
            for name, now in bits.items()
            for more, cost in costs[name].items()
            if more > now and (more - now) * sizes[name] <= left
        ]
        saved, name, more = max(steps, key=lambda step: step[0], default=(0.0, "", 0))
        if saved <= 0:
            return bits
        left -= (more - bits[name]) * sizes[name]
        bits[name] = more
