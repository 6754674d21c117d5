"""What the lightweight UniFormer updates slowly, and what fast."""

from __future__ import annotations

from typing import Any

import torch

from vitreous.models.uniformer.light import EvolvingBlock, EvolvingStage


def evolved(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a block without position encoding adds to each of 16 places, `[16, C]`, and the scores after it."""
    torch.manual_seed(0)
    block = EvolvingBlock(16, 2, 32, 0.0, 0.0, 0.0).eval()
    torch.nn.init.zeros_(block.position.proj.weight)
    assert block.position.proj.bias is not None
    torch.nn.init.zeros_(block.position.proj.bias)
    x = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        y, _, after = block(x, torch.randn(1, 1, 16), scores[None])
    return (y - x).flatten(2).mT[0], after[0]


def test_the_half_with_lower_scores_gets_one_common_change() -> None:
    scores = torch.randperm(16, generator=torch.Generator().manual_seed(3)) + 1.0
    change, after = evolved(scores)
    low = scores <= 8
    torch.testing.assert_close(change[low], change[low][:1].expand(8, -1), rtol=1e-4, atol=1e-5)
    assert (change[~low] - change[~low][:1]).abs().amax(1)[1:].min() > 1e-3
    assert torch.equal(after[low], scores[low]) and not torch.isclose(after[~low], scores[~low]).any()


def test_scores_keep_their_sum_between_stages() -> None:
    stage: Any = EvolvingStage(16, 32, [], first=False)
    scores = torch.rand(2, 16)
    _, _, pooled = stage((torch.randn(2, 16, 4, 4), torch.randn(2, 1, 16), scores))
    assert pooled.shape == (2, 4)
    torch.testing.assert_close(pooled.sum(1), scores.sum(1))
