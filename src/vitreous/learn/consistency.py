"""Token reduction consistency: answer alike however many tokens were fused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError
from ..score import two
from ..tokens.mctf import FuseByCriteria


def token_reduction_consistency(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    r_max: int | float = 8,
    weight: float = 3.0,
    threshold: float = 0.4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The loss that MCTF is fine-tuned with, for one batch: a scalar to call `backward()` on.

    Lee, Choi & Kim, "Multi-criteria Token Fusion …" (CVPR 2024), section 3.4: with the model's own r, and with r' drawn for the
    batch, L = CE(f(x; r), y) + CE(f(x; r'), y) + weight · MSE(c_r', c_r), where c is what the classifier reads (the normalised
    class token). As in the official code, c_r' is a fixed target, and only images whose true class has a probability above
    `threshold` under r count in the last term. Defaults are those of the published command.

    Args:
        model: a timm model slimmed by MCTF; as it stands, training or not.
        images, labels: `[B, C, H, W]`, and class numbers `[B]`.
        r_max: r' is uniform in 0 … r_max − 1, or, below 1, in hundredths of a share below r_max.

    Raises `VitreousError` when the model fuses no tokens, or has no `forward_features` and `forward_head`.
    """
    if r_max <= 0:
        raise VitreousError(f"learn.token_reduction_consistency: r_max must be above 0, not {r_max}")
    if not all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head")):
        raise VitreousError(f"learn.token_reduction_consistency needs a timm model, {type(model).__name__} is none")
    steps = r_max if r_max >= 1 else max(1, int(r_max * 100))
    drawn = int(torch.randint(int(steps), (1,), generator=generator))
    with _fusing(model, drawn if r_max >= 1 else drawn / 100):
        target, other = _read_out(model, images)
    read, logits = _read_out(model, images)
    logits, other = two(logits), two(other)
    sure = logits.detach().softmax(-1).gather(1, labels[:, None])[:, 0] > threshold
    apart = (target.detach() - read).square().mean(1)
    consistency = (apart * sure).sum() / sure.sum().clamp_min(1)
    return F.cross_entropy(logits, labels) + F.cross_entropy(other, labels) + weight * consistency


def _read_out(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the classifier reads `[B, C]`, and the logits `[B, K]`."""
    m = cast(Any, model)
    features = m.forward_features(images)
    return m.forward_head(features, pre_logits=True), m.forward_head(features)


@contextmanager
def _fusing(model: nn.Module, r: int | float) -> Iterator[None]:
    """`model` fuses `r` tokens in each of its blocks that fuse."""
    reducers = [m for m in model.modules() if isinstance(m, FuseByCriteria)]
    if not reducers:
        raise VitreousError("learn.token_reduction_consistency needs a model that fuses tokens: slim(model, MCTF()) first")
    own = [x.r for x in reducers]
    try:
        for x in reducers:
            x.r = r
        yield
    finally:
        for x, number in zip(reducers, own, strict=True):
            x.r = number
