"""Integrated gradients and occlusion, by captum: what the pixels of each patch did for the score."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..copies.own import run, still
from ..errors import VitreousError
from ..score import Criterion, Target, criterion
from .patches import check_images, grid_of

MISSED = 0.02  # of the difference of the scores, in the worst image
NODES = 4  # of a stretch of the way
MOST = 512  # nodes of an image, after which it is halved no further
TOGETHER = 32  # interpolated or occluded pictures that run at a time


def integrated_gradients(model: nn.Module, x: Tensor, target: Target = None, steps: int | None = None) -> Tensor:
    """Heatmaps `[B, h, w]`: what each patch adds to the score of the target class, on the way from a blank picture.

    Sundararajan, Taly & Yan, "Axiomatic Attribution for Deep Networks" (ICML 2017), eq. 1, with a baseline of 0 (the mean
    colour, as pictures are prepared), by captum with Gauss-Legendre nodes; summed over the pixels of each patch, negative sums
    cut.

    Completeness (the sum over all pixels is the difference of the scores) holds only with enough steps where the score changes,
    which may be a small part of the way. Each stretch of it has a difference of its own, so those that miss most of theirs are
    halved, with 4 steps to a half, until all together miss at most 2 % of the whole. A `UserWarning` says how much is missed
    where some 512 steps do not reach that.

    Args:
        x: images `[B, C, H, W]`.
        target: class index for all images, or one for each; the predicted class by default. Features are explained as
            `vitreous.score` tells.
        steps: so many instead, over the whole way. One costs some three forward passes.

    Works on every model. Raises `VitreousError` for unknown targets, and when captum is not installed.
    """
    attr, size = _captum("see.integrated_gradients"), grid(model, x)
    explain = criterion(model, x)
    with torch.enable_grad(), still(model) as own:
        image, score, index = _scored(own, explain, x, target)
        method, nodes = attr.IntegratedGradients(score), NODES if steps is None else steps

        def stretches(of: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
            """Maps `[S, h, w]` of what the way from `way[:, 0]` to `way[:, 1]` adds in the images `of`, and what they miss."""
            maps, missed = [], []
            for i, ends in zip(of.split(TOGETHER), way.split(TOGETHER), strict=True):
                start, end = (image[i] * at[:, None, None, None] for at in ends.T)
                added = method.attribute(
                    end,
                    start,
                    additional_forward_args=index[i],
                    n_steps=nodes,
                    method="gausslegendre",
                    internal_batch_size=TOGETHER,
                ).detach()
                with torch.no_grad():
                    missed.append(added.flatten(1).sum(1) - (score(end, index[i]) - score(start, index[i])))
                maps.append(F.adaptive_avg_pool2d(added.sum(1), size) * (image[0, 0].numel() / (size[0] * size[1])))
            return torch.cat(maps), torch.cat(missed)

        with torch.no_grad():
            most = MISSED * (score(image, index) - score(torch.zeros_like(image), index)).abs().clamp_min(1e-12)
        of, way = torch.arange(len(x), device=x.device), image.new_tensor([[0.0, 1.0]]).repeat(len(x), 1)
        maps, missed = stretches(of, way)
        while steps is None:
            n, total = torch.bincount(of), torch.zeros_like(most).index_add(0, of, missed.abs())
            unfinished = (total > most) & (nodes * (2 * n - 1) < MOST)  # n stretches are what is left of 2n − 1
            split = unfinished[of] & (missed.abs() > (most / n)[of])
            if not split.any():
                break
            middle = way[split].mean(1)
            halves = torch.cat((torch.stack((way[split, 0], middle), 1), torch.stack((middle, way[split, 1]), 1)))
            new = of[split].repeat(2), halves
            of, way, maps, missed = (
                torch.cat((old[~split], half))
                for old, half in zip((of, way, maps, missed), (*new, *stretches(*new)), strict=True)
            )
        missed = torch.zeros_like(most).index_add(0, of, missed).abs() * MISSED / most
        found = maps.new_zeros(len(x), *size).index_add(0, of, maps)
        taken = nodes * (2 * int(torch.bincount(of).max()) - 1)
    if len(bad := missed[missed > MISSED]):
        warnings.warn(
            f"integrated gradients with {taken} steps miss completeness by up to {float(bad.max()):.0%} of the score's "
            f"change, in {len(bad)} of {len(x)} images: more steps= come closer",
            stacklevel=2,
        )
    return found.relu()


def occlusion(model: nn.Module, x: Tensor, target: Target = None) -> Tensor:
    """Heatmaps `[B, h, w]`: how far the score of the target class falls when a patch is blank.

    Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (ECCV 2014), section 4.2, by captum: one patch at a
    time is set to 0 (the mean colour, as pictures are prepared); rises are cut. One forward pass for each patch. Captum tells the
    fall once for each colour; here it is told once. Arguments and errors as in `integrated_gradients`.
    """
    size = grid(model, x)
    return occluded(model, x, target, size).relu()


def occluded(model: nn.Module, x: Tensor, target: Target, size: tuple[int, int]) -> Tensor:
    """The falls, negative where the score rises, for a grid of windows of this size."""
    attr, (h, w) = _captum("see.occlusion"), size
    explain = criterion(model, x)
    with torch.no_grad(), still(model) as own:
        image, score, index = _scored(own, explain, x, target)
        window = (image.shape[1], -(-image.shape[2] // h), -(-image.shape[3] // w))
        falls = attr.Occlusion(score).attribute(
            image,
            sliding_window_shapes=window,
            strides=window,
            additional_forward_args=index,
            perturbations_per_eval=max(1, TOGETHER // len(image)),
        )
    return F.adaptive_avg_pool2d(falls.mean(1).float(), (h, w))


def grid(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Rows and columns of heatmaps: the model's patches, or where those change their size the last stage's places.

    A model that tells neither gets one for every 32 pixels.
    """
    check_images(x)
    anatomy = read(model)
    reductions = [s.reduction for s in anatomy.stages]
    if anatomy.grid is not None and anatomy.attention and len(set(reductions)) < 2:
        return grid_of(model, x, "this explanation")[1]
    side = reductions[-1] if reductions else 32
    return -(-x.shape[2] // side), -(-x.shape[3] // side)


def _captum(purpose: str) -> Any:
    try:
        return importlib.import_module("captum.attr")
    except ImportError:
        raise VitreousError(f"{purpose} needs captum: install it with `pip install vitreous[see]`") from None


def _scored(own: nn.Module, explain: Criterion, x: Tensor, target: Target) -> tuple[Tensor, Any, Tensor]:
    """The images, their score as a function of images and class for captum, and the class of each image `[B]`.

    Features have one "class", number 0.
    """
    image = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach().clone()
    features = explain.features and target is None
    with torch.no_grad():
        start = explain(run(own, image), target)[1]
    index = torch.zeros(len(x), dtype=torch.long, device=x.device) if features else start.argmax(1)

    def score(images: Tensor, classes: Tensor) -> Tensor:
        return explain(run(own, images), None if features else classes)[0]

    return image, score, index
