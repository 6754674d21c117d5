"""What LWGANet adds: maxima that attend and go back to where they were, strips along diagonals, quarters of the channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitreous import VitreousError
from vitreous.models.lwganet import LWGABlock, MediumRange, SparseAttention, put_back, sheared, strongest, unsheared


def test_maxima_go_back_where_they_were() -> None:
    torch.manual_seed(0)
    for height, width in ((6, 8), (7, 5)):
        x = torch.randn(2, 3, height, width)
        wanted, index = F.max_pool2d(x, 2, return_indices=True)
        top, where = strongest(x)
        assert torch.equal(top, wanted)
        assert torch.equal(
            put_back(2 * top, where, (height, width)), F.max_unpool2d(2 * wanted, index, 2, output_size=x.shape[2:])
        )
    flat = strongest(torch.zeros(1, 1, 2, 2))[1]
    assert flat.flatten().tolist() == [1, 0, 0, 0]  # of equals the first, as max_pool2d has it


def test_places_that_are_not_the_strongest_are_not_seen() -> None:
    torch.manual_seed(0)
    attention, x = SparseAttention(4).eval(), torch.rand(1, 4, 4, 4)
    x[..., ::2, ::2] += 2
    weaker = x.clone()
    weaker[..., 1::2, :] -= 0.5
    assert torch.equal(attention(x), attention(weaker))
    assert (attention(x)[..., 1::2, :] == 0).all() and (attention(x)[..., ::2, ::2] != 0).any()


def test_strips_run_along_diagonals() -> None:
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert sheared(x)[0, 0].tolist() == [[0, 1, 2, 3, 0, 0], [0, 4, 5, 6, 7, 0], [0, 0, 8, 9, 10, 11]]
    assert torch.equal(unsheared(sheared(x), 4), x)
    layer = MediumRange(1, 5)
    for name in ("H_att1", "V_att1", "H_att2", "V_att2"):
        torch.nn.init.zeros_(getattr(layer, name).weight)
    layer.H_att2.weight.data[..., 1] = 1  # one column of the sheared map: a diagonal
    point = torch.zeros(1, 1, 7, 7)
    point[0, 0, 3, 3] = 1
    seen = unsheared(layer.H_att2(sheared(point)), 7)[0, 0]
    assert sorted(map(tuple, seen.nonzero().tolist())) == [(1, 5), (2, 4), (3, 3), (4, 2), (5, 1)]


def test_each_quarter_has_its_own_reach() -> None:
    torch.manual_seed(0)
    block = LWGABlock(16, 3, 3, 2.0, torch.nn.GELU, 0.0).eval()
    x = torch.randn(1, 16, 12, 12)
    far = x.clone()
    far[..., 11, 11] += 1
    for part, channels, reached in (("PA", slice(0, 4), False), ("LA", slice(4, 8), False), ("GA", slice(12, 16), True)):
        module = getattr(block, part)
        assert (not torch.equal(module(x[:, channels])[..., 0, 0], module(far[:, channels])[..., 0, 0])) == reached
    with pytest.raises(VitreousError, match="96 pixels"):
        block(torch.randn(1, 16, 2, 2))
