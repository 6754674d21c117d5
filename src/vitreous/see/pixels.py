"""Integrated gradients and occlusion, by captum: what the pixels of each patch did for the score."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from ..relevance import explained
from .patches import check_images, grid_of, run, still

MISSED = 0.02  # of the difference of the scores, in the worst image
STEPS = (32, 64, 128, 256, 512)
TOGETHER = 32  # interpolated or occluded pictures that run at a time


def integrated_gradients(model: nn.Module, x: Tensor, target: int | Tensor | None = None, steps: int | None = None) -> Tensor:
    """Heatmaps `[B, h, w]`: what each patch adds to the score of the target class, on the way from a blank picture.

    Sundararajan, Taly & Yan, "Axiomatic Attribution for Deep Networks" (ICML 2017), eq. 1, with a baseline of 0 (the mean
    colour, as pictures are prepared), by captum with Gauss-Legendre nodes; summed over the pixels of each patch, negative sums
    cut. Completeness (the sum over all pixels is the difference of the scores) holds only with enough steps: they are doubled
    from 32 to 512 until each image misses at most 2 % of it, and a `UserWarning` says how much is missed if 512 do not reach
    that.

    Args:
        x: images `[B, C, H, W]`.
        target: class index for all images, or `[B]`; the predicted class by default. A model without a classifier is
            explained by the squared norm of its features.
        steps: so many instead. One costs some three forward passes.

    Works on every model. Raises `VitreousError` for unknown targets, and when captum is not installed.
    """
    attr, (h, w) = _captum("see.integrated_gradients"), grid(model, x)
    tries = STEPS if steps is None else (steps,)
    with torch.inference_mode(False), torch.enable_grad(), still(model):
        image, score, index = _scored(model, x, target)
        method = attr.IntegratedGradients(score)
        found = image.new_zeros(image.shape)
        missed, left = image.new_zeros(len(image)), torch.arange(len(image), device=image.device)
        with torch.no_grad():
            whole = score(image, index) - score(torch.zeros_like(image), index)
        for n in tries:
            some = method.attribute(
                image[left],
                additional_forward_args=index[left],
                n_steps=n,
                method="gausslegendre",
                internal_batch_size=max(TOGETHER, len(left)),
            )
            found[left] = some.detach().to(found)
            sums = found[left].flatten(1).sum(1)
            missed[left] = (sums - whole[left]).abs() / whole[left].abs().clamp_min(1e-12)
            left = left[missed[left] > MISSED]
            if not len(left):
                break
    if len(left):
        warnings.warn(
            f"integrated gradients with {tries[-1]} steps miss completeness by up to {float(missed.max()):.0%} of the score's "
            f"change, in {len(left)} of {len(x)} images: more steps= come closer",
            stacklevel=2,
        )
    return F.adaptive_avg_pool2d(found.sum(1), (h, w)).mul(found.shape[2] * found.shape[3] / (h * w)).relu()


def occlusion(model: nn.Module, x: Tensor, target: int | Tensor | None = None) -> Tensor:
    """Heatmaps `[B, h, w]`: how far the score of the target class falls when a patch is blank.

    Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (ECCV 2014), section 4.2, by captum: one patch at a
    time is set to 0 (the mean colour, as pictures are prepared); rises are cut. One forward pass for each patch. Captum tells the
    fall once for each colour; here it is told once. Arguments and errors as in `integrated_gradients`.
    """
    size = grid(model, x)
    return occluded(model, x, target, size).relu()


def occluded(model: nn.Module, x: Tensor, target: int | Tensor | None, size: tuple[int, int]) -> Tensor:
    """The falls, negative where the score rises, for a grid of windows of this size."""
    attr, (h, w) = _captum("see.occlusion"), size
    with torch.inference_mode(False), torch.no_grad(), still(model):
        image, score, index = _scored(model, x, target)
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


def _scored(model: nn.Module, x: Tensor, target: int | Tensor | None) -> tuple[Tensor, Any, Tensor]:
    """The images, their score as a function of images and class for captum, and the class of each image `[B]`.

    A model without a classifier has one "class", number 0: the squared norm of its features.
    """
    anatomy = read(model)
    image = x.detach().clone()
    with torch.no_grad():
        out = run(model, image)
        _, start = explained(getattr(out, "logits", out), target, anatomy)
    features = target is None and anatomy.classifier is None
    index = torch.zeros(len(x), dtype=torch.long, device=x.device) if features else start.argmax(1)

    def score(images: Tensor, classes: Tensor) -> Tensor:
        out = run(model, images)
        out = getattr(out, "logits", out)
        return out.square().sum(1) if features else out.gather(1, classes[:, None])[:, 0]

    return image, score, index
