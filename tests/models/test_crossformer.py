"""CrossFormer's groups, near and far, its position bias, and its embeddings of several scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import SMALL

from vitreous import glass
from vitreous.models.crossformer import CrossScaleEmbedding, GroupAttention


def reached(attention: GroupAttention, side: int, y: int, x: int) -> set[tuple[int, int]]:
    """The places whose output changes when the place (y, x) does."""
    torch.manual_seed(0)
    given = torch.randn(1, side, side, 16)
    other = given.clone()
    other[0, y, x] += 1
    changed = (attention(given) - attention(other)).abs().amax(-1)[0] > 1e-7
    return {(int(a), int(b)) for a, b in changed.nonzero()}


@pytest.mark.parametrize("side", [8, 7])  # 7: padded to whole groups
def test_groups_are_neighbours_or_far_apart(side: int) -> None:
    near, far = GroupAttention(16, 2, 4, 1).eval(), GroupAttention(16, 2, 4, 2).eval()
    rows, columns = range(4, side), range(0, 4)
    assert reached(near, side, 5, 2) == {(a, b) for a in rows for b in columns}
    assert reached(far, side, 5, 2) == {(a, b) for a in range(1, side, 2) for b in range(0, side, 2)}


def test_padding_is_not_attended_to() -> None:
    attention = GroupAttention(16, 2, 4, 1).eval()
    with torch.no_grad(), glass(torch.nn.Sequential(attention)) as g:
        attention(torch.randn(1, 7, 7, 16))
    last = g.attention[0][3].unflatten(-1, (4, 4))  # the group at the lower right: its last row and column are padding
    assert float(last[..., 3, :].abs().max()) == float(last[..., 3].abs().max()) == 0.0


def test_the_position_bias_depends_on_offsets_alone() -> None:
    """One table for all sizes of groups: those of a small group lie in a large group's."""
    torch.manual_seed(0)
    attention: Any = GroupAttention(64, 2, 4, 1)
    x = torch.zeros(1)
    large, small = attention.position_bias(4, x).unflatten(2, (4, 4)).unflatten(1, (4, 4)), attention.position_bias(2, x)
    torch.testing.assert_close(large[:, 1:3, 1:3, 1:3, 1:3].flatten(3).flatten(1, 2), small)
    assert (small.std((1, 2)) > 0).all()


def test_one_place_is_embedded_at_several_scales() -> None:
    embed = CrossScaleEmbedding(3, 32, (4, 8, 16, 32), 4)
    assert [p.out_channels for p in embed.projs] == [16, 8, 4, 4]
    assert embed(torch.zeros(1, 3, 64, 64)).shape == (1, 32, 16, 16)


def test_cooling_follows_every_third_block_but_the_last() -> None:
    model: Any = SMALL["crossformer"].make(depths=(1, 3, 7, 2), cooling=True)
    assert [list(stage.cooling) for stage in model.stages] == [[], [], ["2", "5"], []]
