"""I-ViT: a vision transformer that computes with integers from its first layer to its last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..anatomy.parts import project
from ..blocks import PlainAttention, PlainBlock, Tokens, plain_blocks
from ..errors import VitreousError
from ..operators import matmul_integer, quantize, shift_right
from ..steps import Step, step
from ..work import tick
from . import calibration as images_at_once
from .coverage import coverage
from .integer import (
    INT8,
    INT16,
    SIGMOID_BITS,
    SOFTMAX_BITS,
    Grid,
    IntegerNorm,
    Requantize,
    Scale,
    dequantizing_linear,
    integer_linear,
    shift_gelu,
    shiftmax,
    to_grid,
)

SIGMOID = 1.702  # GELU is nearly x·σ(1.702·x)

Ranges = dict[str, list[float]]  # least and greatest value by name


class IntegerPatches(nn.Module):
    """A patch embedding: images `[B, 3, H, W]` of floats to int8, and these to tokens `[B, C, h, w]` of integers."""

    def __init__(self, conv: nn.Conv2d, x: Grid, out: Grid) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(x.scale, dtype=torch.float32), requires_grad=False)
        self.linear = integer_linear(conv.weight.flatten(1), conv.bias, x, out)
        self.size = cast(tuple[int, int], conv.kernel_size)

    def forward(self, images: Tensor) -> Tensor:
        h, w = (n // side for n, side in zip(images.shape[2:], self.size, strict=True))
        x = quantize(images.float()[..., : h * self.size[0], : w * self.size[1]], self.scale)
        patches = x.unflatten(3, (w, self.size[1])).unflatten(2, (h, self.size[0])).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return self.linear(patches).permute(0, 3, 1, 2)


class IntegerAttention(PlainAttention):
    """Attention on integers: int8 tokens `[B, N, C]` to integers on the residual grid `[B, N, C]`."""

    low_bits = "A8A8"

    one: Tensor
    scale_q: Tensor
    scale_k: Tensor
    scale_scores: Tensor

    def __init__(self, attn: nn.Module, name: str, ranges: Ranges, x: Grid, residual: Grid, gamma: Tensor | None) -> None:
        super().__init__(attn)
        heads, scale = cast(int, attn.num_heads), cast(float, attn.scale)
        weight, bias = joined(attn)
        q, k, v = (Grid.signed(ranges[f"{name}.{part}"]) for part in "qkv")
        each = weight.shape[0] // 3
        out = torch.cat([torch.full((each,), g.scale, dtype=torch.float64) for g in (q, k, v)])
        for old in ("q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias", "qkv"):
            if hasattr(self, old):
                delattr(self, old)
        self.qkv = integer_linear(weight, bias, x, Grid(1.0), out=out)
        self.num_heads = heads
        scores, one = Grid.inverse(ranges[f"{name}.scores"])
        self.scores = Requantize(torch.tensor(q.scale * k.scale * scale / scores.scale), *INT16)
        mixed = Grid.skewed(ranges[f"{name}.proj.in"])
        self.mixed = Requantize(torch.tensor(v.scale / 2**SOFTMAX_BITS / mixed.scale), *INT8, torch.tensor(mixed.zero))
        proj = cast(nn.Linear, attn.proj)
        self.proj = integer_linear(proj.weight, proj.bias, mixed, residual, gamma)
        self.register_buffer("one", torch.tensor(one))
        for part, grid in (("q", q), ("k", k), ("scores", scores)):
            self.register_buffer(f"scale_{part}", torch.tensor(grid.scale, dtype=torch.float32))

    def forward(self, x: Tensor, bias: Tensor | None = None, look: bool = False, fuse: Any = None, turn: Any = None) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.scores(matmul_integer(q, k.mT))
        if bias is not None:
            scores = scores + to_grid(bias, self.scale_scores)
        p = shiftmax(scores, self.one)
        high = shift_right(p, torch.tensor(7, device=p.device))  # 14 bits, as two products of 7
        mixed = matmul_integer(high.to(torch.int8), v) * 2**7 + matmul_integer((p - high * 2**7).to(torch.int8), v)
        y = self.proj(self.mixed(mixed).transpose(1, 2).flatten(2))
        return (y, q.float() * self.scale_q, k.float() * self.scale_k) if look else y


class IntegerMlp(nn.Module):
    """int8 tokens `[B, N, C]` to integers on the residual grid."""

    one: Tensor

    def __init__(self, mlp: Any, name: str, ranges: Ranges, x: Grid, residual: Grid, gamma: Tensor | None) -> None:
        super().__init__()
        inner, one = Grid.inverse(ranges[f"{name}.fc1.out"], SIGMOID)
        self.register_buffer("one", torch.tensor(one))
        hidden = Grid.skewed(ranges[f"{name}.fc2.in"])
        self.fc1 = integer_linear(mlp.fc1.weight, mlp.fc1.bias, x, inner)
        self.act = Requantize(torch.tensor(inner.scale / 2**SIGMOID_BITS / hidden.scale), *INT8, torch.tensor(hidden.zero))
        self.fc2 = integer_linear(mlp.fc2.weight, mlp.fc2.bias, hidden, residual, gamma)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(shift_gelu(self.fc1(x), self.one)))


class IntegerBlock(PlainBlock):
    """A plain block on integers; tokens are 16-bit integers held in int32, each block's output on a grid of its own.

    Reducers are shown floats, and what they return is put on the grid again.
    """

    middle: Tensor  # the scales of the residual after attention, and of the output
    after: Tensor

    def __init__(self, block: PlainBlock, ranges: Ranges, before: Grid, first: bool) -> None:
        super().__init__(block, block.name, block.last)
        self.first = first
        self.reducers = block.reducers
        name = block.name
        middle, after = (Grid.signed(ranges[f"{name}.{place}"], 16) for place in ("mid", "out"))
        x1, x2 = (Grid.skewed(ranges[f"{name}.{layer}.in"]) for layer in ("attn", "mlp"))
        self.norm1, self.norm2 = (IntegerNorm(cast(nn.LayerNorm, n), g) for n, g in ((block.norm1, x1), (block.norm2, x2)))
        self.attn = IntegerAttention(cast(nn.Module, block.attn), f"{name}.attn", ranges, x1, middle, layer_scale(block, 1))
        self.mlp = IntegerMlp(block.mlp, f"{name}.mlp", ranges, x2, after, layer_scale(block, 2))
        self.keep1 = Requantize(torch.tensor(before.scale / middle.scale), *INT16)
        self.keep2 = Requantize(torch.tensor(middle.scale / after.scale), *INT16)
        self.register_buffer("middle", torch.tensor(middle.scale, dtype=torch.float32))
        self.register_buffer("after", torch.tensor(after.scale, dtype=torch.float32))
        for old in ("ls1", "ls2", "gamma_1", "gamma_2"):
            if hasattr(self, old):
                delattr(self, old)

    def forward(self, given: Tensor | Tokens, **_: Any) -> Tensor | Tokens:
        tokens = Tokens.of(given)
        x, bias = tokens.x.clamp(*INT16) if self.first else tokens.x, tokens.bias()
        if self._reducers("ahead"):
            raise VitreousError(f"quant.IViT: tokens cannot be fused inside the integer attention of '{self.name}'")
        y, *seen = self.attn(self.norm1(x), bias, look=True) if len(self.reducers) else (self.attn(self.norm1(x), bias),)
        x = (self.keep1(x) + y).clamp(*INT16)
        for reducer in self._reducers("between"):
            tokens = reducer(tokens._replace(x=x.float() * self.middle), *seen, bias, self)
            x, seen = to_grid(tokens.x, self.middle), [None, None]  # as in a PlainBlock
        x = (self.keep2(x) + self.mlp(self.norm2(x))).clamp(*INT16)
        for reducer in self._reducers("after"):
            tokens = reducer(tokens._replace(x=x.float() * self.after), *seen, bias, self)
            x = to_grid(tokens.x, self.after)
        return tokens._replace(x=x).handed_on(self.last)


@step("quant")
@dataclass(frozen=True)
class IViT(Step):
    """Li & Gu, "I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference", ICCV 2023.

    Images are rounded to int8 once, logits scaled to floats once, and all between is integers: products of 8-bit operands
    in int32, dyadic requantization (section 3.2), Shiftmax, ShiftGELU and I-LayerNorm on wider integers, 16-bit residuals.
    Weights are int8 for each output, LayerScale is part of the requantization. ONNX Runtime executes the same integers, the
    products as MatMulInteger; OpenVINO's CPU plugin has no 64-bit integers and cannot.

    For models of plain blocks with LayerNorm, GELU and a class token. Token steps work on them too, each in floats for as
    long as it chooses and merges tokens. The paper fine-tunes the integers; here they are only calibrated, and cannot be
    trained.

    Departures from the paper and its code:

    - What a matrix product reads is int8 with a zero point, which moves into the next bias; queries, keys and values have a
      scale each. Published: symmetric, one scale. Softmax has 14 bits, published 8, in the code 15: two products of 7.
    - Shiftmax and ShiftGELU read 16 bits, not 8, on steps of 1/n for an integer n. They need 1 as an integer, and with 8 bits
      rounding that changes the temperature, by a fifth where scores reach 30.
    - ShiftGELU subtracts max(x, 0) before exponentiation, not the greatest of the token: beside a channel of 10, which real
      models have, the published form gives σ = 1/2 to what is negative.
    - I-LayerNorm keeps 8 bits of the mean's fraction, and its square root starts near the result, as in the paper; the code
      starts at 2^16 and stops before it has converged to what is small. Its affine is part of the requantization, for the
      code divides by the weight, which may be 0. The same holds for biases.
    - Projections are requantized to the residual's 16 bits at once, without a grid in between. Multipliers have 24 bits, not
      31; halves are rounded up, not to even.
    - Ranges are the least and greatest values over the calibration images in the float model, not running means.
    """

    needs_calibration: ClassVar[bool] = True
    wide: ClassVar[bool] = True
    plans: ClassVar[dict[str, Any]] = {"ranges": dict[str, list[float]], "outside": dict[str, str]}
    deployable: ClassVar[bool] = True

    def refuse_after(self, done: Sequence[Step]) -> str:
        if any(s.family == "quant" for s in done):
            return "the model is quantized already, a second grid would only add its error; start from the float model"
        return ""

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        assert calibration is not None
        if len(calibration) == 0:
            raise VitreousError(f"{self.name} was given no calibration images: give at least one, 32 are usual")
        blocks = plain_blocks(model, self.name)
        if (pool := read(model).pool) not in (None, "", "token"):
            raise VitreousError(f"{self.name} needs a model that reads its class token; this one pools by '{pool}', in floats")
        for block in blocks:
            if reason := why_not(block):
                raise VitreousError(f"{self.name} has no integers for the block '{block.name}': {reason}; use another quantizer")
        return survey(model, blocks, calibration)

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        ranges, outside = plan["ranges"], plan["outside"]
        blocks = plain_blocks(model, self.name)
        first = blocks[0].name
        tokens = Grid.signed(ranges["tokens"], 16)
        parts = first.split(".")
        for owner in (model.get_submodule(".".join(parts[:i])) for i in range(len(parts))):
            for name, tensor in list(owner.named_parameters(recurse=False)):  # class tokens and positions
                delattr(owner, name)
                owner.register_buffer(name, (tensor.detach().double() / tokens.scale).round().to(torch.int32))
        before = tokens
        for name, kind in outside.items():
            if kind == "before":
                before = Grid.signed(ranges[f"{first}.in"], 16)
                put(model, name, IntegerNorm(cast(nn.LayerNorm, model.get_submodule(name)), before))
        for block in blocks:
            new = IntegerBlock(block, ranges, before, first=block is blocks[0])
            put(model, block.name, new)
            before = Grid.signed(ranges[f"{block.name}.out"], 16)
        heads = [name for name, kind in outside.items() if kind == "head"]
        for name, kind in outside.items():
            layer: Any = model.get_submodule(name)
            if kind == "patches":
                put(model, name, IntegerPatches(layer, Grid.signed(ranges[f"{name}.in"]), tokens))
            elif kind == "head":
                put(model, name, dequantizing_linear(layer, Grid.skewed(ranges[f"{heads[0]}.in"])))
            elif kind == "after" and heads:
                put(model, name, IntegerNorm(layer, Grid.skewed(ranges[f"{heads[0]}.in"])))
            elif kind == "after":
                out = Grid.signed(ranges[f"{name}.out"], 16)
                put(model, name, nn.Sequential(IntegerNorm(layer, out), Scale(torch.tensor(out.scale))))

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        """All is fitted; one image shows whether integers pass through what the model does outside of its blocks."""
        assert calibration is not None
        try:
            with torch.no_grad():
                model(calibration[:1].to(next(model.parameters()).device))
        except VitreousError:
            raise
        except Exception as error:  # whatever a stranger's forward does when it is given integers
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise VitreousError(
                f"{self.name}: {type(model).__name__} does not run on integers outside of its blocks: {reason}"
            ) from error

    def covers(self, model: nn.Module, calibration: Tensor | None) -> str:
        return str(coverage(model, calibration))


def joined(attn: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of queries, keys and values together."""
    if getattr(attn, "qkv", None) is None:
        parts = (attn.q_proj, attn.k_proj, attn.v_proj)
        weight = torch.cat([p.weight for p in parts])
        return weight, torch.cat([weight.new_zeros(p.out_features) if p.bias is None else p.bias for p in parts])
    if getattr(attn, "q_bias", None) is not None:
        return attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return attn.qkv.weight, attn.qkv.bias


def layer_scale(block: Any, number: int) -> Tensor | None:
    gamma = getattr(block, f"gamma_{number}", None)
    return gamma if gamma is not None else getattr(getattr(block, f"ls{number}", None), "gamma", None)


def why_not(block: PlainBlock) -> str:
    """What of a block I-ViT has no integer form for; empty when it has."""
    attn, mlp = cast(Any, block.attn), cast(Any, block.mlp)
    if attn.position is not None:
        return f"its attention knows places ({attn.position.kind})"
    if any(not isinstance(getattr(attn, n, nn.Identity()), nn.Identity) for n in ("q_norm", "k_norm", "norm")):
        return "its attention normalizes inside"
    if getattr(attn, "gate", None) is not None:
        return "its attention is gated"
    if not isinstance(block.norm1, nn.LayerNorm) or not isinstance(block.norm2, nn.LayerNorm):
        return f"it has a {type(block.norm1).__name__} where a LayerNorm is needed"
    if any(getattr(r, "place", "") == "ahead" for r in block.reducers):
        return "its tokens are fused inside the attention"
    if block.prompts is not None or hasattr(block, "meta") or block._forward_pre_hooks:
        return "tokens that it learnt join the others there"
    if not all(isinstance(getattr(mlp, n, None), nn.Linear) for n in ("fc1", "fc2")) or not hasattr(mlp, "act"):
        return "its MLP is not two linear layers"
    x = torch.linspace(-6, 6, 101, device=mlp.fc1.weight.device, dtype=mlp.fc1.weight.dtype)
    if (mlp.act(x) - nn.functional.gelu(x)).abs().max() > 0.05:
        return f"its MLP has {type(mlp.act).__name__} where GELU is needed"
    x = torch.randn(4, mlp.fc1.in_features, generator=torch.Generator().manual_seed(0)).to(x)
    if mlp.fc1.out_features != mlp.fc2.in_features or not torch.allclose(mlp(x), mlp.fc2(mlp.act(mlp.fc1(x))), rtol=1e-2):
        return "its MLP does more than two linear layers and GELU"
    return ""


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.to(next(model.parameters()).device))


def survey(model: nn.Module, blocks: list[PlainBlock], images: Tensor) -> dict[str, Any]:
    """What `build` needs to know of the float model: the ranges of its activations, and what runs outside of its blocks.

    Layers outside are "patches", a LayerNorm "before" or "after" the blocks, or a "head".
    """
    ranges: Ranges = {}
    outside: dict[str, str] = {}
    names = {m: n for n, m in model.named_modules()}
    inside = {m for b in blocks for m in b.modules()}
    started = False

    def see(key: str, x: Tensor) -> None:
        low, high = (float(v) for v in x.detach().float().aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise VitreousError(
                f"'{key}' is given NaN or infinity on the calibration images: check the transform and the weights"
            )
        a, b = ranges.get(key, [low, high])
        ranges[key] = [min(a, low), max(b, high)]

    def layer_in(m: nn.Module, given: Any) -> None:
        see(f"{names[m]}.in", given[0])

    def layer_out(m: nn.Module, _: Any, out: Tensor) -> None:
        see(f"{names[m]}.out", Tokens.of(out).x)

    def attention(m: nn.Module, given: Any) -> None:
        a = cast(Any, m)
        q, k, v = project(m, given[0])
        for part, x in zip("qkv", (q, k, v), strict=True):
            see(f"{names[m]}.{part}", x)
        scores = q * a.scale @ k.mT
        see(f"{names[m]}.scores", scores if len(given) < 2 or given[1] is None else scores + given[1])

    def block_in(m: nn.Module, given: Any) -> None:
        nonlocal started
        if m is blocks[0] and not any(kind == "before" for kind in outside.values()):
            see("tokens", Tokens.of(given[0]).x)
        started = True
        see(f"{names[m]}.in", Tokens.of(given[0]).x)

    def other(m: nn.Module, given: Any) -> None:
        if isinstance(m, nn.Conv2d):
            outside[names[m]] = "patches"
        elif isinstance(m, nn.Linear):
            outside[names[m]] = "head"
        else:
            outside[names[m]] = "after" if started else "before"
            if not started:
                see("tokens", given[0])
        see(f"{names[m]}.in", given[0])

    handles: list[Any] = []
    for block in blocks:
        b: Any = block
        handles += [
            b.register_forward_pre_hook(block_in),
            b.register_forward_hook(layer_out),
            b.attn.register_forward_pre_hook(layer_in),
            b.attn.register_forward_pre_hook(attention),
            b.attn.proj.register_forward_pre_hook(layer_in),
            b.norm2.register_forward_pre_hook(lambda m, given, b=b: see(f"{b.name}.mid", given[0])),
            b.mlp.register_forward_pre_hook(layer_in),
            b.mlp.fc1.register_forward_hook(layer_out),
            b.mlp.fc2.register_forward_pre_hook(layer_in),
        ]
    for m in model.modules():
        if m not in inside and isinstance(m, (nn.Conv2d, nn.Linear, nn.LayerNorm)):
            handles += [m.register_forward_pre_hook(other), m.register_forward_hook(layer_out)]
    parameter = next(model.parameters())
    batches = images.split(images_at_once.BATCH)
    try:
        with torch.no_grad():
            for i, batch in enumerate(batches):
                started = False
                model(batch.to(parameter))
                tick((i + 1) / len(batches))
    finally:
        for handle in handles:
            handle.remove()
    return {"ranges": ranges, "outside": outside}
