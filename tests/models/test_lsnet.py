from __future__ import annotations

import pytest
import timm
import torch

from vitreous import VitreousError
from vitreous.models.lsnet import LSConv, small_kernel_aggregation


def test_every_place_has_its_own_kernel_shared_by_every_eighth_of_the_channels() -> None:
    torch.manual_seed(0)
    x, kernels = torch.randn(1, 16, 5, 6), torch.randn(1, 2, 9, 5, 6)
    out = small_kernel_aggregation(x, kernels)
    around = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for channel, row, column in ((0, 0, 0), (3, 2, 4), (14, 4, 5)):
        seen = around[0, channel, row : row + 3, column : column + 3].flatten()
        torch.testing.assert_close(out[0, channel, row, column], seen @ kernels[0, channel % 2, :, row, column])


def test_a_large_look_decides_the_small_kernels() -> None:
    torch.manual_seed(0)
    conv = LSConv(16).eval()
    x = torch.randn(1, 16, 9, 9)
    changed = x.clone()
    changed[..., 4, 7] += 1  # three places from the middle: outside of 3 × 3, inside of 7 × 7
    looks = torch.nn.Sequential(*list(conv.perceive)[:-1])  # the GroupNorm behind it sees the whole image
    moved = (looks(x) - looks(changed)).abs().sum(1)[0]
    assert moved[4, 4] > 0
    assert moved[:, :4].max() == 0


def test_other_sizes_are_refused_with_what_to_do() -> None:
    with torch.device("meta"):
        model = timm.create_model("lsnet_t")
        with pytest.raises(VitreousError, match=r"4 × 4 places, not for 5 × 5: .*img_size="):
            model(torch.zeros(1, 3, 288, 288))
