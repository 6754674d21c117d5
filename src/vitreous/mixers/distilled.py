"""Two heads, one taught by labels and one by a teacher."""

from __future__ import annotations

from torch import Tensor, nn


class DistilledHead(nn.Module):
    """The mean of what `head` and `head_dist` say of features `[B, C]`: logits `[B, num_classes]`.

    Touvron et al., "Training Data-Efficient Image Transformers & Distillation through Attention" (ICML 2021), section 4. The mean
    is taken in training too; a loss that wants the two apart calls them apart.
    """

    def __init__(self, head: nn.Module, head_dist: nn.Module) -> None:
        super().__init__()
        self.head, self.head_dist = head, head_dist

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(x) + self.head_dist(x)) / 2
