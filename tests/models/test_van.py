"""VAN's idea: attention that is a factor for each place and channel, from a large kernel made of small ones."""

from __future__ import annotations

import timm
import torch

from vitreous.anatomy import read
from vitreous.models.van import LargeKernelAttention


def test_the_kernels_together_reach_eleven_places_away() -> None:
    torch.manual_seed(0)
    lka = LargeKernelAttention(4).double()
    x = torch.randn(1, 4, 33, 33, dtype=torch.double, requires_grad=True)
    lka(x)[0, 0, 16, 16].backward()
    assert x.grad is not None
    rows, columns = x.grad[0].abs().sum(0).nonzero().unbind(1)
    assert (rows - 16).abs().max() == 11 == (columns - 16).abs().max()
    assert sum(p.numel() for p in lka.parameters()) < 4 * 4 * 23 * 23  # of one kernel that reaches as far


def test_attention_is_a_factor() -> None:
    torch.manual_seed(0)
    lka, x = LargeKernelAttention(4), torch.randn(1, 4, 8, 8)
    x[:, 2] = 0
    out = lka(x)
    assert not out[:, 2].any() and out[:, 0].all()


def test_a_large_kernel_is_no_attention_to_look_into() -> None:
    assert not read(timm.create_model("van_b0")).attention
