"""A block by the parts that it is made of: norms, queries, keys, values, projection, MLP, scales, whatever they are called.

`parts` gives a plain block (pre-norm attention, then pre-norm MLP, each with a residual) under the names that everything else
here uses, which are timm's: `norm1`, `attn` with `qkv` (or `q_proj`, `k_proj`, `v_proj`), `q_norm`, `k_norm`, `norm`, `gate` and
`proj`, `ls1` (or `gamma_1`), `drop_path1`, `norm2`, `mlp`, `ls2`, `drop_path2`. The parts are the block's own modules and
parameters. Names are only a first guess: who reads what is seen by running the block on a few random tokens, and it is plain
only when it gives what its parts give when they are put together by that rule (`plain_forward`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from threading import get_ident
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import Position, Turn, position_of, turned
from .roles import Call, NotPlain, candidates, is_linear, is_norm

FEWER = "it gives fewer tokens than it reads"
TOKENS = 4  # patches that a block is tried with


# ---- the rule


def project(attn: nn.Module, x: Tensor, turn: Turn | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, heads, N, head_dim]` of a plain attention module for its input `[B, N, C]`."""
    a = cast(Any, attn)
    if getattr(a, "qkv", None) is not None:
        bias = torch.cat((a.q_bias, a.k_bias, a.v_bias)) if getattr(a, "q_bias", None) is not None else None
        made = a.qkv(x) if bias is None else a.qkv(x) + bias
        q, k, v = made.unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (p(x).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
    return turned(getattr(a, "q_norm", nn.Identity())(q), turn), turned(getattr(a, "k_norm", nn.Identity())(k), turn), v


def emit(attn: nn.Module, mixed: Tensor, x: Tensor) -> Tensor:
    """The output `[B, N, C]` of a plain attention module from its heads' results `[B, heads, N, head_dim]`."""
    a = cast(Any, attn)
    y = mixed.transpose(1, 2).flatten(2)
    y = getattr(a, "norm", nn.Identity())(y)
    if getattr(a, "gate", None) is not None:
        y = y * a.gate(x).sigmoid()
    return getattr(a, "proj_drop", nn.Identity())(a.proj(y))


def mix(attn: nn.Module, h: Tensor, turn: Turn | None = None, bias: Tensor | None = None) -> Tensor:
    """What a plain attention module computes for its input `[B, N, C]`."""
    q, k, v = project(attn, h, turn)
    return emit(attn, F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=cast(Any, attn).scale), h)


def branch(block: nn.Module, number: int, y: Tensor) -> Tensor:
    """Layer scale and stochastic depth of a block's first or second residual branch."""
    gamma = getattr(block, f"gamma_{number}", None)
    y = getattr(block, f"ls{number}", nn.Identity())(y)
    y = y if gamma is None else y * gamma
    return getattr(block, f"drop_path{number}", nn.Identity())(y)


def plain_forward(block: nn.Module, x: Tensor, turn: Turn | None = None, bias: Tensor | None = None) -> Tensor:
    """What a plain block computes, from its parts: the definition of *plain*."""
    b = cast(Any, block)
    x = x + branch(b, 1, mix(b.attn, b.norm1(x), turn, bias))
    return x + branch(b, 2, b.mlp(b.norm2(x)))


# ---- the parts


def parts(block: nn.Module, attention: nn.Module) -> tuple[nn.Module, Position | None]:
    """The parts of `block`, whose attention is `attention`, as a module that holds them under the names of `plain_forward` (the
    block itself where it calls them so), and how its attention knows places.

    Raises `NotPlain` with the reason when the block computes something else.
    """
    if getattr(attention, "batch_first", True) is False:
        raise NotPlain("its attention reads tokens before images: build it with batch_first=True, which takes the same weights")
    position = position_of(block, attention)
    reference = next(block.parameters())
    prefix = 0 if position is None else position.prefix
    side = None if position is None else position.side
    patches = TOKENS if side is None else side[0] * side[1]
    # Small tokens, so that what a block adds is not lost in their rounding however small its layer scale.
    draw = torch.Generator().manual_seed(0)
    x = (1e-3 * torch.randn(2, prefix + patches, _width(block, attention), generator=draw)).to(reference)
    given = {} if position is None else position.example(attention, patches, x, draw)
    why = NotPlain("it computes something else than attention then MLP, each pre-norm with a residual")
    with resting(block), torch.no_grad():
        try:
            calls, out = _watch(block, x, given)
        except Exception as error:  # a stranger's block may fail in any way on a plain sequence; that is the answer
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
            raise NotPlain(f"it does not run on a plain sequence of tokens ({reason})") from error
        if isinstance(out, Tensor) and out.shape[0] == len(x) and out.shape[-1] == x.shape[-1] and out.numel() < x.numel():
            raise NotPlain(FEWER)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise NotPlain("it does not return one sequence of tokens")
        theirs = next((c.y for c in calls if c.module is attention), None)
        for found in candidates(block, attention, calls, x):
            attn = cast(Any, found).attn
            try:
                placed = (None, None) if position is None else position.placed(attn, given, x.shape[1])
                ours = mix(attn, cast(Any, found).norm1(x), *placed)
                whole = plain_forward(found, x, *placed)
            except (RuntimeError, TypeError, AttributeError, IndexError):  # a guess at what is what, which does not fit
                continue
            same = theirs is None or _near(ours, theirs)
            if same and _near(whole, out, x):
                return found, position
            if not same:
                what = "softmax(q·kᵀ)·v and a projection"
                why = NotPlain(f"its {type(attention).__name__} computes something else than {what}")
    raise why


def _near(ours: Tensor, theirs: Tensor, given: Tensor | None = None) -> bool:
    """Equal up to rounding, measured by what was added to `given`."""
    if ours.shape != theirs.shape:
        return False
    exact = ours.dtype in (torch.float32, torch.float64)
    tolerance = (1e-4 if exact else 1e-1) * (theirs if given is None else theirs - given).abs().max()
    if given is not None:
        tolerance = tolerance + (3e-7 if exact else 2e-2) * given.abs().max()
    return bool((ours - theirs).abs().max() <= tolerance + 1e-12)


class resting:
    """The modules of a block in eval mode for a while."""

    def __init__(self, block: nn.Module) -> None:
        self.training = [m for m in block.modules() if m.training]
        self.block = block

    def __enter__(self) -> None:
        for m in self.training:
            m.training = False

    def __exit__(self, *_: Any) -> None:
        for m in self.training:
            m.training = True


def run(block: nn.Module, x: Tensor, given: dict[str, Any]) -> Any:
    """`block` on tokens `[B, N, C]`: arguments that it must have and that are not `given` are None, as models give them."""
    if isinstance(block, nn.ModuleList):  # attention and MLP side by side, which its owner joins with residuals (vit-pytorch)
        for child in block:
            x = x + child(x)
        return x
    names = list(inspect.signature(block.forward).parameters.values())[1:]
    needed = [p.name for p in names if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    out = block(x, **{n: None for n in needed} | {n: v for n, v in given.items() if v is not None})
    return out[0] if isinstance(out, tuple) and len(out) else out


def here(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook` for what this thread runs: others may run the model meanwhile, and are neither seen nor stopped."""
    mine = get_ident()
    return lambda *given: hook(*given) if get_ident() == mine else None


def _watch(block: nn.Module, x: Tensor, given: dict[str, Any]) -> tuple[list[Call], Any]:
    calls: list[Call] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            y = out[0] if isinstance(out, tuple) and out else out
            if first is not None and isinstance(y, Tensor):
                calls.append(Call(name, module, first, y))

        return hook

    handles = [m.register_forward_hook(here(note(n)), with_kwargs=True) for n, m in block.named_modules() if n]
    try:
        return calls, run(block, x, given)
    finally:
        for handle in handles:
            handle.remove()


def _width(block: nn.Module, attention: nn.Module) -> int:
    if isinstance(weight := getattr(attention, "in_proj_weight", None), Tensor):
        return weight.shape[1]
    inside = set(attention.modules())
    norms = sorted((m for m in block.modules() if is_norm(m)), key=lambda m: m in inside)
    sizes = [p.numel() for m in norms for p in m.parameters(recurse=False)]
    layer = next((m for m in attention.modules() if is_linear(m)), None)
    return sizes[0] if sizes else cast(int, layer.in_features) if layer is not None else next(attention.parameters()).shape[-1]
