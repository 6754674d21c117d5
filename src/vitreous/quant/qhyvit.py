"""Q-HyViT: models of convolution and attention, where the grids of the layers at the border of the two are chosen together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import answer
from ..score import two
from ..steps import step
from ..work import part, tick
from .bridges import BORDER_IMAGES, FEW, Bridge, bridges, damped, floats, running_order
from .calibration import BATCH, watch
from .folding import LAYERS, fold, foldable
from .layers import FakeQuantizer, QuantConv2d, Quantizer, QuantLinear, quant_layers
from .posttraining import PostTraining

ROWS = 256  # products of a layer that its own search looks at
ROUNDS = 3
FACTORS = torch.linspace(0.01, 1.2, 101)  # of the full range: α, β and n of the official code
STRIDE = 5  # every fifth factor is tried on a quarter of the rows, then those around the best on all
ENOUGH = 0.99  # a round that leaves more than this share of the error is the last
NEAR = (1.0, 0.8, 0.9, 1.1, 1.2)  # of a kind's own best scale: what is tried on a whole bridge block

Grid = tuple[Tensor, Tensor]  # scale and zero point


@step("quant")
@dataclass(frozen=True)
class QHyViT(PostTraining):
    """Lee et al., "Q-HyViT: Post-Training Quantization of Hybrid Vision Transformers with Bridge Block Reconstruction for
    IoT Systems", IEEE Internet of Things Journal 2024 (arXiv 2303.12557).

    For models that mix convolution and attention (MobileViT, MobileViTv2, EfficientFormer, EfficientFormerV2; also plain
    ViTs and plain convolutional models). All convolutions and linear layers are quantized, after batch normalization is
    folded into the layer before it; layer and group normalization stay in floats (the paper's "partial" quantization).
    Every layer gets the granularity (one range for the tensor or for each channel), the scheme (symmetric or asymmetric)
    and the scale that minimize E[ΔOᵀ diag((∂L/∂O)²) ΔO], by turns for weights and inputs, three rounds (equation 9 and
    algorithm 1). L is the KL divergence of the model quantized by min-max from the float model. O is the layer's own
    output; for the layers of a bridge block it is the block's output, behind all of its quantized layers.

    A bridge block is found by running an image: the last convolution before a transformer block, and the layers of its
    attention that read the block's input (the official code lists the same pairs by number, for MobileViT).

    Highly dynamic ranges are met by a scale for each channel. An input may have one where a depthwise convolution reads
    it (as in the official code: elsewhere integers of different channels would be added). Zero points cannot overflow:
    ranges are widened to hold 0, and where that wastes levels the search finds the symmetric scheme or a channel's own.

    With 8 and 8 bits (deployable) only what kernels execute is open: weights are symmetric, inputs have one range.
    Symmetric inputs then have zero point 128, the same grid as int8 in the paper. 8-bit weights are always symmetric.

    Departures: the layers' own search draws 256 of the products of at most 32 images, rows of large inputs more often
    (and counted less), tries every fifth of the 101 scales, then those around the best, and ends when a round gains less
    than 1 %; on a bridge block only the best scale of each kind and four near it are tried, with 8 images. Gradients are
    taken once, with min-max grids everywhere, as in the paper; the official code takes them layer by layer. To the
    squared slopes their mean over the layer is added: alone they leave most outputs free, which narrow grids then ruin.
    How much of it was chosen on one small random MobileViT, and no trained hybrid has been measured. The
    convolution that reads the image does so in 8 bits. In plain blocks the operands of attention are quantized by
    min-max, elsewhere (in all hybrids named above) these products stay in floats. Subclasses of convolution with a
    forward of their own are not quantized. The paper's fifth family, Mobile-Former, is not in timm.

    What else is quantized, and the parameters, are described at `PostTraining`.
    """

    plans: ClassVar[dict[str, Any]] = {**PostTraining.plans, "folds": list[list[str]]}

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        plan = super().plan(model, calibration)
        assert calibration is not None
        image = calibration[:1].to(next(model.parameters()))
        ran = running_order(model, image)
        layers = [n for n, _ in ran if type(model.get_submodule(n)) is nn.Conv2d or n in plan["layers"]]
        layers = [n for n in dict.fromkeys(layers) if type(model.get_submodule(n)) in LAYERS]
        bits = {n: [self.weights, 8] for n, read in ran if read is image and n in layers}
        return {**plan, "layers": {n: ["", ""] for n in layers}, "bits": bits, "folds": foldable(model, image)}

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        fold(model, plan["folds"])
        linear = {n: read for n, read in plan["layers"].items() if isinstance(model.get_submodule(n), nn.Linear)}
        super().build(model, {**plan, "layers": linear, "bits": {}})
        limit = 63 if plan["reduce_range"] else None
        for name in plan["layers"]:
            if name in linear:
                continue
            conv = model.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            w_bits, x_bits = plan["bits"].get(name, (self.weights, self.activations))
            w = Quantizer(w_bits, symmetric=w_bits == 8, limit=limit if w_bits == 8 else None, channels=conv.out_channels)
            by_channel = conv.groups == conv.in_channels > 1 and not self.deployable
            x = ImageQuantizer(x_bits, channels=conv.in_channels) if by_channel else Quantizer(x_bits)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantConv2d(conv, x, w).to(conv.weight.device))

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        layers = quant_layers(model)
        by_channel = [f"{n}.quant_x" for n, layer in layers.items() if isinstance(layer.quant_x, ImageQuantizer)]
        ranges = watch(model, calibration, by_channel)
        for name, seen in ranges.items():
            quantizer = model.get_submodule(name)
            assert isinstance(quantizer, Quantizer)
            quantizer.set(*quantizer.grid(seen.low, seen.high))
        for layer in layers.values():
            layer.quant_w.set(*layer.quant_w.grid(*layer.weight.detach().float().flatten(1).aminmax(dim=1)))
        images = calibration[:BATCH].to(next(model.parameters()))
        borders = bridges(model, images[:1])
        within = {n for border in borders for n in border}
        ran = [n for n in dict.fromkeys(n for n, _ in running_order(model, images[:1])) if n in layers]
        drawn, slopes = observe(model, {n: layers[n] for n in ran}, images, {n for border in borders for n in border[1:]})
        fits = {n: LayerFit(layers[n], *drawn[n], ranges[f"{n}.quant_x"].low, ranges[f"{n}.quant_x"].high) for n in ran}
        todo = [[n] for n in ran if n not in within] + borders
        for done, names in enumerate(todo):
            kept = part(names[0], functools.partial(_grids, model, names, fits, images, slopes))
            for key, value in kept.items():
                model.get_buffer(key).copy_(value)
            tick((done + 1) / len(todo))
        with torch.no_grad():
            for layer in layers.values():
                if layer.quant_w.symmetric:  # beyond its range a narrowed grid has integers that a kernel may overflow on
                    most = (layer.quant_w.scale * layer.quant_w.limit).reshape(-1, *[1] * (layer.weight.ndim - 1))
                    layer.weight.copy_(layer.weight.clamp(-most, most))


class ImageQuantizer(Quantizer):
    """One scale and zero point for each channel of feature maps `[B, C, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.watcher is not None:
            self.watcher(x.movedim(1, -1))
            return x
        return self.quantized(x)

    def quantized(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, 1, self.low, self.high)


def choices(model: nn.Module) -> dict[str, str]:
    """What was chosen for the weights and inputs of each quantized layer: "channel symmetric, layer asymmetric"."""

    def kind(q: FakeQuantizer) -> str:
        assert isinstance(q, Quantizer)
        fine = q.scale.numel() > 1 and bool((q.scale != q.scale.flatten()[0]).any() | (q.zero_point != q.zero_point[0]).any())
        even = q.symmetric or bool((q.zero_point == 2 ** (q.bits - 1)).all())
        return f"{'channel' if fine else 'layer'} {'symmetric' if even else 'asymmetric'}"

    return {name: f"{kind(layer.quant_w)}, {kind(layer.quant_x)}" for name, layer in quant_layers(model).items()}


# ---- what the search looks at


def observe(
    model: nn.Module, layers: dict[str, QuantLinear | QuantConv2d], images: Tensor, whole: set[str]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, list[Tensor]]]:
    """For each layer rows of its float inputs `[G, S, K]` and the weight of each of its outputs there, `[G, S, O/G]`.

    A layer is G products (of its groups) of K inputs. The weight is the squared slope of the loss; rows are drawn by their
    share of the inputs' energy, half uniformly, and weighted so that sums over them estimate sums over all. Also the
    squared slopes at all outputs of the layers in `whole`, a tensor for each of the first batches of `FEW` images.
    """
    x_parts: dict[str, list[Tensor]] = {n: [] for n in layers}
    g_parts: dict[str, list[Tensor]] = {n: [] for n in layers}
    slopes: dict[str, list[Tensor]] = {n: [] for n in whole}
    rows = max(1, ROWS * FEW // max(len(images), FEW))
    picked: dict[str, tuple[Tensor, Tensor]] = {}
    made: dict[str, Tensor] = {}

    def draw(layer: Any, given: tuple[Tensor, ...], _: Tensor, name: str) -> None:
        if name not in picked:
            chance = _energy(layer, given[0])
            chance = chance / chance.sum().clamp_min(1e-30) / 2 + 0.5 / len(chance)
            pick = torch.multinomial(chance, rows, replacement=True)
            picked[name] = (pick, 1 / (chance[pick] * rows))
            x_parts[name].append(_rows(layer, given[0], pick).float())

    def keep(_: nn.Module, __: Any, out: Tensor, name: str) -> Tensor:
        made.setdefault(name, out)
        return out.clone()  # what follows may write into its input

    @contextmanager
    def hooked(hook: Callable[..., Any]) -> Iterator[None]:
        handles = [m.register_forward_hook(functools.partial(hook, name=n)) for n, m in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    for i, batch in enumerate(images.split(FEW)):
        picked.clear()
        made.clear()
        with torch.no_grad(), floats(model), hooked(draw):
            expected = two(answer(model(batch)).flatten(1))
        with torch.enable_grad(), hooked(keep):
            out = two(answer(model(batch.clone().requires_grad_())).flatten(1))
            loss = F.kl_div(out.log_softmax(-1), expected.softmax(-1), reduction="sum")
            slope = torch.autograd.grad(loss, list(made.values()), allow_unused=True)
        for name, g in zip(made, slope, strict=True):
            pick, weight = picked[name]
            g = torch.zeros_like(made[name]) if g is None else g.square()
            if name in whole and i * FEW < BORDER_IMAGES:
                slopes[name].append(g)
            g = (g if isinstance(layers[name], nn.Linear) else g.movedim(1, -1)).reshape(-1, layers[name].weight.shape[0])
            g_parts[name].append(g[pick] * weight[:, None])
    drawn = {}
    for name in layers:
        x, g = torch.cat(x_parts[name], 1), torch.cat(g_parts[name])
        drawn[name] = (x, g.unflatten(1, (len(x), -1)).transpose(0, 1))
    return drawn, slopes


def _energy(layer: Any, x: Tensor) -> Tensor:
    """The sum of squares that each of the layer's products reads, `[rows]`."""
    if isinstance(layer, nn.Linear):
        return x.square().sum(-1).flatten()
    energy = _padded(layer, x).square().sum(1, keepdim=True)
    ones = energy.new_ones(1, 1, *layer.kernel_size)
    return F.conv2d(energy, ones, stride=layer.stride, dilation=layer.dilation).flatten().clamp_min(0)


def _rows(layer: Any, x: Tensor, pick: Tensor) -> Tensor:
    """What the products number `pick` of a layer read: `[groups, S, inputs of a group]`, in the order of its weights."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[pick][None]
    x = _padded(layer, x)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    height, width = ((n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[2:], (dh, dw), (kh, kw), (sh, sw), strict=True))
    b, top, left = pick // (height * width), pick // width % height * sh, pick % width * sw
    taps = [x[b, :, top + i * dh, left + j * dw] for i in range(kh) for j in range(kw)]
    return torch.stack(taps, -1).reshape(len(pick), layer.groups, -1).transpose(0, 1)


def _padded(conv: Any, x: Tensor) -> Tensor:
    return F.pad(x, conv._reversed_padding_repeated_twice, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)


# ---- one layer: its own output


class LayerFit:
    """The search for one layer's grids by the error of its own output, on drawn rows."""

    def __init__(self, layer: QuantLinear | QuantConv2d, x: Tensor, slopes: Tensor, low: Tensor, high: Tensor) -> None:
        self.layer, self.x, self.low, self.high = layer, x, low, high
        self.w = layer.weight.detach().float().reshape(len(x), -1, x.shape[-1])  # [G, O/G, K]
        self.y = x @ self.w.mT
        self.found: dict[tuple[str, int, bool], Tensor] = {}  # for each kind of grid the number of its best factor
        self.slopes = damped(slopes)

    def side(self, what: str) -> Quantizer:
        quantizer = self.layer.quant_w if what == "w" else self.layer.quant_x
        assert isinstance(quantizer, Quantizer)
        return quantizer

    def quantized(self, what: str, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Weights `[G, O/G, K]` or inputs `[G, S, K]` on each of the grids `[c, ...]`: with `c` inserted behind G."""
        q = self.side(what)
        least, most = (-q.limit, q.limit) if q.symmetric else (0, q.high)
        # [c, O], [c, channels] or [c, 1] to [G or 1, c, O/G or 1, 1]
        groups = len(self.x) if scale.shape[-1] > 1 else 1
        scale, zero = (t.reshape(len(t), groups, -1, 1).transpose(0, 1) for t in (scale, zero))
        return (((values[:, None] / scale).round_() + zero).clamp_(least, most) - zero).mul_(scale)

    def errors(self, what: str, scale: Tensor, zero: Tensor, every: int = 1) -> Tensor:
        """The weighted error of each output `[c, O]` under candidate grids `[c, ...]` for one side; the other's stay."""
        x, y, slopes = (t[:, ::every] for t in (self.x, self.y, self.slopes))
        other = "x" if what == "w" else "w"
        q = self.side(other)
        now = q.scale.reshape(1, -1), q.zero_point.float().reshape(1, -1)
        fixed = self.quantized(other, x if other == "x" else self.w, *now)[:, 0]
        found = []
        most = max(1, 2**20 // max(y.numel(), self.w.numel() if what == "w" else x.numel()))
        for s, z in zip(scale.split(most), zero.split(most), strict=True):
            tried = self.quantized(what, self.w if what == "w" else x, s, z)  # [G, c, O/G or S, K]
            if what == "w":
                out = (fixed @ tried.flatten(1, 2).mT).unflatten(2, (len(s), -1)).transpose(1, 2)
            else:
                out = (tried.flatten(1, 2) @ fixed.mT).unflatten(1, (len(s), -1))
            found.append((out - y[:, None]).square_().mul_(slopes[:, None]).sum(2).transpose(0, 1).flatten(1))
        return torch.cat(found)

    def options(self, what: str) -> list[tuple[Grid, float]]:
        """The best grid of each kind (granularity and scheme) that the side may have, with its error."""
        q = self.side(what)
        low, high = self.w.flatten(0, 1).aminmax(dim=1) if what == "w" else (self.low.reshape(-1), self.high.reshape(-1))
        spans = [(low, high, len(low))]
        if len(low) > 1:  # one range for all comes first: ranges for each must be better to be taken
            spans.insert(0, (low.min().expand_as(low), high.max().expand_as(high), 1))
        schemes = (True,) if q.symmetric else (True, False)
        return [self._best(what, *span, even) for span in spans for even in schemes]

    def _best(self, what: str, low: Tensor, high: Tensor, channels: int, symmetric: bool) -> tuple[Grid, float]:
        """Of the factors that narrow a range the best, for each of `channels` its own."""
        factors = FACTORS.to(low.device)

        def grid(index: Tensor) -> Grid:
            return _grid(self.side(what), low * factors[index], high * factors[index], symmetric)

        def errors(index: Tensor, every: int = 1) -> Tensor:
            return self.errors(what, *grid(index), every).unflatten(1, (channels, -1)).sum(2)

        kind = what, channels, symmetric
        if kind not in self.found:  # later rounds go on from there
            index = torch.arange(0, len(factors), STRIDE, device=low.device)[:, None].expand(-1, channels)
            self.found[kind] = index.gather(0, errors(index, 4).argmin(0, keepdim=True))
        index = self.found[kind] + torch.arange(1 - STRIDE, STRIDE, device=low.device)[:, None]
        index = index.clamp(0, len(factors) - 1)
        least, at = errors(index).min(0, keepdim=True)
        self.found[kind] = index.gather(0, at)
        return grid(self.found[kind]), float(least.sum())

    def run(self) -> None:
        """By turns the best weights and inputs; a side keeps the grid it has when none is better."""
        before = torch.inf
        for _ in range(ROUNDS):
            now = torch.inf
            for what in ("w", "x"):
                q = self.side(what)
                now = float(self.errors(what, q.scale.reshape(1, -1), q.zero_point.float().reshape(1, -1)).sum())
                grid, error = min(self.options(what), key=lambda option: option[1])
                if error < now:
                    q.set(*grid)
                    now = error
            if now >= ENOUGH * before:
                return
            before = now


def _grid(q: Quantizer, low: Tensor, high: Tensor, symmetric: bool) -> Grid:
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = q.grid(low, high)
    return scale, (torch.full_like(zero, 2 ** (q.bits - 1)) if symmetric and not q.symmetric else zero)


# ---- a bridge block: its output, behind all of its layers


def _grids(
    model: nn.Module, names: list[str], fits: dict[str, LayerFit], images: Tensor, slopes: dict[str, list[Tensor]]
) -> dict[str, Tensor]:
    """Search the grids of one layer, or of the layers of a bridge block; the buffers that hold them."""
    for name in names:
        fits[name].run()
    if len(names) > 1:
        _reconstruct(model, names, fits, images, slopes)
    return {f"{n}.{b}": t for n in names for b, t in model.get_submodule(n).named_buffers() if b.startswith("quant_")}


def _reconstruct(
    model: nn.Module, names: list[str], fits: dict[str, LayerFit], images: Tensor, slopes: dict[str, list[Tensor]]
) -> None:
    """By turns for weights and inputs of each layer: of every kind's best grids the one that serves the block's output."""
    bridge = Bridge(model, names, images, slopes)
    with floats(model, but=names):
        least = bridge.error()
        for _ in range(ROUNDS):
            before = least
            for name in names:
                for what in ("w", "x"):
                    q = fits[name].side(what)
                    best = q.scale.clone(), q.zero_point.clone()
                    for (scale, zero), _ in fits[name].options(what):
                        for factor in NEAR:
                            q.set(scale * factor, zero)
                            error = bridge.error()
                            if error < least:
                                least, best = error, (q.scale.clone(), q.zero_point.clone())
                    q.set(*best)
            if least > ENOUGH * before:
                return
