"""Read a model once: patch grid, prefix tokens, stages, blocks, and what each block is made of.

Nothing here runs the whole model or changes it. Whether a block is *plain* (pre-norm attention, then pre-norm MLP,
each with a residual) is not looked up in a list of classes but tried: the block runs on four random tokens and must
give what its parts give when they are put together by that rule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import VitreousError

ATTENTION_CLASS = re.compile(r"atte?n|mhsa|gpsa|xca$", re.IGNORECASE)
RELATIVE = re.compile("bias_table|rel_pos|attention_biases|cpb")  # parameters of a bias for pairs of places
NOT_ATTENTION = re.compile(r"pool2d|largekernel|channelattn|spatialattn|^cbam|^eca|^se", re.IGNORECASE)


@dataclass(frozen=True)
class AttentionPart:
    """One attention module: where it is and how it makes queries, keys and values."""

    name: str  # dotted name in the model
    kind: str  # class name
    heads: int | None
    head_dim: int | None
    scale: float | None  # factor on q·kᵀ
    projections: tuple[str, ...]  # child names: ("qkv",), ("q_proj", "k_proj", "v_proj"), ("in_proj_weight",) …
    proj: str | None  # child name of the output projection
    position: str  # "absolute": none inside attention, "relative": a bias table, "rotary": rotated q and k


@dataclass(frozen=True)
class Block:
    """One residual block that holds attention."""

    name: str
    kind: str
    attention: AttentionPart
    norms: tuple[str, ...]
    mlp: str | None
    layer_scale: bool
    plain: bool
    why_not: str  # empty when plain

    @property
    def index(self) -> int:
        return int(re.findall(r"\d+", self.name)[-1])


@dataclass(frozen=True)
class Stage:
    """Blocks at one resolution: `reduction` is the input pixels along one side of a token."""

    name: str
    width: int
    reduction: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of. `blocks` is empty for a model without attention, or with none inside a residual block."""

    kind: str
    grid: tuple[int, int] | None  # patch rows and columns that enter the first block
    prefix: int  # class, distillation and register tokens before the patches
    class_token: bool
    pool: str | None  # how tokens become one vector: "token", "avg", "map", …
    width: int | None
    blocks: tuple[Block, ...]
    other_attention: tuple[AttentionPart, ...]  # outside residual blocks: attention pooling and the like
    stages: tuple[Stage, ...]
    classifier: str | None

    @property
    def plain(self) -> bool:
        """True when every block is a plain pre-norm block on one sequence of tokens."""
        return bool(self.blocks) and all(b.plain for b in self.blocks)

    @property
    def attention(self) -> tuple[AttentionPart, ...]:
        return tuple(b.attention for b in self.blocks) + self.other_attention

    def require_plain(self, step: str) -> None:
        """Raise a `VitreousError` that names the first block which `step` cannot work in, and why."""
        if not self.attention:
            raise VitreousError(f"{step} works on attention, and {self.kind} has none: choose a transformer")
        if not self.blocks:
            alone = self.other_attention[0]
            raise VitreousError(
                f"{step} needs plain pre-norm blocks; {self.kind}'s '{alone.name}' ({alone.kind}) lies in no block that has a "
                "norm of its own. Use a step that does not shorten or rearrange the tokens inside blocks"
            )
        for block in self.blocks:
            if not block.plain:
                raise VitreousError(
                    f"{step} needs plain pre-norm blocks; {self.kind}'s '{block.name}' ({block.kind}) is not one: "
                    f"{block.why_not}. Use a step that does not shorten or rearrange the tokens inside blocks"
                )

    def __str__(self) -> str:
        lines = [
            f"{self.kind}: grid {self.grid}, {self.prefix} prefix tokens, width {self.width}, pool {self.pool}, "
            f"{len(self.blocks)} blocks with attention" + ("" if self.attention else " (this model has no attention)")
        ]
        for b in self.blocks:
            a = b.attention
            what = "plain" if b.plain else f"not plain: {b.why_not}"
            lines.append(f"  {b.name}: {b.kind}, {a.heads} heads of {a.head_dim} ({a.kind}, {a.position}), {what}")
        return "\n".join(lines)


_READ: WeakKeyDictionary[nn.Module, tuple[list[Any], Anatomy]] = WeakKeyDictionary()  # what it was read from, and the result


def read(model: nn.Module) -> Anatomy:
    """The anatomy of `model`; never fails on a model it does not know, but says less of it.

    Trying blocks costs most of a forward pass, so a model is read again only when a module, a parameter or a plain attribute
    of one of its modules is another than the last time.
    """
    state = _state(model)
    known = _READ.get(model)
    if known is None or known[0] != state:
        known = _READ[model] = state, _read(model)
    return known[1]


def _state(model: nn.Module) -> list[Any]:
    """All that `_read` depends on, to compare with what it was; keeps nothing of the model alive."""
    state: list[Any] = []
    for name, module in model.named_modules():
        held = {k: id(v) if callable(v) else v for k, v in vars(module).items() if k != "training" and _plain_value(v)}
        state.append((name, ref(module), held))
        state += [(id(p), None if p.is_inference() else p._version) for p in module.parameters(recurse=False)]
    return state


def _plain_value(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(v, (str, int, float, type(None))) for v in value)
    return isinstance(value, (str, int, float, type(None))) or (callable(value) and not isinstance(value, nn.Module))


def _read(model: nn.Module) -> Anatomy:
    modules = dict(model.named_modules())
    names = attention_names(model)
    blocks, others = [], []
    for name in names:
        holder = holding_block(name, modules)
        part = _attention(name, modules[name], model)
        if holder:
            blocks.append(_block(holder, modules[holder], part))
        else:
            others.append(part)
    grid, prefix, class_token = _tokens(model)
    stages = _stages(model, blocks)
    if len({s.reduction for s in stages if s.blocks}) > 1:
        blocks = [replace(b, plain=False, why_not=b.why_not or "the grid of tokens changes between its stages") for b in blocks]
    return Anatomy(
        kind=type(model).__name__,
        grid=grid,
        prefix=prefix,
        class_token=class_token,
        pool=_pool(model),
        width=next((w for a in ("embed_dim", "hidden_dim", "num_features") if (w := getattr(model, a, None))), None),
        blocks=tuple(blocks),
        other_attention=tuple(others),
        stages=stages,
        classifier=_classifier(model, modules),
    )


def attention_names(model: nn.Module) -> list[str]:
    """Dotted names of the attention modules: the innermost modules whose class is called an attention."""
    names = [n for n, m in model.named_modules() if n and _is_attention(m)]
    return [n for n in names if not any(other.startswith(n + ".") for other in names)]


NORMS = ("norm1", "norm2", "ln_1", "ln_2", "layernorm_before", "layernorm_after", "norm", "norm_attn", "norm_mlp")


def holding_block(attention_name: str, modules: dict[str, nn.Module]) -> str:
    """The dotted name of the residual block around an attention module (its nearest ancestor with a norm), or ""."""
    parts = attention_name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:i])
        if _children(modules[name], NORMS):
            return name
    return ""


def _is_attention(m: nn.Module) -> bool:
    kind = type(m).__name__
    return (
        bool(ATTENTION_CLASS.search(kind))
        and not NOT_ATTENTION.search(kind)
        and "drop" not in kind.lower()
        and any(True for _ in m.parameters())
    )


def _children(m: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(n for n in names if isinstance(getattr(m, n, None), (nn.Module, nn.Parameter)))


def _attention(name: str, m: nn.Module, model: nn.Module) -> AttentionPart:
    made_by = (
        ("qkv",),
        ("q_proj", "k_proj", "v_proj"),
        ("q", "k", "v"),
        ("q", "kv"),
        ("query", "key", "value"),
        ("in_proj_weight",),
        ("to_qkv",),
    )
    projections = next((p for p in made_by if len(_children(m, p)) == len(p)), ())
    heads = next((int(h) for a in ("num_heads", "num_attention_heads", "n_heads") if (h := getattr(m, a, None))), None)
    named = (getattr(m, a, None) for a in ("head_dim", "dim_head", "attention_head_size", "key_dim"))
    head_dim = next((d for d in named if isinstance(d, int)), None)
    if head_dim is None and heads and projections:
        weight = getattr(m, projections[0])
        weight = weight if isinstance(weight, Tensor) else getattr(weight, "weight", None)
        if isinstance(weight, Tensor):
            head_dim = weight.shape[0] // (3 if projections[0] in ("qkv", "in_proj_weight", "to_qkv") else 1) // heads
    scale = getattr(m, "scale", None)
    if not isinstance(scale, float):
        scale = head_dim**-0.5 if head_dim else None
    relative = any(RELATIVE.search(n) for n, _ in m.named_parameters())
    shared = isinstance(getattr(model, "rel_pos_bias", None), nn.Module)
    rotary = getattr(model, "rope", None) is not None
    return AttentionPart(
        name=name,
        kind=type(m).__name__,
        heads=heads,
        head_dim=head_dim,
        scale=scale,
        projections=projections,
        proj=next(iter(_children(m, ("proj", "out_proj", "o_proj", "to_out"))), None),
        position="rotary" if rotary else "relative" if relative or shared else "absolute",
    )


def _block(name: str, m: nn.Module, attention: AttentionPart) -> Block:
    why_not = _why_not_plain(m, attention)
    return Block(
        name=name,
        kind=type(m).__name__,
        attention=attention,
        norms=_children(m, NORMS),
        mlp=next(iter(_children(m, ("mlp", "ffn", "feed_forward"))), None),
        layer_scale=bool(_children(m, ("gamma_1",))) or type(getattr(m, "ls1", None)).__name__.startswith("LayerScale"),
        plain=not why_not,
        why_not=why_not,
    )


def _why_not_plain(block: nn.Module, attention: AttentionPart) -> str:
    if hasattr(block, "reducers"):  # our own block: plain by construction, and trying it would run its reducers
        return ""
    missing = [n for n in ("norm1", "attn", "norm2", "mlp") if not isinstance(getattr(block, n, None), nn.Module)]
    if missing:
        return f"it has no {' and no '.join(missing)}"
    if attention.position == "rotary":
        return "its attention rotates queries and keys by their place in the whole grid"
    if attention.position == "relative":
        return "its attention adds a bias for each pair of places in a fixed grid or window"
    if attention.projections not in (("qkv",), ("q_proj", "k_proj", "v_proj")) or attention.proj is None:
        return f"its {attention.kind} does not make queries, keys and values by one 'qkv' (or 'q_proj' …) and a 'proj'"
    if attention.heads is None or not isinstance(getattr(block.attn, "scale", None), float):
        return f"its {attention.kind} does not tell its number of heads, or scales q·kᵀ by more than one number"
    norm = next(iter(block.norm1.parameters()), None) if isinstance(block.norm1, nn.Module) else None
    width = cast(Any, norm).shape[0] if norm is not None else getattr(block.attn, attention.projections[0]).in_features
    reference = next(block.parameters())
    # Small tokens, so that what a block adds is not lost in their rounding however small its layer scale.
    x = 1e-3 * torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0)).to(reference)
    training = [m for m in block.modules() if m.training]
    block.eval()
    try:
        with torch.no_grad():
            h = cast(nn.Module, block.norm1)(x)
            attn = cast(nn.Module, block.attn)
            pairs = [(mix(attn, h), attn(h), h), (plain_forward(block, x), block(x), x)]
    except Exception as error:  # a stranger's block may fail in any way on a plain sequence; that is the answer
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
        return f"it does not run on a plain sequence of tokens ({reason})"
    finally:
        for m in training:
            m.training = True
    exact = reference.dtype == torch.float32
    for i, (ours, theirs, given) in enumerate(pairs):
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            return "it does not return one sequence of tokens"
        added = (theirs - given * i).abs().max()
        tolerance = (1e-4 if exact else 1e-1) * added + (3e-7 if exact else 2e-2) * given.abs().max() * i
        if not bool((ours - theirs).abs().max() <= tolerance + 1e-12):
            what = "attention then MLP, each pre-norm with a residual" if i else "softmax(q·kᵀ)·v and a projection"
            return f"{'it' if i else 'its ' + attention.kind} computes something else than {what}"
    return ""


def project(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, heads, N, head_dim]` of a plain attention module for its input `[B, N, C]`."""
    a = cast(Any, attn)
    if getattr(a, "qkv", None) is not None:
        bias = torch.cat((a.q_bias, a.k_bias, a.v_bias)) if getattr(a, "q_bias", None) is not None else None
        made = a.qkv(x) if bias is None else a.qkv(x) + bias
        q, k, v = made.unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (p(x).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
    return getattr(a, "q_norm", nn.Identity())(q), getattr(a, "k_norm", nn.Identity())(k), v


def emit(attn: nn.Module, mixed: Tensor, x: Tensor) -> Tensor:
    """The output `[B, N, C]` of a plain attention module from its heads' results `[B, heads, N, head_dim]`."""
    a = cast(Any, attn)
    y = mixed.transpose(1, 2).flatten(2)
    y = getattr(a, "norm", nn.Identity())(y)
    if getattr(a, "gate", None) is not None:
        y = y * a.gate(x).sigmoid()
    return getattr(a, "proj_drop", nn.Identity())(a.proj(y))


def mix(attn: nn.Module, h: Tensor) -> Tensor:
    """What a plain attention module computes for its input `[B, N, C]`."""
    q, k, v = project(attn, h)
    return emit(attn, F.scaled_dot_product_attention(q, k, v, scale=cast(Any, attn).scale), h)


def branch(block: nn.Module, number: int, y: Tensor) -> Tensor:
    """Layer scale and stochastic depth of a block's first or second residual branch."""
    gamma = getattr(block, f"gamma_{number}", None)
    y = getattr(block, f"ls{number}", nn.Identity())(y)
    y = y if gamma is None else y * gamma
    return getattr(block, f"drop_path{number}", nn.Identity())(y)


def plain_forward(block: nn.Module, x: Tensor) -> Tensor:
    """What a plain block computes, from its own parts: the definition of *plain*."""
    b = cast(Any, block)
    x = x + branch(b, 1, mix(b.attn, b.norm1(x)))
    return x + branch(b, 2, b.mlp(b.norm2(x)))


PREFIX = ("cls_token", "distillation_token", "register_tokens")  # what Hugging Face calls them


def _tokens(model: nn.Module) -> tuple[tuple[int, int] | None, int, bool]:
    m = cast(Any, model)
    config: Any = getattr(m, "config", None)
    if hasattr(config, "patch_size") and hasattr(config, "image_size"):  # Hugging Face
        (h, w), (p, r) = (s if isinstance(s, (tuple, list)) else (s, s) for s in (config.image_size, config.patch_size))
        added = {n.rsplit(".")[-1]: t.shape[1] for n, t in m.named_parameters() if n.endswith(PREFIX)}
        return (h // p, w // r), sum(added.values()), "cls_token" in added
    if hasattr(m, "image_size") and hasattr(m, "patch_size") and hasattr(m, "class_token"):  # torchvision
        side = m.image_size // m.patch_size
        return (side, side), 1, True
    grid = getattr(getattr(m, "patch_embed", None), "grid_size", None)
    class_token = any(getattr(part, "cls_token", None) is not None for part in (m, getattr(m, "embeds", None)))
    prefix = int(getattr(m, "num_prefix_tokens", class_token and grid is not None))
    if hasattr(m, "blocks_token_only"):  # CaiT: the class token joins after the patch blocks
        prefix = 0
    return (int(grid[0]), int(grid[1])) if grid is not None else None, prefix, class_token


def _pool(model: nn.Module) -> str | None:
    pool = getattr(model, "global_pool", None)
    return pool if isinstance(pool, str) else None


def _stages(model: nn.Module, blocks: list[Block]) -> tuple[Stage, ...]:
    info = getattr(model, "feature_info", None)
    if not isinstance(info, list):
        return ()
    names, stages = {n for n, _ in model.named_modules()}, []
    for entry in info:
        if not isinstance(entry, dict) or entry.get("module") not in names:
            continue
        inside = tuple(b.name for b in blocks if b.name == entry["module"] or b.name.startswith(entry["module"] + "."))
        stages.append(Stage(entry["module"], int(entry["num_chs"]), int(entry["reduction"]), inside))
    return tuple(stages)


def _classifier(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    get = getattr(model, "get_classifier", None)
    head = get() if callable(get) else None
    if isinstance(head, nn.Linear):
        return next((n for n, m in modules.items() if m is head), None)
    named = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
    return next((n for n in reversed(named) if n.split(".")[0] in ("head", "heads", "fc", "classifier")), None)
