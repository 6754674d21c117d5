"""Layer-wise relevance propagation through vision transformers: which part of a score came through where.

Chefer, Gur & Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), section 3.1. The model runs
once, under a `TorchFunctionMode` that lets the backward pass of what it calls go, as wanted, through the operation, which
gives gradients, or around it by the rule of relevance. So tokens are cut, joined and moved as their gradients would be,
and no forward is copied. A call for which there is no rule is an error, never a wrong map.

Relevance is told in shares of the explained score: 1 enters at the output. The rules, where c are the contributions that
sum to y = Σc, and R is the relevance of y:

- linear layers (eq. 5): those with c > 0 share R by their size; biases get none.
- sums and products of two activations (eq. 7 to 10): contributions of the sign of y share R by their size; of a product,
  each factor takes half. The paper lets all contributions share by c / y, negative ones too, and brings the two sums
  back to their total after. Where contributions cancel, that divides by almost nothing: in float32 its maps are
  rounding noise. Without cancelling there is no difference.
- the convolution that reads the image (the z^B rule of Montavon et al., "Explaining Nonlinear Classification Decisions with
  Deep Taylor Decomposition", 2017): as linear layers, counted from each image's own least and greatest value.
- all that works on one value or norms a token passes R on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

from .anatomy import Anatomy, read
from .copies.own import still
from .errors import VitreousError
from .glass.multihead import multi_head
from .outputs import answer
from .score import Target, criterion


@dataclass(frozen=True)
class Relevance:
    """Relevances of a batch, in shares of the explained `score`: times it, they are parts of it."""

    score: Tensor  # [B]: the logit of the target, or what `vitreous.score` makes of features
    pixels: Tensor  # [B, C, H, W]
    entering: Tensor  # [B, N]: of each token, prefix tokens first, as it enters the first block; sums to 1
    leaving: Tensor  # [B, N]: as it leaves the last block
    layers: dict[str, Tensor]  # [B]: what passes each linear layer, and the products "….attn.qk" and "….attn.av"
    attention: dict[str, Tensor]  # [B, heads, N, N] of each attention's probabilities; sums to half of its product's
    gradients: dict[str, Tensor]  # of the score, for the same probabilities; empty when not asked for


def relevance(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    gradients: bool = False,
    anatomy: Anatomy | None = None,
    published: bool = False,
) -> Relevance:
    """Where the score of `target` came from.

    Costs the multiplications of some four forward passes, with gradients five. Some hundred megabytes are kept of an image
    in a ViT-S: take a few at a time. Parameters receive no gradients; models in half precision run in float32.

    Args:
        x: images `[B, C, H, W]`, each explained as if it were alone.
        target: class index for all images, or `[B]`; the predicted class by default. Features are explained as
            `vitreous.score` tells, feature by feature its square, unless an index is given.
        gradients: also the gradients of the score for the attention probabilities.
        anatomy: what `anatomy.read` says of the model, where it has been read already.
        published: sums and products of two activations by the paper's own rules, in float64, without which they are noise.

    Raises `VitreousError` for models whose blocks are not plain, for unknown targets, and naming the function for which
    there is no rule.
    """
    anatomy = anatomy or read(model)
    anatomy.require_plain("layer-wise relevance propagation")
    explain = criterion(model, x)
    ends: list[Tensor] = []  # the tokens before the first and after the last block

    def before(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        ends.append(given[0])

    def after(_: nn.Module, __: Any, out: Any) -> None:
        ends.append(out[0] if isinstance(out, tuple) else out)

    with still(model) as own, torch.enable_grad():
        dtype = torch.float64 if published else next((p.dtype for p in own.parameters() if p.is_floating_point()), torch.float32)
        held = (*own.named_parameters(), *own.named_buffers())
        state = {n: t.detach().to(dtype) if t.is_floating_point() else t for n, t in held}
        weights = {id(t): n.rpartition(".")[0] for n, t in state.items()}
        tape = Tape(anatomy.kind, x.shape, [a.name for a in anatomy.attention], weights, published)
        first, last = (own.get_submodule(anatomy.blocks[i].name) for i in (0, -1))
        handles = [first.register_forward_pre_hook(before), last.register_forward_hook(after)]
        image = x.detach().to(dtype).clone().requires_grad_()
        try:
            with tape:
                out = answer(torch.func.functional_call(own, state, (image,)))
        finally:
            for handle in handles:
                handle.remove()
        score, start = explain(out, target)
        probs = list(tape.probs.values())
        slopes = torch.autograd.grad(score.sum(), probs, retain_graph=True) if gradients else ()
        tape.way.relevance = True
        pixels, entering, leaving, *maps = torch.autograd.grad(out, [image, *ends, *probs], start)
    return Relevance(
        score.detach(),
        pixels,
        entering.sum(2),
        leaving.sum(2),
        tape.way.layers,
        dict(zip(tape.probs, maps, strict=True)),
        dict(zip(tape.probs, slopes, strict=False)),
    )


Convolution = tuple[Any, ...]  # stride, padding, dilation and groups, as F.conv2d takes them

# ---- rules: from the inputs of an operation, its output y and the relevance r of that, to the relevances of the inputs


def linear_rule(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, r: Tensor) -> Tensor:
    """To each contribution c its part of Σ max(c, 0). As that is (Σc + Σ|c|) / 2, no weight is ever split by its sign."""
    size, w_size = x.abs(), w.abs()
    whole = F.linear(size, w_size)
    least = _negligible(whole)
    whole = whole.add_(y) if b is None else whole.add_(y).sub_(b)
    s = r / whole.clamp_(min=least)
    return (x * (s @ w)).addcmul_(size, s @ w_size)


def sum_rule(a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Shares a / y and b / y of y = a + b where both have its sign; else all to the one that has."""
    of_a = r * (a / y).clamp_(0, 1).nan_to_num_(0.5)
    return of_a, r - of_a


def product_rule(a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """To both factors of each contribution c of y = a @ b its part of Σ max(σc, 0) = (|Σc| + Σ|c|) / 2, σ the sign of y."""
    a_size, b_size = a.abs(), b.abs()
    s = r / (a_size @ b_size).add_(y.abs()).add_(1e-30)
    signed = s * y.sign()
    of_a = (a * (signed @ b.mT)).addcmul_(a_size, s @ b_size.mT)
    return of_a, (b * (a.mT @ signed)).addcmul_(b_size, a_size.mT @ s)


def published_sum_rule(a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 8 to 10: shares a / y and b / y, negative ones too; then each summand's sum becomes its size's share of all."""
    s = torch.where(y == 0, 0, r / y)
    parts = [a * s, b * s]
    sums = [part.flatten(1).sum(1) for part in parts]
    whole = r.flatten(1).sum(1) / (sums[0].abs() + sums[1].abs()).clamp_min(1e-30)
    of_a, of_b = ((t.sign() * whole).view(-1, *[1] * (y.ndim - 1)) * part for t, part in zip(sums, parts, strict=True))
    return of_a, of_b


def published_product_rule(a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 7: to both factors of each contribution c of y = a @ b its part c / y, negative ones too."""
    s = torch.where(y == 0, 0, r / y)
    return a * (s @ b.mT), b * (a.mT @ s)


def mean_rule(x: Tensor, y: Tensor, r: Tensor, dim: int) -> Tensor:
    c = (x * y.sign().unsqueeze(dim)).relu_()
    return c * (r / (c.sum(dim) + 1e-30)).unsqueeze(dim)


def image_rule(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, r: Tensor, way: Convolution = ()) -> Tensor:
    """z^B: contributions (x − l)·w for w > 0 and (x − h)·w for w < 0, l and h an image's least and greatest value."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    positive, negative, ones = w.clamp(min=0), w.clamp(max=0), torch.ones_like(x[:1])
    whole = y - low * F.conv2d(ones, positive, None, *way) - high * F.conv2d(ones, negative, None, *way)
    whole = whole if b is None else whole - b[:, None, None]
    s = r / whole.clamp_(min=_negligible(whole))
    of_positive, of_negative = (conv2d_input(x.shape, part, s, *way) for part in (positive, negative))
    return (x - low) * of_positive + (x - high) * of_negative


def convolution_rule(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, r: Tensor, way: Convolution = ()) -> Tensor:
    """`linear_rule` for the convolutions of a stem behind the one that reads the image."""
    size, w_size = x.abs(), w.abs()
    whole = F.conv2d(size, w_size, None, *way)
    least = _negligible(whole)
    whole = whole.add_(y) if b is None else whole.add_(y).sub_(b[:, None, None])
    s = r / whole.clamp_(min=least)
    return (x * conv2d_input(x.shape, w, s, *way)).addcmul_(size, conv2d_input(x.shape, w_size, s, *way))


def _negligible(sizes: Tensor) -> Tensor:
    """The least sum to share by, for each image: below it is rounding, or nothing but a bias made the output."""
    usual = sizes.flatten(1).mean(1).clamp_min(1e-25)
    return 1e-5 * usual.view(-1, *[1] * (sizes.ndim - 1))


# ---- the mechanism


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

POINTWISE = {
    F.layer_norm, F.rms_norm, F.batch_norm, F.normalize, torch.neg, Tensor.neg, Tensor.__neg__,
    F.softmax, torch.softmax, Tensor.softmax, F.gelu, F.relu, torch.relu, Tensor.relu,
    F.silu, F.tanh, torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid, F.hardswish, F.elu, F.leaky_relu, F.softplus,
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.fake_quantize_per_tensor_affine,
}  # fmt: skip
DIVISIONS = {torch.div, Tensor.div, Tensor.__truediv__}
SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
NORMS = {torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm}
SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
MEANS = {torch.mean, Tensor.mean}
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
# Functions that only move values: there the gradient itself is the rule; of a maximum, the winner takes all.
MOVES = {
    "reshape", "view", "view_as", "permute", "transpose", "swapaxes", "movedim", "unbind", "unflatten", "flatten", "squeeze",
    "unsqueeze", "expand", "expand_as", "contiguous", "clone", "to", "type_as", "float", "double", "chunk", "split",
    "tensor_split", "narrow", "select", "index_select", "gather", "take_along_dim", "__getitem__", "__get__", "cat", "concat",
    "stack", "roll", "flip", "repeat", "amax", "dropout", "masked_fill",
}  # fmt: skip


class Tape(TorchFunctionMode):
    """While active, makes a `Fork` of whatever is computed from the image."""

    def __init__(
        self, kind: str, pixels: torch.Size, attention: Sequence[str], weights: dict[int, str], published: bool = False
    ) -> None:
        super().__init__()
        self.sum_rule = published_sum_rule if published else sum_rule
        self.product_rule = published_product_rule if published else product_rule
        self.kind, self.pixels, self.attention, self.weights = kind, pixels, attention, weights
        self.way = Way()  # not the tape itself: graphs that hold what holds them are never freed
        self.probs: dict[str, Tensor] = {}
        self.scores = False  # whether the last product of activations was queries times keys

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not any(t.requires_grad for t in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        if not any(t.requires_grad for t in _tensors(kwargs)):
            if func is F.linear:
                return self._linear(*args, **{{"input": "x", "weight": "w", "bias": "b"}.get(k, k): v for k, v in kwargs.items()})
            if func is F.conv2d:
                return self._convolution(*args, **kwargs)
            if func is F.scaled_dot_product_attention:
                return self._attention(*args, **kwargs)
            if func in NORMS:
                return self._fork("", lambda _: [None], func(*args, **kwargs), args[0])
            if func in PRODUCTS:
                return self._product(*args)
            if func in SUMS and not kwargs:
                return self._sum(*args)
            if func in MEANS and isinstance(dim := kwargs.get("dim", args[1] if len(args) > 1 else None), int):
                x, y = args[0], func(*args, **kwargs)
                if y.ndim < x.ndim:
                    return self._fork("", lambda r: [mean_rule(x.detach(), y.detach(), r, dim)], y, x)
            if func in POINTWISE or (func in DIVISIONS and not _needs(args[1])):
                return self._pointwise(func, args, kwargs)
            if func in DIVISIONS and args[1].shape[-1:] == (1,) != args[0].shape[-1:]:  # by a norm of the same tokens
                x, y = args[0], func(*args, **kwargs)
                return self._fork("", lambda r: [r, None], y, x, args[1])
        if func is F.multi_head_attention_forward:
            return multi_head(self._mixed, *args, **kwargs, linear=self._linear)
        out = func(*args, **kwargs)
        if func.__name__ not in MOVES and any(t.requires_grad for t in _tensors(out)):
            raise VitreousError(f"relevance has no rule for '{func.__name__}', which {self.kind} calls")
        return out

    def _fork(self, name: str, rule: Rule, y: Tensor, *inputs: Tensor) -> Tensor:
        return cast(Tensor, Fork.apply(self.way, name, rule, y, *inputs))

    def _linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y, given = F.linear(x, w, b), x.detach()
        return self._fork(self.weights.get(id(w), ""), lambda r: [linear_rule(given, w, b, y.detach(), r)], y, x)

    def _convolution(
        self, x: Tensor, w: Tensor, b: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Tensor:
        way = stride, padding, dilation, groups
        y, given = F.conv2d(x, w, b, *way), x.detach()
        rule = image_rule if x.shape == self.pixels else convolution_rule
        return self._fork(self.weights.get(id(w), ""), lambda r: [rule(given, w, b, y.detach(), r, way)], y, x)

    def _sum(self, a: Any, b: Any) -> Tensor:
        def constant(t: Any) -> bool:  # a bias, or what is added to attention scores; a position embedding is a summand
            return not _needs(t) and (not isinstance(t, Tensor) or t.ndim < 2 or self.scores)

        if constant(a) or constant(b):
            return self._pointwise(torch.add, (a, b), {})
        y, rule_of = a + b, self.sum_rule

        def rule(r: Tensor) -> list[Tensor | None]:
            parts = zip((a, b), rule_of(a.detach(), b.detach(), y.detach(), r), strict=True)
            return [part.sum_to_size(t.shape) if t.requires_grad else None for t, part in parts]

        return self._fork("", rule, y, a, b)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """The first of a pair is queries times keys; after the softmax, probabilities times values."""
        self.scores = not self.scores
        name = self._owner() + ".qk" if self.scores else list(self.probs)[-1] + ".av"
        y, takers, rule_of = a @ b, [t.requires_grad for t in (a, b)], self.product_rule

        def rule(r: Tensor) -> list[Tensor | None]:
            parts = rule_of(a.detach(), b.detach(), y.detach(), r / sum(takers))
            return [part if takes else None for part, takes in zip(parts, takers, strict=True)]

        return self._fork(name, rule, y, a, b)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if is_causal or enable_gqa:
            raise VitreousError(f"relevance has no rule for causal or grouped attention, which {self.kind} uses")
        q = self._pointwise(torch.mul, (q, q.shape[-1] ** -0.5 if scale is None else scale), {})
        scores = self._product(q, k.mT)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self._product(self._pointwise(torch.softmax, (scores, -1), {}), v)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, None]:
        return self._attention(q, k, v, mask), None

    def _pointwise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """All relevance to the one input, or in equal parts to the factors of a gate."""
        inputs = [a for a in args if _needs(a)]
        if not inputs:
            return func(*args, **kwargs)

        def rule(r: Tensor) -> list[Tensor | None]:
            part = r / len(inputs) if len(inputs) > 1 else r
            return [part.sum_to_size(x.shape) for x in inputs]

        out = self._fork("", rule, func(*args, **kwargs), *inputs)
        if func in SOFTMAX and self.scores:
            self.probs[self._owner()] = out
        return out

    def _owner(self) -> str:
        done = len(self.probs)
        return self.attention[done] if done < len(self.attention) else f"attention{done}"


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
