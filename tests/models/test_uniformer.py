"""UniFormer's local and global affinities, and the second head of token labeling."""

from __future__ import annotations

from typing import Any

import torch
from small_models import SMALL

from vitreous.models.uniformer import GlobalBlock, local_block


def reach(block: torch.nn.Module) -> int:
    """How many places of 9 × 9 change when the middle one does."""
    torch.manual_seed(0)
    block.eval()
    x = torch.randn(1, 16, 9, 9)
    other = x.clone()
    other[..., 4, 4] += 1
    with torch.no_grad():
        return int(((block(x) - block(other)).abs().amax(1) > 1e-6).sum())


def test_early_blocks_relate_neighbours_and_late_ones_everything() -> None:
    torch.manual_seed(0)
    assert reach(local_block(16, 32)) == 7 * 7  # 3 × 3 of the position encoding, then 5 × 5
    assert reach(GlobalBlock(16, 2)) == 9 * 9


def test_a_second_head_reads_every_place() -> None:
    small = SMALL["uniformer"]
    model: Any = small.make()
    features = model.forward_features(small.images())
    places = features.flatten(2).mT
    wanted = model.head(places.mean(1)) + 0.5 * torch.stack([model.aux_head(p) for p in places.unbind(1)]).amax(0)
    torch.testing.assert_close(model.forward_head(features), wanted)
