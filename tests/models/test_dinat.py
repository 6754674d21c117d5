"""What DiNAT adds: neighbours that are a dilation apart, in groups that no window leaves."""

from __future__ import annotations

import pytest
import torch

from vitreous.mixers import NeighbourhoodAttention, neighbourhoods


@pytest.mark.parametrize(("side", "kernel", "dilation"), [(9, 3, 2), (7, 3, 1), (12, 3, 4), (11, 5, 2)])
def test_the_neighbours_of_a_place(side: int, kernel: int, dilation: int) -> None:
    """Of one axis, by the definition: the kernel's places of the same group, as near to the middle as the border allows."""
    places, offsets = neighbourhoods(side, kernel * dilation, kernel, torch.device("cpu"), dilation)
    for i in range(side):
        group = [j for j in range(side) if j % dilation == i % dilation]
        at = group.index(i)
        start = min(max(at - kernel // 2, 0), len(group) - kernel)
        seen = places[i * kernel * dilation].view(kernel, kernel)[:, 0] // (kernel * dilation)
        assert seen.tolist() == group[start : start + kernel]
        relative = offsets[i * kernel * dilation].view(kernel, kernel)[:, 0] // (2 * kernel - 1)
        assert relative.tolist() == [start + j - at + kernel - 1 for j in range(kernel)]


def test_a_place_depends_on_its_group_alone() -> None:
    torch.manual_seed(0)
    attention = NeighbourhoodAttention(8, 2, kernel=3, dilation=4)
    x = torch.randn(1, 12 * 12, 8, requires_grad=True)
    attention(x, (12, 12))[0, 5 * 12 + 6].sum().backward()
    assert x.grad is not None
    rows, columns = torch.nonzero(x.grad.view(12, 12, 8).abs().sum(2) > 0).T
    assert sorted(set(rows.tolist())) == [1, 5, 9] and sorted(set(columns.tolist())) == [2, 6, 10]


def test_a_map_below_the_dilated_kernel_is_filled_with_zeros() -> None:
    torch.manual_seed(0)
    attention = NeighbourhoodAttention(8, 2, kernel=3, dilation=2)
    x = torch.randn(1, 5 * 4, 8)
    filled = torch.zeros(1, 6, 6, 8)
    filled[:, :5, :4] = x.view(1, 5, 4, 8)
    expected = attention(filled.flatten(1, 2), (6, 6)).view(1, 6, 6, 8)[:, :5, :4].flatten(1, 2)
    torch.testing.assert_close(attention(x, (5, 4)), expected)
