"""MPTQ-ViT: centred and smoothed LayerNorm outputs, two steps for lopsided activations, and bits where they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import PlainAttention, PlainBlock
from ..outputs import answer
from ..steps import step
from ..work import Work, tick, working
from .calibration import watch
from .layers import FLOOR, FakeQuantizer, Quantizer, QuantLinear, quant_layers, straight_through
from .mse import COARSE, search_range, search_weight
from .percentile import Histogram, histograms
from .posttraining import PostTraining, Read, norm_readers
from .reconstruction import reduces
from .smoothquant import migration, refuse_alpha, smooth

RATIOS = range(9)  # m, where one region's step is 2^m of the other's
SCOUTS, PIXELS = 8, 224**2  # bits are tried out on as many images as have so many pixels together, 1 to 8
LOWER, HIGHER = 1, 2  # how far bits may go from their average


@step("quant")
@dataclass(frozen=True)
class MPTQ(PostTraining):
    """Tai and Wu, "MPTQ-ViT: Mixed-Precision Post-Training Quantization for Vision Transformer" (2024).

    - SQ-b: SmoothQuant with a bias term. Each channel of a LayerNorm's output is centred on the middle of its range,
      then divided by SmoothQuant's scale for what is left, (max − min)/2; both are folded into the LayerNorm's affine
      and the layers that read it.
    - OPT-m, below 8 bits: what GELU and softmax give lies on a fine and a coarse grid (`TwoRegion`), the ratio 2^m of
      whose steps is chosen by the data.
    - Greedy MP, with `mixed`: each weight, layer input and attention product gets bits of its own, from one below to
      two above `weights` and `activations`, which become averages: over the weights, and over the values of one image.
      From the most bits, again and again one is taken where the model's output suffers least for each bit saved.

    With 8 and 8 bits only SQ-b is left, which is deployable; bits have nothing to be mixed for. All else is simulated.

    No code was published, and the above follows the paper's abstract and the authors' earlier TSPTQ-ViT (ICASSP 2023)
    rather than its equations: ours are the middle of the range as the bias, the layout of the two regions, the squared
    error as the criterion of m and, below 8 bits, of all ranges, and the score of Greedy MP, the increase of the
    squared relative error of the model's output over the bits saved. That error is measured on one image (up to
    eight smaller ones) with one tensor quantized and all others in floats, and errors are taken to add up; measuring
    anew after every step, as a literal greedy search would, takes some sixty times as long.

    alpha: as in `SmoothQuant`. What is quantized, and the other parameters, are described at `PostTraining`.
    """

    alpha: float = 0.5
    mixed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_alpha(self.name, self.alpha)

    def softmax_quantizer(self, bits: int) -> FakeQuantizer:
        return TwoRegion(bits) if bits < 8 else Quantizer(bits)

    def input_quantizer(self, reads: str, bits: int) -> FakeQuantizer:
        return TwoRegion(bits) if bits < 8 and reads == "act" else Quantizer(bits)

    def allot(self, model: nn.Module, calibration: Tensor, layers: dict[str, Read]) -> dict[str, tuple[int, int]]:
        if not self.mixed or self.deployable:
            return {}
        wanted = {kind: b for kind, b in (("weights", self.weights), ("activations", self.activations)) if b < 8}
        errors, sizes = self._try_out(model, scouts(calibration), wanted)
        bits = {kind: greedy(errors[kind], sizes[kind], average) for kind, average in wanted.items()}
        w, x = bits.get("weights", {}), bits.get("activations", {})
        products = {name: (b, b) for name, b in x.items() if name not in layers}
        return products | {name: (w.get(name, self.weights), x.get(name, self.activations)) for name in layers}

    def _try_out(
        self, model: nn.Module, images: Tensor, wanted: Mapping[str, int]
    ) -> tuple[dict[str, dict[str, dict[int, float]]], dict[str, dict[str, int]]]:
        """Of weights and of activations by name: the output's error at each number of bits, and the number of values."""
        errors: dict[str, dict[str, dict[int, float]]] = {kind: {} for kind in wanted}
        sizes: dict[str, dict[str, int]] = {}
        softmax = not self.deployable if self.softmax is None else self.softmax
        choices = {kind: range(max(2, b - LOWER), min(8, b + HIGHER) + 1) for kind, b in wanted.items()}
        with torch.no_grad():
            exact = answer(model(images.to(next(model.parameters())))).flatten(1)
        widths = sorted({b for some in choices.values() for b in some})
        for i, bits in enumerate(widths):
            with working(Work()):  # its progress is not ours
                single = replace(self, weights=bits, activations=bits, softmax=softmax, reduce_range=False, mixed=False)
                small = single.apply(model, images)
            everything, known = parts(small), before(small, images)
            if not i:
                sizes["activations"] = count(small, everything["activations"], images)
                sizes["weights"] = {n: layer.weight.numel() for n, layer in quant_layers(small).items()}
            for kind in (k for k in wanted if bits in choices[k]):
                for name, quantizers in everything[kind].items():
                    error = only(small, quantizers, images, known) - exact
                    relative = (error.square().sum(1) / exact.square().sum(1).clamp_min(FLOOR)).mean()
                    errors[kind].setdefault(name, {})[bits] = float(relative)
            tick(0.8 * (i + 1) / len(widths))
        return errors, sizes

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        readers = norm_readers(model)
        with torch.no_grad():
            seen = watch(model, calibration, [name for inputs in readers.values() for name in inputs])
            for norm, inputs in readers.items():
                channels, layers = seen[next(iter(inputs))], list(inputs.values())
                middle, reach = (channels.high + channels.low) / 2, (channels.high - channels.low) / 2
                s = migration(reach, layers, self.alpha)
                smooth(model.get_submodule(norm), layers, s, middle)
                for name in inputs:
                    seen[name].low, seen[name].high = -reach / s, reach / s
            for name, histogram in histograms(model, calibration, seen).items():
                quantizer = model.get_submodule(name)
                if isinstance(quantizer, TwoRegion):
                    quantizer.search(histogram)
                elif isinstance(quantizer, Quantizer) and quantizer.bits == 8:
                    quantizer.set(*quantizer.grid(histogram.low, histogram.high))
                elif isinstance(quantizer, Quantizer):
                    quantizer.set(*search_range(quantizer, histogram))
            tick(0.9)
            for layer in quant_layers(model).values():
                w, q = layer.weight.float().flatten(1), layer.quant_w
                q.set(*(q.grid(*w.aminmax(dim=1)) if q.bits == 8 else search_weight(q, w)))


class TwoRegion(FakeQuantizer):
    """A fine grid where most values lie and a coarse one for the few large ones, each with 2^(bits − 1) levels.

    One bit says which. The coarse levels are `scale`·(0 … L), with L = 2^(bits − 1) − 1; the fine ones are
    `scale`·2^(−m)·(−zero_point … L − zero_point), for GELU gives a little below 0. A value takes the nearer of the fine
    levels and of the coarse levels above them.
    """

    scale: Tensor
    ratio: Tensor
    zero_point: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.last = 2 ** (bits - 1) - 1
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("ratio", torch.zeros((), dtype=torch.int32))  # m
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def quantized(self, x: Tensor) -> Tensor:
        fine = self.scale * torch.exp2(-self.ratio)
        top = fine * (self.last - self.zero_point)
        inside = x.clamp(-fine * self.zero_point, torch.maximum(self.scale * self.last, top))
        first = torch.floor(top / self.scale) + 1  # of the coarse levels above the fine ones

        def nearest(x: Tensor) -> Tensor:
            small = ((x / fine).round() + self.zero_point).clamp(0, self.last).sub(self.zero_point) * fine
            large = (x / self.scale).round().clamp(min=first).clamp(max=self.last) * self.scale
            return torch.where((large - x).abs() < (small - x).abs(), large, small)

        return straight_through(inside, nearest)

    def levels(self, scale: Tensor, ratio: Tensor, zero_point: Tensor) -> Tensor:
        """All levels `[K, 2^bits]` of K grids, ascending; coarse ones that fine ones reach are their highest again."""
        n = torch.arange(self.last + 1, dtype=scale.dtype)
        small = (n - zero_point[:, None]) * (scale * torch.exp2(-ratio))[:, None]
        return torch.cat((small, torch.maximum(n * scale[:, None], small[:, -1:])), dim=1)

    def search(self, seen: Histogram) -> None:
        """OPT-m: of all m, and shares of the greatest value as the highest level, those with the least squared error."""
        greatest = torch.maximum(seen.high, -seen.low).clamp_min(FLOOR)
        ratio, share = torch.cartesian_prod(torch.tensor(RATIOS, dtype=torch.float64), COARSE).T
        scale = share * greatest / self.last
        zero_point = (-seen.low.clamp(max=0) / (scale * torch.exp2(-ratio))).round().clamp(0, self.last)
        best = seen.error(self.levels(scale, ratio, zero_point)).argmin()
        self.scale.copy_(scale[best])
        self.ratio.copy_(ratio[best])
        self.zero_point.copy_(zero_point[best])

    def extra_repr(self) -> str:
        return f"{self.bits} bits, two regions"


Parts = dict[str, list[FakeQuantizer]]


def scouts(images: Tensor) -> Tensor:
    """Those of `[N, C, H, W]` on which Greedy MP tries bits out, see `PIXELS`."""
    return images[: min(SCOUTS, max(1, PIXELS // images[0, 0].numel()))]


def parts(model: nn.Module) -> dict[str, Parts]:
    """What Greedy MP gives bits to: the quantizers of each weight, and of each layer input and attention product."""
    layers = quant_layers(model)
    activations: Parts = {n: [layer.quant_x] for n, layer in layers.items() if isinstance(layer, QuantLinear)}
    for block in (m for m in model.modules() if isinstance(m, PlainBlock)):
        operands = dict(block.attn.operands.items()) if block.attn.operands else {}
        for product, names in (("qk", ("q", "k")), ("av", ("probs", "v"))):
            if found := [q for n, q in operands.items() if n in names and isinstance(q, FakeQuantizer)]:
                activations[f"{block.name}.attn.{product}"] = found
    return {"weights": {n: [layer.quant_w] for n, layer in layers.items()}, "activations": activations}


def before(model: nn.Module, images: Tensor) -> dict[nn.Module, Tensor]:
    """What each block gives when no quantizer is at work, in the order in which they run; none where blocks give up tokens."""
    given: dict[nn.Module, Tensor] = {}

    def keep(block: nn.Module, _: Any, out: Tensor) -> None:
        given[block] = out

    blocks = [m for m in model.modules() if isinstance(m, PlainBlock) and not reduces(model)]
    hooks = [block.register_forward_hook(keep) for block in blocks]
    only(model, [], images, {})
    for hook in hooks:
        hook.remove()
    return given


def only(model: nn.Module, wanted: list[FakeQuantizer], images: Tensor, known: Mapping[nn.Module, Tensor]) -> Tensor:
    """The output `[B, …]`, flattened, with no quantizer at work but those wanted.

    known: what blocks give without quantizers, see `before`; those that run before all that is wanted need not run again.
    """
    others = [m for m in model.modules() if isinstance(m, FakeQuantizer) and m not in wanted]
    blocks = list(known)
    first = next((i for i, block in enumerate(blocks) if any(m in wanted for m in block.modules())), 0)
    # Attention without quantizers needs no probabilities.
    operands = {m: m.operands for m in model.modules() if isinstance(m, PlainAttention)}
    try:
        for attn, own in operands.items():
            attn.operands = own if own and any(m in wanted for m in own.modules()) else None
        for block in blocks[:first]:
            block.forward = lambda *_, given=known[block]: given
        for quantizer in others:
            quantizer.watcher = lambda x: None
        with torch.no_grad():
            return answer(model(images.to(next(model.parameters())))).flatten(1)
    finally:
        for block in blocks[:first]:
            del block.forward
        for quantizer in others:
            quantizer.watcher = None
        for attn, own in operands.items():
            attn.operands = own


def count(model: nn.Module, activations: Parts, images: Tensor) -> dict[str, int]:
    """How many values one image gives to the quantizers of each activation."""
    sizes = dict.fromkeys(activations, 0)

    def counter(name: str):
        def add(x: Tensor) -> None:
            sizes[name] += x.numel()

        return add

    for name, quantizers in activations.items():
        for quantizer in quantizers:
            quantizer.watcher = counter(name)
    try:
        with torch.no_grad():
            model(images[:1].to(next(model.parameters())))
    finally:
        for quantizers in activations.values():
            for quantizer in quantizers:
                quantizer.watcher = None
    return sizes


def greedy(errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average: int) -> dict[str, int]:
    """Bits by name, at most `average` of them over all values.

    From the most bits that `errors` knows, one is taken where its increase of the error, divided by the bits that it
    saves (the number of values), is least, until they are few enough.
    """
    bits = {name: max(known) for name, known in errors.items()}
    while sum(bits[n] * sizes[n] for n in bits) > average * sum(sizes[n] for n in bits):
        lower = {n: (errors[n][b - 1] - errors[n][b]) / sizes[n] for n, b in bits.items() if b - 1 in errors[n]}
        bits[min(lower, key=lower.__getitem__)] -= 1
    return bits
