from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from torchvision.ops import deform_conv2d

from vitreous import VitreousError
from vitreous.models.litv2 import DeformableMerging, HiLoAttention


def test_the_merging_is_a_deformable_convolution() -> None:
    """Also beyond the border, where there is nothing."""
    torch.manual_seed(0)
    merging = cast(Any, DeformableMerging(6).eval())
    merging.norm, merging.act = torch.nn.Identity(), torch.nn.Identity()
    torch.nn.init.normal_(merging.offset.weight, std=0.7)
    x = torch.randn(2, 6, 8, 12)
    wanted = deform_conv2d(x, merging.offset(x), merging.conv.weight.view(12, 6, 2, 2), merging.conv.bias, stride=(2, 2))
    torch.testing.assert_close(merging(x), wanted, rtol=1e-5, atol=1e-5)


def test_high_frequencies_stay_in_their_window_and_low_ones_do_not() -> None:
    torch.manual_seed(0)
    attention = HiLoAttention(16, 4, window=2, alpha=0.5).eval()
    x = torch.randn(1, 16, 6, 6)
    changed = x.clone()
    changed[..., 0, 0] += 1
    high, low = (attention(changed) - attention(x)).abs().chunk(2, 1)
    assert high[..., :2, :2].min() > 0
    assert high[..., 2:, :].max() == 0
    assert low.sum(1).min() > 0
    balanced = changed.clone()  # the means of the windows are those of x again, and so are the keys and values
    balanced[..., 0, 1] -= 1
    low = (attention(balanced) - attention(x)).abs().chunk(2, 1)[1]
    assert low[..., 1:, :].max() < 1e-5 < low[..., 0, :2].min()


def test_sides_that_cannot_be_halved_are_refused() -> None:
    with torch.device("meta"):
        model = timm.create_model("litv2_s")
        with pytest.raises(VitreousError, match=r"15 × 15: .*multiples of 32"):
            model(torch.zeros(1, 3, 240, 240))
