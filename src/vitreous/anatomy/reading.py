"""Read a model once: patch grid, prefix tokens, stages, blocks, and what each block is made of.

Nothing here runs the whole model or changes it. Whether a block is *plain* (pre-norm attention, then pre-norm MLP,
each with a residual) is not looked up in a list of classes but tried: see `parts`. A vision transformer inside a wrapper is
found, and what cannot be found can be told: `read(model, grid=…, prefix=…, classifier=…)`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from ..errors import VitreousError
from .parts import FEWER, parts
from .roles import NotPlain
from .unnamed import unnamed
from .whole import Whole, told

ATTENTION_CLASS = re.compile(r"atte?n|mhsa|gpsa|xca$", re.IGNORECASE)
SHARED = ("rel_pos_bias", "shared_rel_pos")  # what holds it for all blocks of a model
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
    own_names: bool  # whether its parts are called norm1, attn, norm2 and mlp already
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
    behind: str = ""  # said where other tokens than patches do not all stand before them; then there is no grid

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

    def require_grid(self, step: str) -> tuple[int, int]:
        """The patch rows and columns; a `VitreousError` where none are known."""
        if self.behind:
            raise VitreousError(f"{step} works on a grid of patches after all other tokens, but {self.kind} has {self.behind}")
        if self.grid is None:
            raise VitreousError(
                f"{step} works on a grid of patches, and {self.kind} tells of none: tell it by vitreous.read(model, grid=(rows, "
                "columns), prefix=…)"
            )
        return self.grid

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
_STEADY: ContextVar[WeakKeyDictionary[nn.Module, Anatomy] | None] = ContextVar("steady", default=None)


@contextmanager
def steady() -> Iterator[None]:
    """While open, a model is read once, whatever its weights become: for training, which changes nothing else at every step."""
    token = _STEADY.set(WeakKeyDictionary())
    try:
        yield
    finally:
        _STEADY.reset(token)


def read(
    model: nn.Module,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
    classifier: str | None = None,
) -> Anatomy:
    """The anatomy of `model`; never fails on a model it does not know, but says less of it.

    grid, prefix, classifier: what cannot be found, or is found wrongly, can be told once: the patch rows and columns, the number
        of tokens before the patches, the dotted name of the layer that gives the classes ("" for none). The model keeps it,
        and so do its copies.

    Raises `VitreousError` for what is told when the model has no such layer.

    Trying blocks costs most of a forward pass, so a model is read again only when a module, a parameter or a plain attribute
    of one of its modules is another than the last time; under `steady`, once.
    """
    if grid is not None or prefix is not None or classifier is not None:
        if classifier and classifier not in dict(model.named_modules()):
            raise VitreousError(f"{type(model).__name__} has no layer '{classifier}' to be its classifier")
        tell = {"grid": grid and tuple(grid), "prefix": prefix, "classifier": classifier}
        cast(Any, model)._vitreous_told = told(model) | {k: v for k, v in tell.items() if v is not None}
    held = _STEADY.get()
    if held is not None and grid is prefix is classifier is None and model in held:
        return held[model]
    state = _state(model)
    known = _READ.get(model)
    if known is None or known[0] != state:
        known = _READ[model] = state, _read(model)
    if held is not None:
        held[model] = known[1]
    return known[1]


def _state(model: nn.Module) -> list[Any]:
    """All that `_read` depends on, to compare with what it was; keeps nothing of the model alive."""
    state: list[Any] = [dict(told(model))]
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
    blocks, others = [], []
    for name in attention_names(model):
        holder = holding_block(name, modules)
        rotary = any(getattr(modules[above], "rope", None) is not None for above in _above(name))
        shared = any(isinstance(getattr(modules[above], n, None), nn.Module) for above in _above(name) for n in SHARED)
        part = _attention(name, modules[name], rotary, shared)
        found = _block(holder, modules[holder], part, modules[name]) if holder else None
        if found is None or found.why_not == FEWER:  # attention pooling, with an MLP behind it
            others.append(part)
        else:
            blocks.append(found)
    whole = Whole(model, [b.name for b in blocks], [p.name for p in others])
    stages = _stages(whole.vit, whole.vit_name, blocks)
    several = len({s.reduction for s in stages if s.blocks}) > 1
    grid, prefix, class_token = whole.tokens(one_grid=bool(blocks) and not several and all(b.plain for b in blocks))
    if whole.behind:
        blocks = [replace(b, plain=False, why_not=b.why_not or f"the model has {whole.behind}") for b in blocks]
    if several:
        blocks = [replace(b, plain=False, why_not=b.why_not or "the grid of tokens changes between its stages") for b in blocks]
    return Anatomy(
        kind=type(model).__name__,
        grid=grid,
        prefix=prefix,
        class_token=class_token,
        pool=whole.pool(),
        width=whole.width(),
        blocks=tuple(blocks),
        other_attention=tuple(others),
        stages=stages,
        classifier=whole.classifier(),
        behind=whole.behind,
    )


def _above(name: str) -> list[str]:
    """The dotted names of all that holds a module, the outermost first."""
    parts_of = name.split(".")
    return [".".join(parts_of[:i]) for i in range(len(parts_of))]


def attention_names(model: nn.Module) -> list[str]:
    """Dotted names of the attention modules: the innermost modules whose class is called an attention; where none is, those that
    compute a map of all tokens by all."""
    names = [n for n, m in model.named_modules() if n and _is_attention(m)] or unnamed(model)
    return [n for n in names if not any(other.startswith(n + ".") for other in names)]


NORMS = ("norm1", "norm2", "ln_1", "ln_2", "layernorm_before", "layernorm_after", "norm", "norm_attn", "norm_mlp")


def holding_block(attention_name: str, modules: dict[str, nn.Module]) -> str:
    """The dotted name of the residual block around an attention module, or "".

    It is the nearest module around it that has a norm by a known name. Where that holds other attention too, as a whole model
    with a last norm does: the nearest inside it with any norm and with other weights beside the attention, if it holds none.
    Attention and MLP may also lie side by side in a list.
    """
    above = [n for n in reversed(_above(attention_name)) if n]
    for name in above:
        module = modules[name]
        if isinstance(module, nn.ModuleList) and len(module) == 2 and _alone(attention_name, name, modules):
            return name
        if _children(module, NORMS):
            break
    known = next((name for name in above if _children(modules[name], NORMS)), "")
    if known and _alone(attention_name, known, modules):
        return known
    inside = set(modules[attention_name].modules())
    for name in above:
        if name == known:
            break
        beside = [m for m in modules[name].modules() if m not in inside]
        normed = any("norm" in type(m).__name__.lower() and not hasattr(m, "running_mean") for m in modules[name].modules())
        weighs = any(p.ndim == 2 for m in beside for p in m.parameters(recurse=False))
        if normed and weighs:
            return name if _alone(attention_name, name, modules) else known
    return known


def _alone(attention_name: str, name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether `name` holds no other attention than that."""
    kind = type(modules[attention_name])  # whatever it is called
    others = (n for n, m in modules.items() if n.startswith(name + ".") and (_is_attention(m) or type(m) is kind))
    return all(n.startswith(attention_name) or attention_name.startswith(n + ".") for n in others)


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


def _attention(name: str, m: nn.Module, rotary: bool, shared: bool) -> AttentionPart:
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
    heads = next(
        (int(h) for a in ("num_heads", "num_attention_heads", "n_heads", "heads", "n_head") if (h := getattr(m, a, None))), None
    )
    named = (getattr(m, a, None) for a in ("head_dim", "dim_head", "attention_head_size", "key_dim"))
    head_dim = next((d for d in named if isinstance(d, int)), None)
    heads = heads if heads is None or heads > 0 else None
    if head_dim is None and heads and projections:
        weight = getattr(m, projections[0])
        weight = weight if isinstance(weight, Tensor) else getattr(weight, "weight", None)
        if isinstance(weight, Tensor):
            head_dim = weight.shape[0] // (3 if projections[0] in ("qkv", "in_proj_weight", "to_qkv") else 1) // heads
    scale = getattr(m, "scale", getattr(m, "scaling", None))
    if not isinstance(scale, float):
        scale = head_dim**-0.5 if head_dim else None
    relative = any(RELATIVE.search(n) for n, _ in m.named_parameters())
    known = m.__dict__.get("position")
    rotary = rotary or getattr(known, "kind", "") == "rotary"
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


def _block(name: str, m: nn.Module, attention: AttentionPart, module: nn.Module) -> Block:
    why_not, own = "", True
    if not hasattr(m, "reducers"):  # our own block is plain by construction, and trying it would run its reducers
        why_not, own = _why_not_plain(m, attention, module)
    scales = _children(m, ("gamma_1",)) or any("layerscale" in type(c).__name__.lower() for c in m.children())
    return Block(
        name=name,
        kind=type(m).__name__,
        attention=attention if attention.position != "absolute" or why_not else _positioned(attention, m),
        norms=_children(m, NORMS),
        mlp=next(iter(_children(m, ("mlp", "ffn", "feed_forward"))), None),
        layer_scale=bool(scales),
        own_names=own,
        plain=not why_not,
        why_not=why_not,
    )


def _positioned(attention: AttentionPart, block: nn.Module) -> AttentionPart:
    rotary = "position_embeddings" in inspect.signature(block.forward).parameters  # Hugging Face hands angles to each block
    return replace(attention, position="rotary") if rotary else attention


def _why_not_plain(block: nn.Module, attention: AttentionPart, module: nn.Module) -> tuple[str, bool]:
    """The reason, or "", and whether the parts of a plain block have the names that they have here."""
    try:
        found, _ = parts(block, module)
    except NotPlain as reason:
        if attention.position == "relative" and "plain sequence" in str(reason):
            return "its attention adds a bias for each pair of places in a fixed grid or window", False
        return str(reason), False
    return "", found is block


def _stages(model: nn.Module, above: str, blocks: list[Block]) -> tuple[Stage, ...]:
    info = getattr(model, "feature_info", None)
    if not isinstance(info, list):
        return ()
    names, stages = {n for n, _ in model.named_modules()}, []
    for entry in info:
        if not isinstance(entry, dict) or entry.get("module") not in names:
            continue
        name = f"{above}.{entry['module']}" if above else entry["module"]
        inside = tuple(b.name for b in blocks if b.name == name or b.name.startswith(name + "."))
        stages.append(Stage(name, int(entry["num_chs"]), int(entry["reduction"]), inside))
    return tuple(stages)
