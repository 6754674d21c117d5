"""A `TorchFunctionMode` that lets the backward pass of what a model calls go, as wanted, through an operation or by its rule.

What is called is known by its name, and what is not known is refused: a call without a rule would give a wrong map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import VitreousError
from ..glass.multihead import multi_head
from .rules import (
    Product,
    contracted_rule,
    contraction_rule,
    convolution_rule,
    image_linear_rule,
    image_rule,
    linear_rule,
    mean_rule,
    product_rule,
    published_product_rule,
    published_sum_rule,
    sum_rule,
)

ELSEWHERE = "use see.rollout, see.grad_cam, see.integrated_gradients or see.occlusion, which need no rules"


@dataclass
class Way:
    """Where backward passes go, and the relevance that passed each named operation."""

    relevance: bool = False
    layers: dict[str, Tensor] = field(default_factory=dict)


class Fork(torch.autograd.Function):
    """y, whose backward pass goes on through the operation that made it, or once `way.relevance` is set around it.

    `rule` turns the relevance of y into that of each of `inputs`, None where there is none to give.
    """

    @staticmethod
    def forward(ctx: Any, way: Way, name: str, rule: Rule, y: Tensor, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # on the way that is not taken nothing is computed
        ctx.way, ctx.name, ctx.rule, ctx.inputs = way, name, rule, len(inputs)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (r,) = grads
        if r is None or not ctx.way.relevance:
            return None, None, None, r, *[None] * ctx.inputs
        if ctx.name:
            ctx.way.layers[ctx.name] = r.flatten(1).sum(1)
        return None, None, None, None, *ctx.rule(r)


Rule = Callable[[Tensor], Sequence[Tensor | None]]

# What works on one value, or norms a token.
POINTWISE = {
    "layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "normalize", "softmax", "log_softmax", "gelu", "relu",
    "relu6", "silu", "mish", "tanh", "sigmoid", "logsigmoid", "hardswish", "hardsigmoid", "hardtanh", "elu", "selu", "celu",
    "leaky_relu", "prelu", "softplus", "erf", "exp", "log", "sqrt", "rsqrt", "square", "pow", "reciprocal", "abs", "neg", "clamp",
    "clamp_min", "clamp_max", "clip", "mul", "multiply", "rmul", "fake_quantize_per_tensor_affine",
}  # fmt: skip
SUMS, DIFFERENCES, DIVISIONS = {"add", "radd"}, {"sub", "subtract", "rsub"}, {"div", "divide", "true_divide", "truediv"}
REDUCTIONS, PRODUCTS = {"mean", "sum"}, {"matmul", "rmatmul", "bmm", "mm"}
# One number that tells of a token: what is divided by it, or has it taken away, is normed.
STATISTICS = {"norm", "vector_norm", "var", "std", "amax", "amin"}
# Functions that only move values: there the gradient itself is the rule; of a maximum, the winner takes all.
MOVES = {
    "reshape", "view", "view_as", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "unbind", "unflatten",
    "flatten", "ravel", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "contiguous", "clone", "to", "type",
    "type_as", "float", "double", "cpu", "cuda", "chunk", "split", "tensor_split", "narrow", "select", "index_select", "gather",
    "take_along_dim", "getitem", "get", "cat", "concat", "stack", "roll", "flip", "repeat", "repeat_interleave", "amax", "max",
    "dropout", "masked_fill", "where", "pad", "unfold", "pixel_unshuffle",
}  # fmt: skip


class Tape(TorchFunctionMode):
    """While active, makes a `Fork` of whatever is computed from the `image`."""

    def __init__(
        self, kind: str, image: Tensor, attention: Sequence[str], weights: dict[int, str], published: bool = False
    ) -> None:
        super().__init__()
        self.sum_rule = published_sum_rule if published else sum_rule
        self.product_rule = published_product_rule if published else product_rule
        self.kind, self.attention, self.weights, self.published = kind, attention, weights, published
        self.way = Way()  # not the tape itself: graphs that hold what holds them are never freed
        self.probs: dict[str, Tensor] = {}
        self.scores = False  # whether the last product of activations was queries times keys
        self.raw, self.statistics, self.now = (WeakIdKeyDictionary() for _ in range(3))
        self.raw[image] = True  # the image, cut, moved and scaled: its values are still those of pixels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if len(self.now):
            args, kwargs = _swapped(args, self.now), cast(dict[str, Any], _swapped(kwargs, self.now))
        given = list(_tensors((args, kwargs)))
        if not any(t.requires_grad for t in given):
            return func(*args, **kwargs)
        called = func.__name__
        if kwargs.get("inplace") or (called.endswith("_") and not called.endswith("__") and called != "requires_grad_"):
            return self._in_place(func, types, args, kwargs)
        out = self._ruled(func, called.strip("_"), args, kwargs)
        if out is None:
            raise VitreousError(f"relevance has no rule for '{called}', which {self.kind} calls: {ELSEWHERE}")
        live = [t for t in given if t.requires_grad]
        name, made = called.strip("_"), list(_tensors(out))
        if all(t in self.raw for t in live) and name in MOVES | SUMS | DIFFERENCES | DIVISIONS | {"mul"}:
            self.raw.update((t, True) for t in made)
        if all(t in self.statistics for t in live):
            self.statistics.update((t, True) for t in made)
        return out

    def _ruled(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the call gives, in a fork; None where there is no rule."""
        if func is F.multi_head_attention_forward:
            return multi_head(self._mixed, *args, **kwargs, linear=self._linear)
        if any(_needs(t) for t in _tensors(kwargs)):
            return func(*args, **kwargs) if name in MOVES else None
        if func is F.linear:
            return self._linear(*args, **{{"input": "x", "weight": "w", "bias": "b"}.get(k, k): v for k, v in kwargs.items()})
        if func is F.conv2d:
            return self._convolution(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if name in PRODUCTS and not kwargs:
            return self._product(torch.matmul, *(args if name != "rmatmul" else args[::-1]))
        if name == "einsum" and len(operands := args[1:] if len(args) > 2 else args[1]) == 2:
            return self._product(lambda a, b: torch.einsum(args[0], a, b), *operands)
        if name in SUMS and not kwargs:
            return self._sum(*args)
        if name in DIFFERENCES and not kwargs:
            a, b = args if name != "rsub" else args[::-1]
            if _needs(b) and b in self.statistics:
                return self._pointwise(func, args, {})
            return self._sum(a, self._pointwise(torch.neg, (b,), {}) if _needs(b) else -b)
        if name in STATISTICS and (name != "amax" or kwargs.get("keepdim")):
            return self._statistic(func(*args, **kwargs), args[0])
        if name in REDUCTIONS:
            return self._reduced(func, args, kwargs)
        if name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d") and args[1] in (1, (1, 1), [1, 1]):
            return self._reduced(torch.mean, (args[0], (-1,) if name.endswith("1d") else (-2, -1), True), {}, statistic=False)
        if name in POINTWISE or (name in DIVISIONS and not self._follows(args[-1])):
            return self._pointwise(func, args, kwargs)
        if name in DIVISIONS and not kwargs and args[1].shape[-1:] == (1,) != args[0].shape[-1:]:  # by a norm of the same tokens
            return self._fork("", lambda r: [r, None], func(*args, **kwargs), args[0], args[1])
        out = func(*args, **kwargs)
        return out if name in MOVES or not any(t.requires_grad for t in _tensors(out)) else None

    def _in_place(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Computed aside; whoever uses the tensor from now on is given what it has become."""
        called = func.__name__.rstrip("_")
        func = func if kwargs.pop("inplace", False) else getattr(Tensor, called, getattr(F, called, None))
        x = args[0]
        if func is None or x.untyped_storage().nbytes() > x.numel() * x.element_size():
            raise VitreousError(
                f"{self.kind} changes a part of a tensor in place ('{called}_'), which relevance cannot follow: {ELSEWHERE}"
            )
        new = self.now[x] = self.__torch_function__(func, types, args, kwargs)
        return new

    def _fork(self, name: str, rule: Rule, y: Tensor, *inputs: Tensor) -> Tensor:
        return cast(Tensor, Fork.apply(self.way, name, rule, y, *inputs))

    def _follows(self, t: Any) -> bool:
        return _needs(t) and t not in self.statistics

    def _linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y, given = F.linear(x, w, b), x.detach()
        rule = image_linear_rule if x in self.raw else linear_rule
        return self._fork(self.weights.get(id(w), ""), lambda r: [rule(given, w, b, y.detach(), r)], y, x)

    def _convolution(
        self, x: Tensor, w: Tensor, b: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Tensor:
        way = stride, padding, dilation, groups
        y, given = F.conv2d(x, w, b, *way), x.detach()
        rule = image_rule if x in self.raw else convolution_rule
        return self._fork(self.weights.get(id(w), ""), lambda r: [rule(given, w, b, y.detach(), r, way)], y, x)

    def _sum(self, a: Any, b: Any) -> Tensor:
        raw = any(_needs(t) and t in self.raw for t in (a, b))

        def constant(t: Any) -> bool:  # a bias, or what is added to attention scores; a position embedding is a summand
            return not self._follows(t) and (not isinstance(t, Tensor) or t.ndim < 2 or self.scores or raw or _needs(t))

        if constant(a) or constant(b):
            return self._pointwise(torch.add, (a, b), {})
        y, rule_of = a + b, self.sum_rule

        def rule(r: Tensor) -> list[Tensor | None]:
            parts = zip((a, b), rule_of(a.detach(), b.detach(), y.detach(), r), strict=True)
            return [part.sum_to_size(t.shape) if t.requires_grad else None for t, part in parts]

        return self._fork("", rule, y, a, b)

    def _product(self, of: Product, a: Tensor, b: Tensor) -> Tensor:
        """By weights as a linear layer. Else the first of a pair is queries times keys; after the softmax, probabilities times
        values."""
        weight = next((t for t in (a, b) if not _needs(t) and (t.ndim < 3 or id(t) in self.weights)), None)
        y = of(a, b)
        if weight is not None:
            x, swapped = (b, True) if weight is a else (a, False)
            given, over = x.detach(), (lambda t, w: of(w, t)) if swapped else of
            return self._fork(
                self.weights.get(id(weight), ""), lambda r: [contraction_rule(over, given, weight, y.detach(), r)], y, x
            )
        self.scores = not self.scores
        if not self.scores and not self.probs:
            raise VitreousError(
                f"{self.kind} multiplies activations without a softmax, which relevance cannot follow: {ELSEWHERE}"
            )
        name = self._owner() + ".qk" if self.scores else list(self.probs)[-1] + ".av"
        takers, plain, published = [t.requires_grad for t in (a, b)], self.product_rule, self.published
        usual = of is torch.matmul and a.shape[:-2] == b.shape[:-2]

        def rule(r: Tensor) -> list[Tensor | None]:
            given, r = (a.detach(), b.detach(), y.detach()), r / sum(takers)
            parts = plain(*given, r) if usual else contracted_rule(of, *given, r, published)
            return [part if takes else None for part, takes in zip(parts, takers, strict=True)]

        return self._fork(name, rule, y, a, b)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if is_causal or enable_gqa:
            raise VitreousError(f"relevance has no rule for causal or grouped attention, which {self.kind} uses: {ELSEWHERE}")
        q = self._pointwise(torch.mul, (q, q.shape[-1] ** -0.5 if scale is None else scale), {})
        scores = self._product(torch.matmul, q, k.mT)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self._product(torch.matmul, self._pointwise(torch.softmax, (scores, -1), {}), v)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, None]:
        return self._attention(q, k, v, mask), None

    def _statistic(self, y: Tensor, x: Tensor) -> Tensor:
        out = self._fork("", lambda _: [None], y, x)
        self.statistics[out] = True
        return out

    def _reduced(self, func: Any, args: Any, kwargs: dict[str, Any], statistic: bool = True) -> Tensor | None:
        """A mean or a sum over some axes, one after another; None over all of them."""
        x, asked = args[0], dict(zip(("dim", "keepdim"), args[1:])) | kwargs
        dims = asked.get("dim", asked.get("axis"))
        if dims is None or asked.keys() - {"dim", "axis", "keepdim"}:
            return None
        dims = sorted(d % x.ndim for d in ((dims,) if isinstance(dims, int) else dims))
        if statistic and dims == [x.ndim - 1] and asked.get("keepdim"):
            return self._statistic(func(*args, **kwargs), x)
        for dim in reversed(dims):
            x = self._fork("", partial(_shared, x.detach(), func(x.detach(), dim), dim), func(x, dim), x)
        for dim in dims if asked.get("keepdim") else ():
            x = x.unsqueeze(dim)
        return x

    def _pointwise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """All relevance to the one input, or in equal parts to the factors of a gate."""
        inputs = [a for a in args if self._follows(a)] or [a for a in args if _needs(a)]
        if not inputs:
            return func(*args, **kwargs)
        others = [a for a in args if _needs(a) and not any(a is i for i in inputs)]

        def rule(r: Tensor) -> list[Tensor | None]:
            part = r / len(inputs) if len(inputs) > 1 else r
            return [*(part.sum_to_size(x.shape) for x in inputs), *[None] * len(others)]

        out = self._fork("", rule, func(*args, **kwargs), *inputs, *others)
        if func.__name__ == "softmax" and self.scores:
            self.probs[self._owner()] = out
        return out

    def _owner(self) -> str:
        done = len(self.probs)
        return self.attention[done] if done < len(self.attention) else f"attention{done}"


def _shared(x: Tensor, y: Tensor, dim: int, r: Tensor) -> list[Tensor | None]:
    return [mean_rule(x, y, r, dim)]


def _needs(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (tuple, list)):
        for g in given:
            yield from _tensors(g)
    elif isinstance(given, dict):
        yield from _tensors(list(given.values()))


def _swapped(given: Any, now: Any) -> Any:
    if isinstance(given, Tensor):
        return now.get(given, given)
    if type(given) in (tuple, list):
        return type(given)(_swapped(g, now) for g in given)
    return {k: _swapped(v, now) for k, v in given.items()} if type(given) is dict else given
