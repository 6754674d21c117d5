"""Sparsifiner's two stages of training: first its predictor alone, then the model under the mask."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from ..score import two
from ..tokens.sparsifiner import ConnectivityPredictor, SparseAttention


def predictor_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the first stage trains, and the second leaves alone, for the mask passes no gradient on."""
    return [p for m in model.modules() if isinstance(m, ConnectivityPredictor) for p in m.parameters()]


def connectivity_loss(model: nn.Module, images: Tensor) -> Tensor:
    """The first stage (the official code's 5 epochs "attn_recon"): a scalar with gradients for the predictors alone.

    Wei et al. (CVPR 2023), section 3.3: the squared distance between the predictor's low-rank map and the full attention map,
    summed over heads, queries (those of patches) and keys, averaged over images `[B, C, H, W]` and blocks. The pass is not
    masked, so that each block sees what it saw before. The official code sums over the batch and weighs by 0.01.

    Raises `VitreousError` for a model without Sparsifiner.
    """
    layers = [m for m in model.modules() if isinstance(m, SparseAttention)]
    if not layers:
        raise VitreousError("learn.connectivity_loss needs a model with a predictor: slim(model, Sparsifiner()) first")
    try:
        for layer in layers:
            layer.watched = []
        model(images)
        pairs = [(layer.predictor.prefix, *pair) for layer in layers for pair in cast(Any, layer.watched)]
    finally:
        for layer in layers:
            layer.watched = None
    distances = [(guess - full)[:, :, prefix:].square().sum((1, 2, 3)).mean() for prefix, guess, full in pairs]
    return torch.stack(distances).mean()


def sparsifiner_distillation(model: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The second stage (45 epochs "cls_distill"): CE + KL(teacher ‖ student) / 2 + MSE of the last tokens / 2, a scalar.

    `teacher` is the model before `slim`. Tokens are compared one by one while all are there; after a step that shortens the
    sequence only the prefix tokens are, where the official code compares those that survive.

    Args:
        images, labels: `[B, C, H, W]`, and class numbers `[B]`.
    """
    student: Any = model
    features = student.forward_features(images)
    logits = two(student.forward_head(features))
    with torch.no_grad():
        expected = cast(Any, teacher).forward_features(images)
        target = two(cast(Any, teacher).forward_head(expected)).log_softmax(-1)
    loss = F.cross_entropy(logits, labels) + 0.5 * F.kl_div(
        logits.log_softmax(-1), target, reduction="batchmean", log_target=True
    )
    if features.shape[1] != expected.shape[1]:
        prefix = read(teacher).prefix
        features, expected = features[:, :prefix], expected[:, :prefix]
    return loss + 0.5 * F.mse_loss(features, expected) if features.shape[1] else loss
