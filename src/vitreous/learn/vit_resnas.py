"""How ViT-ResNAS trains its supernet: many networks in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError
from ..models.vit_resnas import Sizes, ViTResNAS
from .objective import Batch, Now, Objective, Seen, objective, share


@objective
@dataclass(frozen=True)
class MultiArchitecture(Objective):
    """Liao, Karaman and Sze, "Searching for Efficient Multi-Stage Vision Transformers" (2021), section 3.3: multi-architectural
    sampling.

    Each `examples` images of a batch run through a network of their own, by masks: at every choice point (widths of the stages;
    heads, hidden units and, of every second block, presence) the `levels` choices from `least` to all are dealt out evenly, in an
    order of their own. In the share `warmup` of the run smaller choices come in one by one (published: 15 of 120 epochs).

    Loss: cross-entropy of the class token and of the mean of the patches. The paper's mixing along the grid of patches, and the
    new order of heads and units by their norm in the warm-up, are not part of it here.
    """

    examples: int = 64
    least: float = 0.5
    levels: int = 3
    warmup: float = 0.125

    wants: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        share(self, "least", "warmup")
        if self.examples < 1 or self.levels < 1:
            raise VitreousError("MultiArchitecture: examples and levels must be at least 1")

    def parts(self, model: nn.Module) -> None:
        if not isinstance(model, ViTResNAS):
            raise VitreousError(f"MultiArchitecture trains a vit_resnas as a supernet, not {type(model).__name__}")

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        model: Any = now.model
        grown = min(1.0, now.share / self.warmup) if self.warmup else 1.0
        allowed = 1 + int(grown * (self.levels - 1))
        sizes = deal(model, len(batch.images), self.examples, levels(self.least, self.levels)[:allowed])
        tokens = model.forward_features(batch.images, sizes)
        seen.logits = model.forward_head(tokens)
        labels = batch.shares(seen.logits.shape[1])
        patches = model.patch_head(tokens[:, 1:].mean(1))
        return {"class": F.cross_entropy(seen.logits, labels), "patches": F.cross_entropy(patches, labels)}


def levels(least: float, count: int) -> list[float]:
    """Shares from 1 down to `least`."""
    return [1 - (1 - least) * i / max(count - 1, 1) for i in range(count)]


def deal(model: ViTResNAS, images: int, examples: int, shares: list[float]) -> Sizes:
    """Sizes for a batch, every choice as often as the others (but for what does not divide), by torch's generator."""
    groups = -(-images // examples)

    def dealt(options: list[int]) -> Tensor:
        order = torch.randperm(groups) % len(options)
        return torch.tensor(options)[order].repeat_interleave(examples)[:images].to(next(model.parameters()).device)

    some = lambda size: dealt([max(1, round(s * size)) for s in shares])
    blocks = [b for stage in model.staged for b in stage]
    return Sizes(
        tuple(map(some, model.widths)),
        tuple(some(b.attn.heads) for b in blocks),
        tuple(some(b.fc1.out_features) for b in blocks),
        tuple(dealt([1, 0] if second and len(shares) > 1 else [1]) for second in model.removable),
    )
