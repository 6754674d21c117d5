"""AdaLog: logarithmic grids whose base is searched, for what follows softmax and GELU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import PlainAttention
from ..steps import step
from ..work import tick
from .calibration import BATCH, SAMPLES, Watch
from .fpcs import COARSE, fpcs, uniform, uniform_pairs
from .layers import FLOOR, FakeQuantizer, QuantConv2d, Quantizer, QuantLinear, quant_layers, straight_through
from .posttraining import PostTraining, norm_readers
from .reparameterization import channel_grids, reparameterize

R = 37  # bases are powers of 2^(1/37), as published
BASES = range(10, 10 + COARSE)
BEST_BASES = 8
GELU_SHIFT = 0.16997124254703522  # −min GELU
ROUNDS = 2
SKETCH = 64  # random combinations that stand for all tokens, or for all outputs
VALUES = 2**17  # of whole tokens, on which grids of inputs are tried
IMAGES, ROWS = 2, 64  # on which grids of the operands of a product are tried


@step("quant")
@dataclass(frozen=True)
class AdaLog(PostTraining):
    """Wu et al., "AdaLog: Post-Training Quantization for Vision Transformers with Adaptive Logarithm Quantizer", ECCV 2024.

    Softmax and what follows the activation function of an MLP lie on powers of a base that is searched (`AdaLogQuantizer`).
    All else is uniform: weights for each output channel; queries, keys and values for each head; LayerNorm outputs for each
    channel first, then, after RepQ-ViT's reparameterization, for the tensor. Scales, zero points and bases are searched
    together (`fpcs`) for the least squared error of the output, alternating between the input and the weight of a layer, or
    between both operands of a product. Only the channels of LayerNorms are searched for the error of their own values.

    With 8 and 8 bits (deployable; the paper reports 3, 4 and 6) no logarithmic grid is left, for runtimes know none, and
    ranges are exact: that is RepQ with 8 bits. A tensor of 8 bits among others of fewer has an exact range too.

    So that two cores need less than a minute where the paper has a GPU, errors are not taken over all tokens: those of
    weights on 64 random combinations of up to a million input values (a Gaussian sketch, whose expected squared error is
    theirs); those of inputs on tokens of 131072 values in all, and 64 combinations of the outputs; those of products on 64
    queries of 2 images. There are 2 rounds instead of 3, and `fpcs` has fewer steps. The first round takes the other factor
    in floats.

    Other departures: zero points are tried around the one that centres the range (`uniform_pairs`); the shift before the
    logarithm grows where another activation function than GELU needs it; the optional block reconstruction is left out.

    What is quantized, and the parameters, are described at `PostTraining`.
    """

    def softmax_quantizer(self, bits: int) -> FakeQuantizer:
        return AdaLogQuantizer(bits) if bits < 8 else Quantizer(bits)

    def input_quantizer(self, reads: str, bits: int) -> FakeQuantizer:
        return AdaLogQuantizer(bits) if reads == "act" and bits < 8 else Quantizer(bits)

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        super().build(model, plan)
        for layer in quant_layers(model).values():
            if isinstance(layer.quant_x, AdaLogQuantizer) and layer.bias is None:
                layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
        for attn in attentions(model).values():
            for name in "qkv":
                old = attn.operands[name]
                if isinstance(old, Quantizer) and old.bits < 8:
                    attn.operands[name] = HeadQuantizer(old.bits, channels=attn.num_heads).to(old.scale.device)

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        with torch.no_grad():
            inputs, operands = observe(model, calibration)
            for norm, readers in norm_readers(model).items():
                seen = [inputs[name.removesuffix(".quant_x")] for name in readers]
                share_scale(model.get_submodule(norm), list(readers.values()), seen)
            layers, products = quant_layers(model), attentions(model)
            for i, (name, layer) in enumerate(layers.items()):
                tick(i / (len(layers) + len(products)))
                fit_layer(layer, inputs[name])
            for i, (name, attn) in enumerate(products.items(), len(layers)):
                tick(i / (len(layers) + len(products)))
                fit_products(attn.operands, {key: operands.get(f"{name}.operands.{key}") for key in attn.operands})


class AdaLogQuantizer(FakeQuantizer):
    """2^`bits` powers of an adaptive base, and 0 (the paper's AdaLog quantizer, with the constants of the official code).

    With k = round(−log2((x + shift)/scale)·r/q), r = 37, the value is scale·2^(−⌊kq/r⌋)·T[kq mod r]: a shift by whole bits and
    a look-up, where T[j] is 2^(−j/r) in steps of 1/(2^(bits+1) − 2). What lies beyond the last k becomes 0. With `shift`, 0
    after softmax, values below 0 have a logarithm too. It is not taken off again here: the bias of the layer that reads them
    has lost shift·Ŵ1 instead (bias reparameterization).
    """

    scale: Tensor
    shift: Tensor
    q: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("q", torch.tensor(R))

    def quantized(self, x: Tensor) -> Tensor:
        return straight_through(x, lambda x: self.on_grid(x + self.shift, self.scale, self.q).to(x))

    def on_grid(self, x: Tensor, scale: Tensor, q: Tensor) -> Tensor:
        k = (x / scale).clamp_(1e-15, 1).log2_().mul_(-R / q).round_().clamp_(max=2**self.bits)
        return (scale * self.levels(q))[k.long()]

    def levels(self, q: Tensor) -> Tensor:
        """The values at scale 1 in falling order, `[2^bits + 1]`, the last of them 0."""
        steps, kq = 2 ** (self.bits + 1) - 2, torch.arange(2**self.bits, device=q.device) * q
        mantissa = (torch.exp2(-(kq % R) / R) * steps).round() / steps
        return F.pad(torch.exp2(-torch.floor(kq / R)) * mantissa, (0, 1))

    def extra_repr(self) -> str:
        return f"{self.bits} bits, base 2^({int(self.q)}/{R})"


class HeadQuantizer(Quantizer):
    """A uniform fake quantizer with a scale and zero point for each head of `[B, heads, N, d]`."""

    def quantized(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, 1, self.low, self.high)


class WatchHeads:
    """What an operand `[B, heads, N, d]` of a product was: the range of each head, and `rows` tokens (or all) of two images."""

    def __init__(self, rows: int | None) -> None:
        self.rows = rows
        self.low = self.high = self.some = torch.zeros(0)

    def __call__(self, x: Tensor) -> None:
        x = x.detach().float()
        low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
        if len(self.some):
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            return
        self.low, self.high = low, high
        tokens = torch.randperm(x.shape[2])[: self.rows].to(x.device)
        self.some = x[:: max(1, len(x) // IMAGES)][:IMAGES][:, :, tokens].clone()


def attentions(model: nn.Module) -> dict[str, Any]:
    """The attentions with quantized products, by their names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PlainAttention) and m.operands is not None}


def observe(model: nn.Module, images: Tensor) -> tuple[dict[str, Watch], dict[str, WatchHeads]]:
    """Run the float model: what each layer read, as rows `[S, C]`, and the operands of the products, by their names."""
    batches, parameter = images.split(BATCH), next(model.parameters())
    quantizers = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantizer)}
    inputs = {}
    for name, layer in quant_layers(model).items():
        searched = min(layer.quant_x.bits, layer.quant_w.bits) < 8
        inputs[name] = Watch(name, True, SAMPLES // len(batches) if searched else 0)
    operands = {n: WatchHeads(None if n.endswith(".v") else ROWS) for n in quantizers if ".operands." in n}
    watchers: dict[str, Callable[[Tensor], None]] = {**operands}
    for name, layer in quant_layers(model).items():
        watchers[f"{name}.quant_x"] = _unfolded(layer, inputs[name]) if isinstance(layer, QuantConv2d) else inputs[name]
    try:
        for name, quantizer in quantizers.items():
            quantizer.watcher = watchers.get(name, lambda x: None)
        for batch in batches:
            model(batch.to(parameter))
    finally:
        for quantizer in quantizers.values():
            quantizer.watcher = None
    return inputs, operands


def _unfolded(conv: nn.Conv2d, seen: Watch) -> Callable[[Tensor], None]:
    size: Any = (conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return lambda x: seen(F.unfold(x, *size).mT)


def share_scale(norm: nn.Module, layers: list[QuantLinear], seen: list[Watch]) -> None:
    """Give all channels of a LayerNorm's output one scale, and what was seen of it the values that it has then."""
    bits, levels = layers[0].quant_x.bits, 2 ** layers[0].quant_x.bits - 1
    if bits == 8:
        scale, zero_point = channel_grids(seen[0], bits)
    else:
        x, low, high = _some(seen[0].samples), seen[0].low, seen[0].high
        # As in `channel_grids`: a channel that hardly moves must not blow up the weights of the next layer.
        floor = (1e-4 * (high - low).mean() / levels).clamp_min(FLOOR)
        pairs = uniform_pairs(_inner(x, dim=0), (low, high), bits, floor)
        scale, zero_point = fpcs(*pairs, lambda s, z: (uniform(x, s, z, bits) - x).square().mean(0))
    reparameterize(norm, layers, scale, zero_point)
    for layer, watched in zip(layers, seen, strict=True):
        assert isinstance(layer.quant_x, Quantizer)
        shared, shared_zero = layer.quant_x.scale, layer.quant_x.zero_point
        low, high, x = ((x / scale + zero_point - shared_zero) * shared for x in (watched.low, watched.high, watched.samples))
        watched.low, watched.high, watched.parts = low, high, [x]


def fit_layer(layer: QuantLinear | QuantConv2d, seen: Watch) -> None:
    """The grids of input and weight with the least squared error of the layer's output."""
    quant_x, quant_w, x, w = layer.quant_x, layer.quant_w, seen.samples, layer.weight.float().flatten(1)
    low, high = seen.low.min(), seen.high.max()
    if isinstance(quant_x, AdaLogQuantizer):
        quant_x.shift.copy_((-low).clamp_min(GELU_SHIFT))
        quant_x.scale.copy_(high.clamp_min(0) + quant_x.shift)
    elif isinstance(quant_x, Quantizer) and not (isinstance(layer, QuantLinear) and layer.after):
        quant_x.set(*quant_x.grid(low, high))
    quant_w.set(*quant_w.grid(*w.aminmax(dim=1)))
    few, tokens, outputs = _some(x), _sketch(len(x), x), _sketch(len(w), w)
    exact = few @ (w.T @ outputs.T)
    w_hat = w
    for _ in range(ROUNDS if quant_x.bits < 8 or quant_w.bits < 8 else 0):
        if quant_x.bits < 8:
            seen_through = w_hat.T @ outputs.T
            fit_input(quant_x, few, (low, high), lambda y, m=seen_through: (y @ m - exact).square().mean())
        if quant_w.bits < 8:
            x_hat = quant_x.quantized(x) - (quant_x.shift if isinstance(quant_x, AdaLogQuantizer) else 0)
            fit_weight(quant_w, w, tokens @ x_hat, tokens @ x @ w.T)
        w_hat = quant_w.quantized(w)
    if isinstance(quant_x, AdaLogQuantizer):
        assert layer.bias is not None
        layer.bias.sub_(quant_x.shift * quant_w.quantized(w).sum(1))


def fit_input(quantizer: FakeQuantizer, x: Tensor, span: tuple[Tensor, Tensor], error: Callable[[Tensor], Tensor]) -> None:
    """The grid for `x` `[S, C]` with the least error of its values on it; `span` is the range of all values."""
    if isinstance(quantizer, AdaLogQuantizer):

        def log_error(scale: Tensor, q: Tensor) -> Tensor:
            return error(quantizer.on_grid(x + quantizer.shift, scale, q) - quantizer.shift)

        bases = torch.tensor(BASES, dtype=x.dtype, device=x.device)
        losses = torch.stack([log_error(quantizer.scale, q) for q in bases])
        bases = bases[losses.topk(BEST_BASES, largest=False).indices]
        positive = x[x > 0]
        low = torch.quantile(positive, 0.9) if len(positive) else span[1].clamp_min(0)
        scales = torch.linspace(0, 1, COARSE // BEST_BASES).to(x) * (span[1].clamp_min(0) - low) + low + quantizer.shift
        pairs = scales.repeat(BEST_BASES), bases.repeat_interleave(len(scales)), scales[1] - scales[0]
        scale, q = fpcs(*pairs, log_error)
        quantizer.scale.copy_(scale)
        quantizer.q.copy_(q)
    elif isinstance(quantizer, Quantizer):
        bits, outer = quantizer.bits, (span[0].clamp(max=0), span[1].clamp(min=0))
        first, second, spacing = uniform_pairs(_inner(x.flatten(), dim=0), outer, bits)
        second.clamp_(0, quantizer.high)
        quantizer.set(*fpcs(first, second, spacing, lambda s, z: error(uniform(x, s, z, bits))))


def fit_weight(quantizer: Quantizer, w: Tensor, x: Tensor, exact: Tensor) -> None:
    """For each row of `w` `[O, C]` the grid with the least squared error of its products with `x` `[S, C]`; `exact` `[S, O]`."""
    low, high = w.aminmax(dim=1)
    first, second, spacing = uniform_pairs(_inner(w, dim=1), (low.clamp(max=0), high.clamp(min=0)), quantizer.bits)
    second.clamp_(0, quantizer.high)

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        w_hat = uniform(w, scale[:, None], zero_point[:, None], quantizer.bits)
        return (w_hat @ x.T - exact.T).square().mean(1)

    quantizer.set(*fpcs(first, second, spacing, error))


def fit_products(operands: nn.ModuleDict, seen: dict[str, WatchHeads | None]) -> None:
    """The grids of an attention's operands with the least squared errors of both products."""
    for left, right in (("q", "k"), ("probs", "v")):
        a, b = seen[left], seen[right]
        if a and b:
            quantizers: Any = operands[left], operands[right]
            fit_product(quantizers, (a, b), (a.some, b.some.mT if left == "q" else b.some))


def fit_product(
    quantizers: tuple[FakeQuantizer, FakeQuantizer], seen: tuple[WatchHeads, WatchHeads], factors: tuple[Tensor, Tensor]
) -> None:
    exact, now = factors[0] @ factors[1], [*factors]
    for _ in range(ROUNDS):
        for i, (quantizer, factor) in enumerate(zip(quantizers, factors, strict=True)):

            def error(x: Tensor, i: int = i) -> Tensor:
                product = x @ now[1] if i == 0 else now[0] @ x
                return (product - exact).square().mean((0, 2, 3))

            fit_operand(quantizer, factor, seen[i], error)
            now[i] = quantizer.quantized(factor)


def fit_operand(quantizer: FakeQuantizer, x: Tensor, seen: WatchHeads, error: Callable[[Tensor], Tensor]) -> None:
    """The grid of one operand `x` `[I, heads, …, …]`; `error` gives that of each head."""
    if isinstance(quantizer, AdaLogQuantizer):
        bases = torch.tensor(BASES, dtype=x.dtype, device=x.device)
        losses = torch.stack([error(quantizer.on_grid(x, quantizer.scale, q)).mean() for q in bases])
        quantizer.q.copy_(bases[losses.argmin()])
    elif isinstance(quantizer, HeadQuantizer):
        bits, rows = quantizer.bits, x.transpose(0, 1).flatten(1)
        first, second, spacing = uniform_pairs(_inner(rows, 1), (seen.low.clamp(max=0), seen.high.clamp(min=0)), bits)
        second.clamp_(0, quantizer.high)
        column = (-1, 1, 1)
        pair = fpcs(first, second, spacing, lambda s, z: error(uniform(x, s.view(column), z.view(column), bits)))
        quantizer.set(*pair)
    elif isinstance(quantizer, Quantizer) and seen.low.numel() and not quantizer.symmetric:
        quantizer.set(torch.tensor(1 / quantizer.high), torch.tensor(0))  # softmax in 8 bits
    elif isinstance(quantizer, Quantizer):
        quantizer.set(*quantizer.grid(seen.low.min(), seen.high.max()))


def _some(x: Tensor) -> Tensor:
    return x[torch.randperm(len(x))[: -(-VALUES // x.shape[1])].to(x.device)]


def _sketch(n: int, like: Tensor) -> Tensor:
    """`[SKETCH, n]` random combinations that keep squared lengths in expectation; all of few, `[n, n]`."""
    return torch.eye(n).to(like) if n <= SKETCH else (torch.randn(SKETCH, n) / SKETCH**0.5).to(like)


def _inner(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    low, high = torch.quantile(x, x.new_tensor([0.1, 0.9]), dim=dim)
    return low, high
