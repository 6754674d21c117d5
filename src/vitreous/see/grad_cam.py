"""Grad-CAM: which places raise the score of a class."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, read
from ..blocks import Reduction, traced
from ..errors import VitreousError, nearest
from .patches import check_images, grid_of, on_grid, painting, run, still


def grad_cam(model: nn.Module, x: Tensor, target: int | Tensor | None = None, layer: int | str | None = None) -> Tensor:
    """Heatmaps `[B, h, w]`: how much each place in a layer raises the score of the target class.

    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization" (ICCV 2017),
    eq. 1 and 2: channels weighted by their gradient's mean over places, summed, negative values cut; not scaled. In a
    transformer the places are the patch tokens that enter the last block's attention (its `norm1`): after it a class
    token is all that counts, and the gradient at the patches is zero. In hierarchical and convolutional models they
    are the last stage's output.

    In a model slimmed by token steps, a token's value is painted on all patches in it; patches that were given up get
    their share of the token that gathers them, or 0. Frozen weights, `torch.no_grad` and `torch.inference_mode` do not
    matter; parameters receive no gradients.

    Args:
        x: images `[B, C, H, W]`.
        target: class index for all images, or `[B]`; the predicted class by default. A model without classes needs the
            index of one of its features.
        layer: number of an attention block, whose attention's input is taken, or the dotted name of any module, whose
            output is.

    Raises `VitreousError` for unknown layers or targets, and when no gradient reaches the layer's places.
    """
    check_images(x)
    anatomy = read(model)
    name, entering = _find(model, anatomy, layer)
    module = model.get_submodule(name)
    seen: list[tuple[Tensor, int]] = []
    with torch.inference_mode(False), torch.no_grad(), still(model), traced(model) as trace:

        def cut(values: list[Any]) -> list[Any]:
            """The same with its first tensor as a leaf: the graph begins here, so the backward pass is short."""
            first = next((v for v in values if isinstance(v, Tensor)), None)
            if first is None:
                raise VitreousError(f"layer '{name}' of {anatomy.kind} gives no single map of places: use another layer=")
            torch.set_grad_enabled(True)
            leaf = first.detach().requires_grad_()
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
            out = run(model, x)
        finally:
            handle.remove()
        if not seen:
            raise VitreousError(f"the layer '{name}' of {anatomy.kind} did not run: use another layer=")
        leaf, count = seen[-1]
        score = _score(getattr(out, "logits", out), target, anatomy, len(x))
        gradient = torch.autograd.grad(score, leaf, allow_unused=True)[0] if score.requires_grad else None
    values = leaf.detach().float()
    slopes = torch.zeros_like(values) if gradient is None else gradient.float()
    if values.ndim == 4:
        maps = _on_map(values, slopes, x)
    elif values.ndim == 3:
        maps = _on_tokens(model, x, anatomy, values, slopes, trace[:count], name)
    else:
        raise VitreousError(f"layer '{name}' of {anatomy.kind} gives {list(values.shape)}, no places: use another layer=")
    if maps is None:
        raise VitreousError(
            f"no gradient reaches the places of layer '{name}' in {anatomy.kind}: it lies after the last attention, or "
            "the head is all zero. Use an earlier layer=, or see.rollout"
        )
    return maps.relu()


def _find(model: nn.Module, anatomy: Anatomy, layer: int | str | None) -> tuple[str, bool]:
    """The module to look at, and whether its input is meant."""
    if isinstance(layer, str):
        names = [n for n, _ in model.named_modules() if n]
        if layer not in names:
            raise VitreousError(f"{anatomy.kind} has no layer '{layer}'{nearest(layer, names)}")
        return layer, False
    sequence = bool(anatomy.blocks) and len({s.reduction for s in anatomy.stages}) < 2
    if layer is not None or sequence:
        number = -1 if layer is None else layer
        if not -len(anatomy.blocks) <= number < len(anatomy.blocks):
            raise VitreousError(
                f"{anatomy.kind} has {len(anatomy.blocks)} attention blocks, there is no layer {number}: give the name "
                "of a module"
            )
        return anatomy.blocks[number].attention.name, True
    if anatomy.stages:
        return anatomy.stages[-1].name, False
    raise VitreousError(f"{anatomy.kind} does not tell its last stage: give layer=, the name of a module, as in 'layer4'")


def _score(logits: Any, target: int | Tensor | None, anatomy: Anatomy, images: int) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise VitreousError(f"see.grad_cam needs scores [B, classes]; {anatomy.kind} gives {given}: use see.rollout")
    if target is None:
        if anatomy.classifier is None:
            raise VitreousError(
                f"{anatomy.kind} has no classifier that predicts a class: give target=, the index of an output, or use "
                "see.rollout"
            )
        target = logits.argmax(1)
    index = torch.as_tensor(target, device=logits.device)
    if index.is_floating_point() or index.ndim > 1 or (index.ndim == 1 and len(index) != images):
        raise VitreousError(
            f"target must be one class or one for each of the {images} images, not {index.dtype} {list(index.shape)}"
        )
    if int(index.min()) < 0 or int(index.max()) >= logits.shape[1]:
        raise VitreousError(f"{anatomy.kind} has classes 0 to {logits.shape[1] - 1}: there is no target {target}")
    return logits.gather(1, index.long().expand(images)[:, None]).sum()


def _on_map(values: Tensor, slopes: Tensor, x: Tensor) -> Tensor | None:
    """`[B, C, h, w]`, or channels last: whichever has the proportions of the image."""

    def askew(h: int, w: int) -> float:
        return abs(math.log(h / w) - math.log(x.shape[2] / x.shape[3]))

    _, a, b, c = values.shape
    if askew(a, b) < askew(b, c):
        values, slopes = values.movedim(3, 1), slopes.movedim(3, 1)
    return (slopes.mean((2, 3), keepdim=True) * values).sum(1) if slopes.any() else None


def _on_tokens(
    model: nn.Module, x: Tensor, anatomy: Anatomy, values: Tensor, slopes: Tensor, done: list[Reduction], name: str
) -> Tensor | None:
    if anatomy.grid is None:  # a later stage's tokens: their grid has the proportions of the image
        n = values.shape[1] - anatomy.prefix
        h = max(round(math.sqrt(n * x.shape[2] / x.shape[3])), 1)
        w = n // h
    else:
        _, (h, w) = grid_of(model, x, "see.grad_cam on tokens")
    tokens = done[-1].tokens if done else values.shape[1]
    # The class token of CaiT is no prefix: it joins the patches after their blocks.
    prefix = anatomy.prefix if done else tokens - h * w
    if values.shape[1] != tokens or prefix not in (anatomy.prefix, int(anatomy.class_token)):
        raise VitreousError(
            f"layer '{name}' of {anatomy.kind} gives {values.shape[1]} tokens for {h} × {w} patches: use another layer="
        )
    if not slopes[:, prefix:].any():
        return None
    weights = slopes[:, prefix:].sum(1, keepdim=True) / (h * w)
    cam = (weights * values).sum(2)
    cam[:, :prefix] = 0
    return on_grid((cam[:, None] @ painting(done, cam, prefix + h * w))[:, 0], (h, w))
