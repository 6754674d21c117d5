"""What PATNet adds: a part of the channels is convolved, the others are weighted by statistics or by distance."""

from __future__ import annotations

import torch

from vitreous.models.patnet import DistanceAttention, PartialMixer, StatisticAttention


def test_a_quarter_is_convolved_and_the_rest_sees_the_whole_map() -> None:
    torch.manual_seed(0)
    mixer = PartialMixer(8, 0).eval()
    x = torch.randn(1, 8, 6, 6)
    far = x.clone()
    far[:, :, 5, 5] += 3
    moved = (mixer(far) - mixer(x)).abs()[0, :, 0, 0]
    assert (moved[:2] == 0).all() and (moved[2:] > 0).all()


def test_the_deviation_of_a_channel_counts() -> None:
    """Two maps of the same mean: only their deviation can tell them apart."""
    torch.manual_seed(0)
    attention = StatisticAttention(2).eval()
    torch.nn.init.constant_(attention.cfc1.weight, 1.0)
    flat = torch.ones(1, 2, 2, 2)
    rough = flat + torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    factor = (attention(rough) / rough)[0, 0, 0, 0], (attention(flat) / flat)[0, 0, 0, 0]
    assert factor[0] > factor[1]


def test_bias_by_distance() -> None:
    """Places equally far share an entry, on maps of any size; a large entry for distance 0 makes every place keep its value."""
    torch.manual_seed(0)
    attention = DistanceAttention(4, 2).eval()
    with torch.no_grad():
        attention.bias[:, 40] = 100
    x = torch.randn(1, 4, 3, 5)
    value = attention.qkv(x.flatten(2).mT)[..., 8:]
    torch.testing.assert_close(attention(x), attention.proj(value).mT.unflatten(2, (3, 5)))
