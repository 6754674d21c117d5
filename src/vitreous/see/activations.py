"""What class activation maps are made of: the activations of one layer, place by place, and the score's gradients there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, read
from ..blocks import Reduction, traced
from ..copies.own import exact, run, still
from ..errors import VitreousError, nearest
from ..score import Target, criterion
from .patches import check_images, grid_of, on_grid, painting


@dataclass(frozen=True)
class Places:
    """A layer's places, row by row, without class and register tokens."""

    values: Tensor  # [B, C, n]
    slopes: Tensor  # [B, C, n]: the gradients of the explained score; zeros when they were not asked for
    draw: Callable[[Tensor], Tensor]  # a value for each place [B, n] to heatmaps [B, h, w]; what is negative becomes 0


def places(model: nn.Module, x: Tensor, target: Target, layer: int | str | None, gradients: bool = True) -> Places:
    """The places of a layer for images `x` `[B, C, H, W]`; `target` and `layer` as in `cam.grad_cam`.

    In a model slimmed by token steps, a token's value is painted on all patches in it; patches that were given up get
    their share of the token that gathers them, or 0. Frozen weights, `torch.no_grad` and `torch.inference_mode` do not
    matter; parameters receive no gradients.

    Without a `layer`, of several stages it is the last that has places which the score depends on: where a class token is read,
    the one before it joined.

    Raises `VitreousError` for unknown layers or targets, and when no gradient reaches the layer's places.
    """
    check_images(x)
    anatomy = read(model)
    found = _find(model, anatomy, layer)
    for name, entering in found:
        try:
            return _at(model, x, target, anatomy, name, entering, gradients)
        except _Elsewhere:
            if (name, entering) == found[-1]:
                raise
    raise AssertionError("a layer is always found")


class _Elsewhere(VitreousError):
    """This layer has no places to show."""


def _at(model: nn.Module, x: Tensor, target: Target, anatomy: Anatomy, name: str, entering: bool, gradients: bool) -> Places:
    seen: list[tuple[Tensor, int]] = []
    explain = criterion(model, x) if gradients else None
    with torch.no_grad(), still(model) as own, traced(own) as trace:
        module = own.get_submodule(name)

        def cut(values: list[Any]) -> list[Any]:
            """The same with its first tensor as a leaf: the graph begins here, so the backward pass is short."""
            first = next((v for v in values if isinstance(v, Tensor)), None)
            if first is None:
                raise VitreousError(f"layer '{name}' of {anatomy.kind} gives no single map of places: use another layer=")
            torch.set_grad_enabled(gradients)
            leaf = first.detach().requires_grad_(gradients)
            seen.append((leaf, len(trace)))
            return [leaf if v is first else v for v in values]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = cut([*args, *kwargs.values()])
            return tuple(new[: len(args)]), dict(zip(kwargs, new[len(args) :], strict=True))

        def after(_: nn.Module, __: Any, out: Any) -> Any:
            return tuple(cut([*out])) if isinstance(out, tuple) else cut([out])[0]

        if entering:
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = module.register_forward_hook(after)
        try:
            out = run(own, x)
        finally:
            handle.remove()
        if not seen:
            raise VitreousError(f"the layer '{name}' of {anatomy.kind} did not run: use another layer=")
        leaf, count = seen[-1]
        gradient = None
        if explain is not None:
            score = explain(out, target)[0].sum()
            gradient = torch.autograd.grad(score, leaf, allow_unused=True)[0] if score.requires_grad else None
    values = leaf.detach().float()
    slopes = torch.zeros_like(values) if gradient is None else gradient.float()
    if values.ndim == 4:
        found = _on_map(values, slopes, x)
    elif values.ndim == 3:
        found = _on_tokens(model, x, anatomy, values, slopes, trace[:count], name)
    else:
        raise VitreousError(f"layer '{name}' of {anatomy.kind} gives {list(values.shape)}, no places: use another layer=")
    if gradients and not found.slopes.any():
        raise _Elsewhere(
            f"no gradient reaches the places of layer '{name}' in {anatomy.kind}: it lies after the last attention, or "
            "the head is all zero. Use an earlier layer=, or see.rollout"
        )
    return found


def _find(model: nn.Module, anatomy: Anatomy, layer: int | str | None) -> list[tuple[str, bool]]:
    """The module to look at, and whether its input is meant; then others, should that one have nothing to show."""
    if isinstance(layer, str):
        names = [n for n, _ in model.named_modules() if n]
        if layer not in names:
            raise VitreousError(f"{anatomy.kind} has no layer '{layer}'{nearest(layer, names)}")
        return [(layer, False)]
    sequence = bool(anatomy.blocks) and len({s.reduction for s in anatomy.stages}) < 2
    if layer is not None or sequence:
        number = -1 if layer is None else layer
        if not -len(anatomy.blocks) <= number < len(anatomy.blocks):
            raise VitreousError(
                f"{anatomy.kind} has {len(anatomy.blocks)} attention blocks, there is no layer {number}: give the name "
                "of a module"
            )
        return [(anatomy.blocks[number].attention.name, True)]
    if anatomy.stages:
        return [(stage.name, False) for stage in reversed(anatomy.stages)]
    raise VitreousError(f"{anatomy.kind} does not tell its last stage: give layer=, the name of a module, as in 'layer4'")


def _on_map(values: Tensor, slopes: Tensor, x: Tensor) -> Places:
    """`[B, C, h, w]`, or channels last: whichever has the proportions of the image."""

    def askew(h: int, w: int) -> float:
        return abs(math.log(h / w) - math.log(x.shape[2] / x.shape[3]))

    _, a, b, c = values.shape
    if askew(a, b) < askew(b, c):
        values, slopes = values.movedim(3, 1), slopes.movedim(3, 1)
    grid = values.shape[2:]
    return Places(values.flatten(2), slopes.flatten(2), lambda cam: cam.unflatten(1, grid).relu())


def _on_tokens(
    model: nn.Module, x: Tensor, anatomy: Anatomy, values: Tensor, slopes: Tensor, done: list[Reduction], name: str
) -> Places:
    if anatomy.grid is None:  # a later stage's tokens: their grid has the proportions of the image
        n = values.shape[1] - anatomy.prefix
        h = max(round(math.sqrt(n * x.shape[2] / x.shape[3])), 1)
        w = n // h
    else:
        _, (h, w) = grid_of(model, x, "a class activation map on tokens")
    tokens = done[-1].tokens if done else values.shape[1]
    # The class token of CaiT is no prefix: it joins the patches after their blocks.
    prefix = anatomy.prefix if done else tokens - h * w
    if values.shape[1] != tokens or prefix not in (anatomy.prefix, int(anatomy.class_token)):
        raise _Elsewhere(
            f"layer '{name}' of {anatomy.kind} gives {values.shape[1]} tokens for {h} × {w} patches: use another layer="
        )

    @exact
    def draw(cam: Tensor) -> Tensor:
        whole = torch.cat([cam.new_zeros(len(cam), prefix), cam], 1)
        return on_grid((whole[:, None] @ painting(done, whole, prefix + h * w))[:, 0], (h, w)).relu()

    return Places(values[:, prefix:].mT, slopes[:, prefix:].mT, draw)
