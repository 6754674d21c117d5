"""CvT's convolutional projections and what its class token sees."""

from __future__ import annotations

from typing import Any

import torch
from small_models import SMALL

from vitreous import glass
from vitreous.models.cvt import ConvolutionalAttention


def test_keys_and_values_have_a_stride_and_the_class_token_none() -> None:
    small = SMALL["cvt"]
    with torch.no_grad(), glass(small.make()) as g:
        g.model(small.images())
    assert [tuple(a.shape[2:]) for a in g.attention] == [(256, 64), (64, 16), (17, 5), (17, 5)]


def test_convolutions_tell_places_apart() -> None:
    """Without positions, places mixed up give mixed up outputs in plain attention; here their neighbours count."""
    torch.manual_seed(0)
    attention: Any = ConvolutionalAttention(16, 2).eval()
    x, order = torch.randn(1, 16, 16), torch.randperm(16)
    assert (attention(x, (4, 4))[:, order] - attention(x[:, order], (4, 4))).abs().max() > 1e-3
    for conv in (attention.conv_q[0], attention.conv_k[0], attention.conv_v[0]):  # what is left without the neighbours
        torch.nn.init.dirac_(conv.weight, groups=16)
        conv.stride = (1, 1)
    torch.testing.assert_close(attention(x, (4, 4))[:, order], attention(x[:, order], (4, 4)))


def test_the_class_token_passes_by_the_convolutions() -> None:
    torch.manual_seed(0)
    attention = ConvolutionalAttention(16, 2).eval()
    x = torch.randn(1, 17, 16)
    moved = torch.cat([x[:, :1], x[:, 1:].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)], 1)
    for name, parameter in attention.named_parameters():
        if name.endswith("0.weight"):  # kernels that are the same along rows and columns
            parameter.data = (parameter.data + parameter.data.mT) / 2
    torch.testing.assert_close(attention(x, (4, 4))[:, 0], attention(moved, (4, 4))[:, 0])
