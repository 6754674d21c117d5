"""One plain attention and one plain block of ours, which hold the submodules of the block they replace under the same names.

Token steps hook in around attention and MLP (`PlainBlock.reducers`), quantizers inside attention (`PlainAttention.operands`).
State-dict names do not change, so weights move freely between a model and its slimmed form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .anatomy import read
from .anatomy.chains import Chain, chain
from .anatomy.parts import branch, emit, parts, project
from .anatomy.positions import Position, Turn, turned
from .errors import VitreousError
from .glass.compiled import as_written


@dataclass
class Reduction:
    """What one reducer did: token `i` of the `[B, N]` that came in is now part of token `into[b, i]` of `tokens`.

    `weight[b, i]` is the factor with which it entered. `rest` is the index of a token that gathers what was given up, if any:
    its members count as dropped when survival is drawn.
    """

    layer: str
    into: Tensor
    weight: Tensor
    tokens: int
    rest: int | None = None

    def matrix(self) -> Tensor:
        """`[B, tokens, N]`: row j gives the shares, summing to 1, of the incoming tokens in token j."""
        into = self.into[:, None] == torch.arange(self.tokens, device=self.into.device)[:, None]
        m = into * self.weight[:, None]
        return m / m.sum(-1, keepdim=True).clamp_min(1e-12)


class Tokens(NamedTuple):
    """The tokens of one pass, and what belongs to each of them: what one block hands to the next once there is more than `x`.

    It is handed on, and never kept in the model, so that passes do not meet: threads, replicas, and a pass that gradient
    checkpointing runs again each have their own. The last block gives the tensor `x` alone.
    """

    x: Tensor  # [B, N, C]
    size: Tensor | None = None  # [B, N, 1]: how many patches each token stands for, once a reducer has merged some
    place: Tensor | None = None  # [B, N]: where in the sequence that entered the first block it stands, where attention asks

    @classmethod
    def of(cls, given: Tensor | tuple[Any, ...]) -> Tokens:
        """What enters a block, or what a hook was shown of one: a tensor, or a tuple that began as `Tokens`."""
        return cls(given) if isinstance(given, Tensor) else cls(*given)

    def standing(self, index: Tensor) -> Tensor | None:
        """The places of the tokens at `index` `[B, M]`."""
        return None if self.place is None else self.place.gather(1, index)

    def bias(self) -> Tensor | None:
        """Proportional attention (ToMe, section 3): a token that stands for s patches counts s times; `[B, 1, 1, N]`."""
        return None if self.size is None else self.size.log().mT[:, None]

    def handed_on(self, last: bool) -> Tensor | Tokens:
        return self.x if last or all(field is None for field in self[1:]) else self


# What an "ahead" reducer gives back: the tokens that are left, `merge` (`[B, N, C]` to `[B, N', C]`) and `spread` (the value of
# each token's new token, `[B, N', C]` to `[B, N, C]`).
Fused = tuple[Tokens, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class PlainAttention(nn.Module):
    """Softmax attention from the parts of a plain attention module; `[B, N, C]` to `[B, N, C]`.

    `operands`, when set, quantizes what enters the two products: keys "q", "k", "v" and "probs".
    """

    def __init__(self, attn: nn.Module, position: Position | None = None) -> None:
        super().__init__()
        _adopt(self, attn)
        self.position = position if position is not None else attn.__dict__.get("position")
        self.kept: list[int] | None = attn.__dict__.get("kept")  # of the heads that tables of positions know, those still here
        for name in ("num_heads", "head_dim", "attn_dim", "scale"):
            if hasattr(attn, name):
                setattr(self, name, getattr(attn, name))
        self.operands: nn.ModuleDict | None = None
        self.train(attn.training)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        look: bool = False,
        fuse: Callable[[Tensor], Fused] | None = None,
        turn: Turn | None = None,
        beside: int = 0,
    ) -> Any:
        """The output; with `look` also the queries and keys `[B, heads, N, d]`. `bias` is added to the scaled scores, and `turn`
        turns queries and keys.

        With `fuse` the output is that of fewer tokens, `[B, N', C]`: it is shown the probabilities `[B, heads, N, N]`, and the
        values are made from the tokens that it leaves. The last `beside` tokens of `x` are read and ask nothing: they have keys
        and values alone, and no place.
        """
        n = x.shape[1] - beside
        if beside:
            bias = None if bias is None else F.pad(bias, (0, beside))
            turn = None if turn is None else turn.unmoved(beside)
        if fuse is not None:
            return self._fused(x, n, bias, fuse, turn)
        q, k, v = project(self, x, turn)
        q = q[:, :, :n]
        if self.operands is None:
            p = self._drop_rate()
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=cast(float, self.scale))
        else:
            mixed = self._mix(self._probabilities(q, k, bias), v)
        y = emit(self, mixed, x[:, :n])
        return (y, q, k[:, :, :n]) if look else y

    def _fused(self, x: Tensor, n: int, bias: Tensor | None, fuse: Callable[[Tensor], Fused], turn: Turn | None) -> Tensor:
        q, k = _queries_and_keys(self, x)
        probs = self._probabilities(turned(q, turn)[:, :, :n], turned(k, turn), bias)
        tokens, merge, spread = fuse(probs[..., :n])
        left = tokens.x
        # A map with its columns summed and its rows averaged, times new values, is the map as it was, times the values spread
        # over the old tokens, its rows averaged after. So the map itself is never rearranged.
        v = spread(_values(self, left))
        if n < x.shape[1]:
            v = torch.cat([v, _values(self, x[:, n:])], 1)
        mixed = self._mix(probs, _to_heads(self, v))
        return emit(self, _to_heads(self, merge(mixed.transpose(1, 2).flatten(2))), left)

    def _drop_rate(self) -> float:
        drop = cast(Any, getattr(self, "attn_drop", None))
        return drop.p if drop is not None and self.training else 0.0

    def _probabilities(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        o, q = self.operands, q * cast(float, self.scale)
        scores = q @ k.mT if o is None else o["q"](q) @ o["k"](k).mT
        return F.softmax(scores if bias is None else scores + bias, dim=-1)

    def _mix(self, probs: Tensor, v: Tensor) -> Tensor:
        o, p = self.operands, self._drop_rate()
        probs = F.dropout(probs, p) if p > 0 else probs
        return probs @ v if o is None else o["probs"](probs) @ o["v"](v)


class PlainBlock(nn.Module):
    """A pre-norm block from the parts of another, with hook points for reducers; `[B, N, C]` to `[B, N', C]`.

    A reducer's `place` says where it works, and so what it is called with:

    - "between" attention and MLP, where it has no `place`: `(tokens, q, k, bias, block)`, to the `Tokens` that are left;
    - "after" the MLP: the same;
    - "ahead", between the softmax and the values: `(tokens, probs, block)`, to a `Fused`.

    `prompts` `[P, C]`, where they are set, are tokens that live in this block alone: they enter it with the others, are attended
    to, and are dropped at its end. Nobody reads what becomes of them, so they have keys and values and nothing else.

    `last` is the block after which the model goes on with a plain tensor.
    """

    def __init__(self, block: nn.Module, name: str, last: bool, position: Position | None = None) -> None:
        super().__init__()
        _adopt(self, block)
        if not isinstance(self.attn, PlainAttention):
            self.attn = PlainAttention(cast(nn.Module, self.attn), position)
        self.name, self.last = name, last
        self.reducers = nn.ModuleList()
        self.prompts: nn.Parameter | None = None
        self.train(block.training)

    batch_first = True

    @property
    def self_attn(self) -> PlainBlock:
        """`torch.nn.TransformerEncoder` asks its first layer for `self_attn.batch_first`."""
        return self

    def forward(self, x: Tensor | Tokens, *mask: Any, **given: Any) -> Tensor | Tokens:
        tokens, turn, bias = self.entering(x, *mask, **given)
        norm1, q, k = cast(nn.Module, self.norm1), None, None
        if ahead := self._reducers("ahead"):

            def fuse(probs: Tensor) -> Fused:
                nonlocal tokens
                tokens, merge, spread = ahead[0](tokens, probs, self)
                return tokens._replace(x=norm1(tokens.x)), merge, spread

            y = self.attn(norm1(self._prompted(tokens.x)), bias, fuse=fuse, turn=turn, **self._beside())
        else:
            y, q, k = self.attn(norm1(self._prompted(tokens.x)), bias, look=True, turn=turn, **self._beside())
        tokens = tokens._replace(x=tokens.x + branch(self, 1, y))
        for reducer in self._reducers("between"):
            tokens = reducer(tokens, q, k, bias, self)
            q = k = None  # a second reducer in the same block would need the keys of tokens that are gone
        y = cast(nn.Module, self.mlp)(cast(nn.Module, self.norm2)(tokens.x))
        tokens = tokens._replace(x=tokens.x + branch(self, 2, y))
        for reducer in self._reducers("after"):
            tokens = reducer(tokens, q, k, bias, self)
        return tokens.handed_on(self.last)

    def entering(self, x: Tensor | Tokens, *mask: Any, **given: Any) -> tuple[Tokens, Turn | None, Tensor | None]:
        """The tokens, the angles of each, and what is added to their scores, from what the model hands to the block."""
        tokens, attn = Tokens.of(x), cast(PlainAttention, self.attn)
        position = attn.position
        used = "" if position is None else position.argument
        # Models hand every block masks and the like, which are None where the block is plain.
        others = {"a mask": next((m for m in mask if m is not None), None)} | {k: v for k, v in given.items() if k != used}
        if unknown := [k for k, v in others.items() if _says(v)]:
            raise VitreousError(f"block '{self.name}' was slimmed for a plain sequence: it cannot use {unknown[0]}")
        if position is None:
            return tokens, None, tokens.bias()
        n = tokens.x.shape[1]
        turn, bias = position.placed(attn, given, n, tokens.place)
        if tokens.place is None and len(self.reducers):
            tokens = tokens._replace(place=torch.arange(n, device=tokens.x.device).expand(tokens.x.shape[0], -1))
        counted = tokens.bias()
        return tokens, turn, counted if bias is None else bias if counted is None else bias + counted

    def _prompted(self, x: Tensor) -> Tensor:
        return x if self.prompts is None else torch.cat([x, self.prompts.expand(x.shape[0], -1, -1)], 1)

    def _beside(self) -> dict[str, int]:
        return {} if self.prompts is None else {"beside": self.prompts.shape[-2]}

    def _reducers(self, place: str) -> list[nn.Module]:
        return [r for r in self.reducers if getattr(r, "place", "between") == place]


def plain_blocks(model: nn.Module, step: str) -> list[PlainBlock]:
    """Replace every attention block of `model`, in place, by a `PlainBlock`; refuse with the reason where one is not plain."""
    anatomy = read(model)
    anatomy.require_plain(step)
    blocks = []
    for i, found in enumerate(anatomy.blocks):
        block = model.get_submodule(found.name)
        if not isinstance(block, PlainBlock):
            made, position = parts(block, model.get_submodule(found.attention.name))
            if position is not None:
                position = replace(position, prefix=anatomy.prefix)
            new = PlainBlock(made, found.name, last=i == len(anatomy.blocks) - 1, position=position)
            new.train(block.training)
            if isinstance(block, nn.ModuleList):  # what joins the pairs is tried while all of them are there
                owner, _, layers = found.name.rpartition(".")[0].rpartition(".")
                if not isinstance(model.get_submodule(owner), Chain):
                    _put(model, owner, chain(model.get_submodule(owner), layers, cast(int, anatomy.width)))
            _put(model, found.name, block := new)
        blocks.append(block)
    return blocks


def _says(given: Any) -> bool:
    """Whether an argument of a block asks for something. A mask that hides nothing does not; Hugging Face makes one of its own
    while it is traced, when its values cannot be read."""
    if not isinstance(given, Tensor):
        return given is not None and given is not False
    if torch.compiler.is_compiling():
        return False
    return not bool(given.all()) if given.dtype == torch.bool else bool(given.any())


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules of `model` on the same weights: to be rearranged by `plain_blocks` and looked at."""
    held = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(t): t for t in held})


def merged(model: nn.Module) -> nn.Module:
    """`model` itself, its low-rank adapters (peft's LoRA layers) merged in place into the layers that they wrap.

    For steps that change weights: quantizers, and what removes rows.
    """
    for name, module in list(model.named_modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module) and hasattr(module, "merge"):
            cast(Any, module).merge()
            _put(model, name, base)
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def places(step: Any, depth: int, default: Iterable[int]) -> list[int]:
    """The blocks where a token step acts, in order: its `at`, or `default` where that is None."""
    at = sorted(set(default if step.at is None else step.at))
    if wrong := [i for i in at if not 0 <= i < depth]:
        raise VitreousError(f"{step.name}: the model has blocks 0 to {depth - 1}, there is no block {wrong[0]}")
    return at


# Whose reductions are being written down, and where; one list for each `traced` that is open in this thread or task.
_TRACES: ContextVar[tuple[tuple[frozenset[nn.Module], list[Reduction]], ...]] = ContextVar("traces", default=())


@contextmanager
def traced(model: nn.Module) -> Iterator[list[Reduction]]:
    """`with traced(model) as trace: model(x)`: every reduction of tokens in the order in which they ran; empty if none does.

    Passes of the same model in other threads are not written down. A compiled model runs as it is written meanwhile.
    """
    blocks = frozenset(m for m in model.modules() if isinstance(m, PlainBlock))
    trace: list[Reduction] = []
    token = _TRACES.set((*_TRACES.get(), (blocks, trace)))
    try:
        with as_written(model):
            yield trace
    finally:
        _TRACES.reset(token)


def note(block: PlainBlock, reduction: Callable[[], Reduction]) -> None:
    """A reducer of `block` says what it did, to whoever is listening."""
    if torch.compiler.is_compiling():
        return
    for blocks, trace in _TRACES.get():
        if block in blocks:
            trace.append(reduction())


def _adopt(new: nn.Module, old: nn.Module) -> None:
    for name, child in old.named_children():
        new.add_module(name, child)
    for name, value in old.named_parameters(recurse=False):
        new.register_parameter(name, value)
    for name, value in old.named_buffers(recurse=False):
        new.register_buffer(name, value, persistent=name not in old._non_persistent_buffers_set)


def _queries_and_keys(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """As `project`, without the values."""
    a = cast(Any, attn)
    if getattr(a, "qkv", None) is None:
        q, k = a.q_proj(x), a.k_proj(x)
    else:
        made = _rows(a.qkv, x, slice(0, 2 * (a.qkv.out_features // 3)))
        if getattr(a, "q_bias", None) is not None:
            made = made + torch.cat((a.q_bias, a.k_bias))
        q, k = made.chunk(2, -1)
    q, k = _to_heads(a, q), _to_heads(a, k)
    return getattr(a, "q_norm", nn.Identity())(q), getattr(a, "k_norm", nn.Identity())(k)


def _values(attn: nn.Module, x: Tensor) -> Tensor:
    """As `project`, the values alone, the heads side by side: `[B, N, C]`."""
    a = cast(Any, attn)
    if getattr(a, "qkv", None) is None:
        return a.v_proj(x)
    made = _rows(a.qkv, x, slice(2 * (a.qkv.out_features // 3), None))
    return made if getattr(a, "v_bias", None) is None else made + a.v_bias


def _to_heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


def _rows(linear: nn.Module, x: Tensor, rows: slice) -> Tensor:
    """Some of the outputs of a linear layer, called as the module it is: what a quantizer holds for each output is cut alike."""
    with nullcontext() if torch.compiler.is_compiling() else _CUTTING:
        tensors = (*linear.named_parameters(), *linear.named_buffers())
        outputs = cast(Any, linear).out_features
        return functional_call(linear, {n: t[rows] for n, t in tensors if t.ndim and len(t) == outputs}, (x,))


_CUTTING = Lock()  # for the time of the call the layer holds some of its rows only, which no other pass may meet
