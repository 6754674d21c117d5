"""What Monarch Mixer adds: convolutions as long as the sequence, both ways, and block-diagonal MLPs."""

from __future__ import annotations

import torch

from vitreous.models.monarch_mixer import BlockdiagLinear, LongFilter, SequenceMixer

FILTER = dict(places=3, width=8, omega=1.0)


def test_the_transform_is_the_direct_convolution() -> None:
    """Place i reads every j: by the filter at lag i − j, or by that of what comes after, which begins with lag −1."""
    torch.manual_seed(0)
    filters = LongFilter(4, 9, True, **FILTER).double()
    kernel, x = filters.kernel(), torch.randn(2, 4, 9).double()
    lag = torch.arange(9)[:, None] - torch.arange(9)
    wanted = torch.einsum("cij,bcj->bci", kernel[:, lag % 18], x) + filters.bias[:, None] * x
    torch.testing.assert_close(filters(x), wanted)
    assert (kernel[:, 9:] != 0).all()


def test_a_causal_mixer_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    for bidirectional in (False, True):
        mixer, x = SequenceMixer(8, 12, bidirectional, True, **FILTER), torch.randn(1, 12, 8)
        later = x.clone()
        later[:, 7:] += 1
        same = torch.isclose(mixer(x), mixer(later), atol=1e-6).all(-1)[0]
        assert same[:7].all() == (not bidirectional)


def test_blocks_of_channels_do_not_meet() -> None:
    layer, x = BlockdiagLinear(8, 16, 4), torch.randn(1, 8)
    other = x.clone()
    other[:, 2:4] += 1  # the second block's inputs
    assert (layer(x) != layer(other))[0].nonzero().flatten().tolist() == [4, 5, 6, 7]
