"""Look into a model while it runs, and intervene.

Attention is computed by one of three functions in nearly every model there is: `scaled_dot_product_attention`,
`softmax`, or `multi_head_attention_forward`. A `TorchFunctionMode` sees every call of them while it is active, so no
model needs changing and no forward is copied. Module hooks say which attention module is running. Nothing is left
behind when the block ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from ..anatomy import attention_names, holding_block
from ..errors import VitreousError, nearest
from .compiled import as_written
from .here import enter, here, leave
from .multihead import multi_head

KINDS = ("attention", "q", "k", "v", "output", "block")
SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
SEEN = {F.scaled_dot_product_attention, F.multi_head_attention_forward, *SOFTMAX, *MATMUL}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda p: p.mean(1),  # over heads: [B, N, N]
    "class": lambda p: p[..., 0, :],  # the first query's row: [B, heads, N]
}


@dataclass
class View:
    """What one attention layer did in one call. Parts that were not asked for are None.

    `attention` is `[B, heads, N, N]` (`[B·windows, heads, n, n]` in windowed models, `[B, heads, d, d]` where a model
    attends over channels); `q`, `k`, `v` are `[B, heads, N, d]` as they enter the product; `output` and `block` are
    what the attention module and its residual block return.
    """

    name: str
    attention: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    output: Tensor | None = None
    block: Tensor | None = None


Change = Callable[[Tensor], Tensor]


class Glass(TorchFunctionMode):
    """A context manager; see `glass`."""

    def __init__(
        self,
        model: nn.Module,
        record: Iterable[str] = ("attention",),
        layers: Sequence[int | str] | None = None,
        grad: bool = False,
        reduce: str | Change | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.names = attention_names(model)
        self.record = {record} if isinstance(record, str) else set(record)
        if wrong := self.record - set(KINDS):
            raise VitreousError(f"glass cannot record {sorted(wrong)[0]!r}: choose from {', '.join(KINDS)}")
        if isinstance(reduce, str) and reduce not in REDUCTIONS:
            raise VitreousError(f"glass has no reduction {reduce!r}: choose {', '.join(REDUCTIONS)}, or give a function")
        if grad and reduce is not None:
            raise VitreousError("glass keeps gradients of whole maps only: use grad=True or reduce=, not both")
        self.reduce = REDUCTIONS[reduce] if isinstance(reduce, str) else reduce
        self.grad = grad
        self.only = None if layers is None else {self._name(layer) for layer in layers}
        self.views: list[View] = []
        self._changes: dict[tuple[str, str], list[Change]] = {}
        self._handles: list[Any] = []
        self._running: list[str] = []
        self._product: tuple[Tensor, Tensor] | None = None
        self._waiting: tuple[View, Tensor] | None = None
        self._meanwhile = ExitStack()

    # ---- what was seen

    @property
    def attention(self) -> list[Tensor]:
        """One tensor a call of an attention layer, in the order in which they ran."""
        return [v.attention for v in self.views if v.attention is not None]

    @property
    def gradients(self) -> list[Tensor]:
        """Gradients of `attention` after a backward pass; needs `grad=True`."""
        if any(a.grad is None for a in self.attention):
            raise VitreousError("no gradients of attention yet: open the glass with grad=True, then call backward()")
        return [a.grad for a in self.attention if a.grad is not None]

    def __getitem__(self, layer: int | str) -> View:
        """The last view of a layer, by its name or its number among the model's attention layers."""
        name = self._name(layer)
        for view in reversed(self.views):
            if view.name == name:
                return view
        raise VitreousError(f"layer '{name}' was not recorded: run the model inside the glass, and see `layers=`")

    def clear(self) -> None:
        self.views.clear()

    # ---- interventions: they hold for every call inside the glass

    def mask_heads(self, layer: int | str, heads: int | Sequence[int], factor: float = 0.0) -> Glass:
        """Multiply what these heads of a layer give by `factor`; 0 removes them."""
        chosen = [heads] if isinstance(heads, int) else list(heads)

        def change(mask: Tensor) -> Tensor:
            if wrong := [h for h in chosen if not 0 <= h < mask.shape[1]]:
                raise VitreousError(f"'{self._name(layer)}' has heads 0 to {mask.shape[1] - 1}, there is no {wrong[0]}")
            mask[:, chosen] = factor
            return mask

        return self._add(layer, "heads", change)

    def cut(self, layer: int | str, edges: Tensor) -> Glass:
        """Knock out edges: no attention where `edges` (bool, broadcast to `[B, heads, N, N]`) is true."""
        return self._add(layer, "scores", lambda s: s.masked_fill(edges.to(s.device), -math.inf))

    def add_bias(self, layer: int | str, bias: Tensor) -> Glass:
        """Add `bias` (broadcast to `[B, heads, N, N]`) to the scaled scores before the softmax."""
        return self._add(layer, "scores", lambda s: s + bias.to(s))

    def patch(self, layer: int | str, what: str, value: Tensor | Change) -> Glass:
        """Replace an activation: `what` is "attention" (probabilities), "output" or "block"; `value` is a tensor, or a
        function of what the model computed."""
        if what not in ("attention", "output", "block"):
            raise VitreousError(f"glass cannot patch {what!r}: choose attention, output or block")
        return self._add(layer, what, value if callable(value) else lambda _: value)

    # ---- the mechanism

    def _name(self, layer: int | str) -> str:
        if isinstance(layer, int):
            if not -len(self.names) <= layer < len(self.names):
                raise VitreousError(f"the model has {len(self.names)} attention layers: there is no layer {layer}")
            return self.names[layer]
        if layer not in self.names:
            raise VitreousError(f"the model has no attention layer '{layer}'{nearest(layer, self.names)}")
        return layer

    def _add(self, layer: int | str, what: str, change: Change) -> Glass:
        self._changes.setdefault((self._name(layer), what), []).append(change)
        return self

    def _apply(self, name: str, what: str, x: Tensor) -> Tensor:
        for change in self._changes.get((name, what), ()):
            y = change(x)
            if not isinstance(y, Tensor) or y.shape != x.shape:
                given = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise VitreousError(f"layer '{name}' has {what} of {list(x.shape)}: {given} cannot take its place")
            x = y
        return x

    def _wants(self, name: str, *kinds: str) -> bool:
        return bool(self.record.intersection(kinds)) and (self.only is None or name in self.only)

    def __enter__(self) -> Glass:
        enter(self)
        self._meanwhile.enter_context(as_written(self.model))
        modules = dict(self.model.named_modules())
        for name, module in modules.items():
            if name in self.names or next(module.children(), None) is not None:
                self._handles.append(module.register_forward_pre_hook(self._enter_module(name)))
                self._handles.append(module.register_forward_hook(self._leave_module(name), always_call=True))
        for name in self.names:
            self._watch(modules[name], name, "output")
            holder = holding_block(name, modules)
            if holder:
                self._watch(modules[holder], name, "block")
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        above = []  # modes opened inside that are closed later
        while self in _get_current_function_mode_stack() and (top := _pop_mode()) is not self:
            above.append(top)
        for mode in reversed(above):
            _push_mode(mode)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()
        self._meanwhile.close()
        leave(self)

    def _enter_module(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not here(self):
                return
            if not name:
                self._running.clear()
            self._running.append(name)
            # A backward pass runs without the modes around it; what gradient checkpointing computes anew must be the same.
            if name in self.names and _again() and self not in _get_current_function_mode_stack():
                _push_mode(self)

        return hook

    def _leave_module(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not here(self):
                return
            while self._running and self._running.pop() != name:
                pass
            if name in self.names and _again() and self in _get_current_function_mode_stack()[-1:]:
                _pop_mode()

        return hook

    def _watch(self, module: nn.Module, name: str, kind: str) -> None:
        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            if not here(self) or (not self._wants(name, kind) and (name, kind) not in self._changes):
                return None
            x = out[0] if isinstance(out, tuple) else out
            y = self._apply(name, kind, x)
            if self._wants(name, kind) and not _again():
                view = next((v for v in reversed(self.views) if v.name == name and getattr(v, kind) is None), None)
                if view is None:
                    view = View(name)
                    self.views.append(view)
                setattr(view, kind, self._keep(y))
            if y is x:
                return None
            return (y, *out[1:]) if isinstance(out, tuple) else y

        self._handles.append(module.register_forward_hook(hook))

    def _owner(self) -> str | None:
        """The attention module that is running, if one is."""
        return next((n for n in reversed(self._running) if n in self.names), None)

    def _keep(self, x: Tensor) -> Tensor:
        if self.grad:
            if x.requires_grad:
                x.retain_grad()
            return x
        return x.detach()

    def _changed(self, name: str) -> bool:
        return any((name, what) in self._changes for what in ("heads", "scores", "attention"))

    def _show(self, view: View) -> None:
        if not _again():
            self.views.append(view)

    def _note(self, view: View, probs: Tensor | None, **parts: Tensor | None) -> View:
        for kind, x in {"attention": probs, **parts}.items():
            if x is not None and kind in self.record:
                kept = self.reduce(x) if kind == "attention" and self.reduce else x
                setattr(view, kind, self._keep(kept))
        return view

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in SEEN and here(self):
            name = self._owner()
            if name is None and func is F.scaled_dot_product_attention and self._running:
                name = self._running[-1]
            if name is not None and (self._wants(name, "attention", "q", "k", "v") or self._changed(name)):
                if func is F.scaled_dot_product_attention:
                    return self._attend(name, *args, **kwargs)[0]
                if func is F.multi_head_attention_forward:
                    return self._multi_head(name, *args, **kwargs)
                if func in SOFTMAX:
                    return self._softmax(name, func, args, kwargs)
                return self._matmul(func, args, kwargs)
        return func(*args, **kwargs)

    def _probabilities(self, name: str, scores: Tensor) -> Tensor:
        scores = self._apply(name, "scores", scores)
        probs = scores.softmax(-1)
        if (name, "scores") in self._changes:  # a query whose every edge was cut attends nowhere
            probs = probs.nan_to_num(0.0)
        return self._apply(name, "attention", probs)

    def _head_factor(self, name: str, like: Tensor) -> Tensor | None:
        if (name, "heads") not in self._changes:
            return None
        return self._apply(name, "heads", like.new_ones(1, like.shape[1], 1, 1))

    def _attend(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The mixed values and, where they are asked for or changed, the probabilities."""
        q, k, v = query, key, value
        view = View(name)
        if self._wants(name, "q", "k", "v"):
            self._note(view, None, q=q, k=k, v=v)
        if not self._wants(name, "attention") and not self._changed(name):
            self._show(view)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            return out, None
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        scores = q @ k.mT * (scale if scale is not None else q.shape[-1] ** -0.5)
        if is_causal:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        probs = self._probabilities(name, scores)
        if self._wants(name, "attention", "q", "k", "v"):
            self._show(self._note(view, probs if self._wants(name, "attention") else None))
        out = (F.dropout(probs, dropout_p) if dropout_p > 0 else probs) @ v
        factor = self._head_factor(name, out)
        return out if factor is None else out * factor, probs

    def _multi_head(self, name: str, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor | None]:
            mixed, probs = self._attend(name, q, k, v, mask, dropout)
            if probs is None and kwargs.get("need_weights", True):
                scores = q @ k.mT * q.shape[-1] ** -0.5
                probs = (scores if mask is None else scores + mask).softmax(-1)
            return mixed, probs

        return multi_head(attend, *args, **kwargs)

    def _matmul(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if len(args) == 2 and all(isinstance(a, Tensor) and a.ndim >= 3 for a in args):
            if self._waiting is not None and args[0].shape == self._waiting[1].shape:
                self._note(self._waiting[0], None, v=args[1])
                self._waiting = None
            self._product = (args[0], args[1])
        return out

    def _softmax(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores, *rest = args
        if scores.ndim < 3:
            return func(*args, **kwargs)
        probs = func(self._apply(name, "scores", scores), *rest, **kwargs)
        if (name, "scores") in self._changes:
            probs = probs.nan_to_num(0.0)
        probs = self._apply(name, "attention", probs)
        if self._wants(name, "attention", "q", "k", "v"):
            view = View(name)
            q = k = None
            if self._product is not None and self._product[0].shape[:-1] == scores.shape[:-1]:
                q, k = self._product[0], self._product[1].mT
            self._show(self._note(view, probs if self._wants(name, "attention") else None, q=q, k=k))
            self._waiting = (view, probs)
        factor = self._head_factor(name, probs) if probs.ndim == 4 else None
        if factor is None and (name, "heads") in self._changes:
            raise VitreousError(f"layer '{name}' keeps its heads elsewhere than in [B, heads, N, N]: cannot mask them")
        return probs if factor is None else probs * factor


def _again() -> bool:
    """Whether this runs inside a backward pass: gradient checkpointing computes anew what was seen before."""
    return torch._C._current_graph_task_id() != -1


def glass(
    model: nn.Module,
    record: Iterable[str] = ("attention",),
    layers: Sequence[int | str] | None = None,
    grad: bool = False,
    reduce: str | Change | None = None,
) -> Glass:
    """Look into `model` while it runs: `with glass(model) as g: model(x)`, then `g.attention`.

    Args:
        record: any of "attention" (probabilities), "q", "k", "v", "output" (of the attention module), "block" (its
            block's).
        layers: only these attention layers, by number or dotted name; all by default.
        grad: keep what is recorded in the graph, so that `g.gradients` holds the gradients of the probabilities after
            `backward()`. Needs parameters or an input that require gradients; not together with `reduce`.
        reduce: what to keep of each `[B, heads, N, N]` at once, so that memory stays bounded: "mean" over heads,
            "class" for the first token's row, or a function.

    Interventions are methods of the glass: `mask_heads`, `cut`, `add_bias`, `patch`. When neither probabilities nor an
    intervention is asked for in a layer, its fused kernel runs untouched. Raises `VitreousError` for unknown layers or
    kinds.
    """
    return Glass(model, record, layers, grad, reduce)
