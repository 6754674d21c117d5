"""Guesses at what is what in a block: by structure, by what each module was given when the block ran, and, first, by names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYOUTS = ("3 heads d", "heads 3 d", "heads d 3")  # of the outputs of one layer for queries, keys and values
ACTIVATIONS = (F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.relu, F.silu, lambda x: x * torch.sigmoid(1.702 * x))


class NotPlain(Exception):
    """Why a block is not plain."""


@dataclass
class Call:
    """One module that ran: what it was given first, and what it gave."""

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor


def is_norm(m: nn.Module) -> bool:
    return "norm" in type(m).__name__.lower() and not hasattr(m, "running_mean") and not any(True for _ in m.children())


def is_linear(m: nn.Module) -> bool:
    """Linear layers, and what wraps them as one (LoRA)."""
    return hasattr(m, "in_features") and hasattr(m, "out_features")


def _linears(m: nn.Module) -> dict[str, Any]:
    """The linear layers in a module, not those inside of another."""
    found: dict[str, Any] = {}
    for name, layer in m.named_modules():
        if is_linear(layer) and not any(name.startswith(outer + ".") for outer in found):
            found[name] = layer
    return found


def candidates(block: nn.Module, attention: nn.Module, calls: list[Call], x: Tensor) -> Iterator[nn.Module]:
    """Guesses at the parts of a block, the likeliest first."""
    own = all(isinstance(getattr(block, n, None), nn.Module) for n in ("norm1", "attn", "norm2", "mlp"))
    if own and block.attn is attention and _projects(attention):
        attn: Any = attention
        if getattr(attn, "num_heads", None) and isinstance(getattr(attn, "scale", None), float):
            yield block
            return
    inside = set(attention.modules())
    norms = [c for c in calls if is_norm(c.module) and c.x.shape == x.shape]
    first = next((c for c in norms if torch.equal(c.x, x)), None)
    second = next((c for c in norms if c.module not in inside and not torch.equal(c.x, x)), None)
    if first is None or second is None:
        missing = "before its attention" if first is None else "before its MLP"
        raise NotPlain(f"no norm reads the tokens {missing}: it is not pre-norm")
    found = nn.Module()
    found.norm1, found.norm2 = first.module, second.module
    found.mlp = _mlp(second, calls, inside)
    _scales(found, block, attention, x.shape[-1])
    for attn in _attentions(block, attention, x.shape[-1], calls):
        found.attn = attn
        yield found


def _projects(attention: nn.Module) -> bool:
    a: Any = attention
    made = getattr(a, "qkv", None) is not None or all(getattr(a, f"{n}_proj", None) is not None for n in "qkv")
    return made and isinstance(getattr(a, "proj", None), nn.Module)


def _mlp(norm: Call, calls: list[Call], inside: set[nn.Module]) -> nn.Module:
    """What reads the second norm, up to the end of the block."""
    for c in calls:  # a module that holds both the norm and the MLP
        if norm.module in set(c.module.modules()) and c.module is not norm.module and c.x is norm.x:
            whole = c.module
            while not isinstance(whole, nn.Sequential) and len(list(whole.children())) == 1:
                whole = next(whole.children())
            if isinstance(whole, nn.Sequential) and whole[0] is norm.module:
                return nn.Sequential(*list(whole)[1:])
            raise NotPlain(f"its norm lies inside '{c.name}', where it cannot be told from the MLP")
    chain, value = [], norm.y
    start = next((i for i, c in enumerate(calls) if c is norm), 0)
    todo = [c for c in calls[start + 1 :] if c.module not in inside]
    while True:
        # Inner modules end first: of those that read the same, the last to end is the outermost.
        readers = [c for c in todo if c.x is value and c.module not in chain]
        if readers:
            chain.append(readers[-1].module)
            value = readers[-1].y
            continue
        later = ((c, f) for c in todo if chain and is_linear(c.module) for f in ACTIVATIONS if _applied(f, value, c.x))
        call, function = next(later, (None, None))
        if call is None:
            break
        chain.append(Function(function))
        value = call.x
    if not any(_linears(m) for m in chain):
        raise NotPlain("no MLP reads its second norm")
    while chain and not any(True for _ in chain[-1].parameters()):  # dropout and stochastic depth are looked for apart
        chain.pop()
    while len(chain) > 1 and _is_scale(chain[-1], norm.y.shape[-1]):
        chain.pop()
    return chain[0] if len(chain) == 1 else nn.Sequential(*chain)


class Function(nn.Module):
    """An activation function that a block calls without a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _applied(function: Any, x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(function(x), y, rtol=1e-5, atol=1e-9)


def _is_scale(m: nn.Module, width: int) -> bool:
    own = [p for p in m.parameters()]
    return len(own) == 1 and own[0].numel() == width and not is_norm(m)


def _scales(found: nn.Module, block: nn.Module, attention: nn.Module, width: int) -> None:
    """Layer scales and stochastic depth, in the order in which the block holds them."""
    taken = {m for part in (attention, found.mlp, found.norm1, found.norm2) for m in cast(nn.Module, part).modules()}
    modules = [m for m in block.modules() if m not in taken]
    scales: list[Any] = [m for m in modules if _is_scale(m, width)]
    held = {p for m in scales for p in m.parameters()}
    vectors = [p for m in modules for p in m.parameters(recurse=False) if p.numel() == width and p not in held]
    for number, scale in enumerate(scales[:2] or vectors[:2], start=1):
        setattr(found, f"ls{number}" if isinstance(scale, nn.Module) else f"gamma_{number}", scale)
    drops = [m for m in modules if "drop" in type(m).__name__.lower() and not any(True for _ in m.children())]
    for number in (1, 2) if drops else ():
        setattr(found, f"drop_path{number}", drops[min(number, len(drops)) - 1])


def _attentions(block: nn.Module, attention: nn.Module, width: int, calls: list[Call]) -> Iterator[nn.Module]:
    """Guesses at an attention module's parts under their names here."""
    a: Any = attention
    made: Any = nn.Module()
    for name, norm in a.named_modules():
        if is_norm(norm) and any(True for _ in norm.parameters()) and norm is not a:
            weight = next(norm.parameters())
            side = next((s for s in ("q", "k") if s in name.rpartition(".")[2].lower().replace("norm", "").replace("ln", "")), "")
            if side and weight.numel() != width:
                setattr(made, f"{side}_norm", norm)
    made.attn_drop = nn.Dropout(_dropout(a))
    layers = _linears(attention)
    if isinstance(getattr(a, "in_proj_weight", None), Tensor):  # nn.MultiheadAttention, open_clip
        out: Any = a.out_proj
        fused = nn.Linear(width, a.in_proj_weight.shape[0], a.in_proj_bias is not None, device="meta")
        fused.weight = a.in_proj_weight
        if a.in_proj_bias is not None:
            fused.bias = a.in_proj_bias
        made.qkv, made.proj = fused, _as_linear(out)
        sets: list[tuple[str, ...]] = [("qkv",)]
    else:
        sets = []
        wide = [n for n, m in layers.items() if m.out_features % 3 == 0 and n != ""]
        for name in wide:
            rest = [n for n, m in layers.items() if n != name and m.in_features == layers[name].out_features // 3]
            if len(layers) == 2 and rest:
                made.qkv, made.proj, sets = layers[name], layers[rest[0]], [("qkv",)]
        if len(layers) == 3 and (kv := next((n for n in layers if "kv" in n.rpartition(".")[2]), "")):
            layers |= {f"{kv}.k": _cut(layers[kv], 0), f"{kv}.v": _cut(layers[kv], 1)}
            q, out = (n for n in layers if not n.startswith(kv))
            sets = [(q, f"{kv}.k", f"{kv}.v", out), (out, f"{kv}.k", f"{kv}.v", q)]
        elif not sets and len(layers) == 4:
            sets = list(_separate(list(layers)))
        if not sets:
            raise NotPlain(
                f"its {type(a).__name__} does not make queries, keys and values by one layer, or three, and project the result "
                f"by another: it has {len(layers)} linear layers"
            )
    for names in sets:
        if names != ("qkv",):
            for role, name in zip(("q_proj", "k_proj", "v_proj", "proj"), names, strict=True):
                setattr(made, role, layers[name])
        after = next((c.y for c in calls if c.module is made.proj), None)
        drop = next((c.module for c in calls if c.x is after and isinstance(c.module, nn.Dropout)), None)
        if after is not None and drop is not None:
            made.proj_drop = drop
        inner = cast(Any, made.proj).in_features
        for heads in _heads(a, block, inner):
            made.num_heads, made.head_dim = heads, inner // heads
            for scale in _scale(a, inner // heads):
                made.scale = scale
                yield made
                if names == ("qkv",) and isinstance(made.qkv, nn.Linear):
                    plain = made.qkv
                    for layout in LAYOUTS[1:]:
                        made.qkv = _arranged(plain, heads, layout)
                        yield made
                    made.qkv = plain


def _separate(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Four layers as queries, keys, values and projection: by their names, then in every order that is left."""

    def letter(name: str, of: str) -> bool:
        last = name.rpartition(".")[2].lower().replace("proj", "").replace("to", "").strip("_")
        return last.startswith(of)

    named = [next((n for n in names if letter(n, s)), "") for s in "qkv"]
    rest = [n for n in names if n not in named]
    if all(named) and len(rest) == 1:
        yield (*named, rest[0])
        return
    yield from itertools.permutations(names)


def _heads(attention: Any, block: Any, inner: int) -> Iterator[int]:
    for owner in (attention, block):
        for name in ("num_heads", "num_attention_heads", "n_heads", "heads", "n_head", "nhead", "h"):
            told = getattr(owner, name, None)
            if isinstance(told, int) and told > 0 and inner % told == 0:
                yield told
                return
    yield from (h for h in range(1, inner + 1) if inner % h == 0)


def _scale(attention: Any, head_dim: int) -> Iterator[float]:
    told = [getattr(attention, n, None) for n in ("scale", "scaling", "softmax_scale")]
    usual = head_dim**-0.5
    yield usual
    yield from (t for t in told if isinstance(t, float) and t != usual)
    if attention.__class__.__name__ != "MultiheadAttention":
        yield 1.0


def _dropout(attention: Any) -> float:
    for name in ("attn_drop", "attend_drop", "attn_dropout", "attention_dropout", "dropout"):
        rate = getattr(attention, name, None)
        rate = getattr(rate, "p", rate)
        if isinstance(rate, float):
            return rate
    return 0.0


def _cut(both: Any, half: int) -> nn.Linear:
    """The keys' or the values' half of a layer that makes both."""
    rows = slice(half * both.out_features // 2, (half + 1) * both.out_features // 2)
    new = nn.Linear(both.in_features, both.out_features // 2, both.bias is not None, device="meta")
    new.weight = nn.Parameter(both.weight.detach()[rows], both.weight.requires_grad)
    if both.bias is not None:
        new.bias = nn.Parameter(both.bias.detach()[rows], both.bias.requires_grad)
    return new


def _as_linear(layer: nn.Module) -> nn.Module:
    """The `out_proj` of nn.MultiheadAttention is of a class that quantizers pass over."""
    if not isinstance(layer, nn.Linear) or type(layer) is nn.Linear:
        return layer
    new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    new.weight, new.bias = layer.weight, layer.bias
    return new


def _arranged(fused: nn.Linear, heads: int, layout: str) -> nn.Linear:
    """A layer whose outputs lie in another order, as one whose outputs lie queries, keys, values, each head by head."""
    rows = torch.arange(fused.out_features)
    if layout == "heads 3 d":
        rows = rows.view(heads, 3, -1).transpose(0, 1).flatten()
    else:
        rows = rows.view(heads, -1, 3).permute(2, 0, 1).flatten()
    new = nn.Linear(fused.in_features, fused.out_features, fused.bias is not None, device="meta")
    new.weight = nn.Parameter(fused.weight.detach()[rows], fused.weight.requires_grad)
    if fused.bias is not None:
        new.bias = nn.Parameter(fused.bias.detach()[rows], fused.bias.requires_grad)
    return new
