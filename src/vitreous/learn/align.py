"""Align image features with a table of embeddings, one a training image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from .objective import Batch, Now, Objective, Seen, objective, positive

Form = Literal["clip", "infonce", "byol"]


def alignment(image: Tensor, table: Tensor, tau: float, form: Form = "clip") -> Tensor:
    """How far features `[B, E]` are from their rows of `table [B, E]`; both are brought to unit norm.

    "clip": the mean of the cross-entropies of rows and of columns of IᵀT/τ against the diagonal; "infonce": of rows alone;
    "byol": 2 − 2 cos.
    """
    image, table = F.normalize(image, dim=1), F.normalize(table, dim=1)
    if form == "byol":
        return (2 - 2 * (image * table).sum(1)).mean()
    scores, own = image @ table.mT / tau, torch.arange(len(image), device=image.device)
    rows = F.cross_entropy(scores, own)
    return rows if form == "infonce" else (rows + F.cross_entropy(scores.mT, own)) / 2


@objective
@dataclass(frozen=True)
class AlignToTable(Objective):
    """Ding et al., "GPT4Image: Can Large Pre-trained Models Help Vision Models on Perception Tasks?" (2023): what a language
    model says of each training image, as an embedding, is what the image's feature is drawn to.

    `table [N, E]` holds one row a training image, in the order of the data: text embeddings in the paper (MiniGPT-4's
    descriptions through CLIP), any others here. A projector C → 2E → E reads what the classifier reads and is thrown away. The
    other images of the batch are the negatives, over all processes. τ 0.05 for DeiT, 0.2 for ResNets. Added to cross-entropy.
    As released: a mixed picture keeps the row of its first image, and near-duplicates count as negatives.
    """

    wants = ("logits", "pooled")
    whole_batch = True
    table: Tensor = field(default_factory=lambda: torch.empty(0, 0), compare=False, repr=False)
    tau: float = 0.05
    weight: float = 0.3
    form: Form = "clip"

    def __post_init__(self) -> None:
        positive(self, "tau")
        if self.table.ndim != 2 or not len(self.table):
            raise VitreousError("AlignToTable: give table=, a tensor [images, numbers] with a row for each training image")

    def parts(self, model: nn.Module) -> nn.Module:
        width, e = read(model).width, self.table.shape[1]
        if width is None:
            raise VitreousError(f"AlignToTable does not know how wide {type(model).__name__}'s features are")
        first, last = nn.Linear(width, 2 * e), nn.Linear(2 * e, e)
        for layer in (first, last):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(first, nn.ReLU(), last)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        if int(batch.index.max()) >= len(self.table):
            raise VitreousError(f"AlignToTable has {len(self.table)} rows, and there is an image {int(batch.index.max())}")
        assert now.parts is not None and seen.pooled is not None
        image = now.gather(now.parts(seen.pooled).float())
        rows = now.gather(self.table[batch.index].to(image))
        return {"align": self.weight * alignment(image, rows, self.tau, self.form)}
