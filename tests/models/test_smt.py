"""SMT's modulation: several sizes of kernels, mixed across heads, and its way from modulation to attention."""

from __future__ import annotations

import torch
from small_models import SMALL

from vitreous.models.smt import Attention, ScaleAwareModulation


def test_each_head_sees_its_own_neighbourhood() -> None:
    """Of the channels before they are mixed, those of head i change where a pixel is within 1 + i places, and no further."""
    torch.manual_seed(0)
    sam = ScaleAwareModulation(16, 4).eval()
    x = torch.zeros(1, 16, 15, 15)
    x[..., 7, 7] = 1.0
    for i, conv in enumerate(sam.local):
        spread = (conv(x[:, :4]) - conv(torch.zeros_like(x[:, :4]))).abs().sum((0, 1))
        assert spread[7, 7 + 1 + i] > 0 and spread[7, 7 + 2 + i :].sum() == 0


def test_groups_mix_the_heads() -> None:
    """What one head saw reaches, through the grouped convolution, one channel in `heads` of what comes out of it."""
    torch.manual_seed(0)
    sam = ScaleAwareModulation(16, 4)
    heads = [torch.zeros(1, 4, 3, 3) for _ in range(4)]
    heads[2][:, 1] = 1.0  # second channel of the third head
    seen = torch.stack(heads, 2).flatten(1, 2)
    mixed = (sam.mix(seen) - sam.mix(torch.zeros_like(seen))).abs().sum((0, 2, 3))
    assert mixed.nonzero().flatten().tolist() == list(range(8, 16))  # the second of four groups, of eight channels each


def test_the_value_is_multiplied_by_what_was_seen() -> None:
    torch.manual_seed(0)
    sam = ScaleAwareModulation(16, 4).eval()
    assert sam.proj.bias is not None and sam.v.bias is not None
    torch.nn.init.zeros_(sam.v.weight)
    torch.nn.init.zeros_(sam.v.bias)
    out = sam(torch.randn(1, 16, 5, 5))
    torch.testing.assert_close(out, sam.proj.bias[:, None, None].expand_as(out))


def test_modulation_then_both_then_attention() -> None:
    kinds = [
        ["a" if isinstance(m, Attention) else "m" for m in stage.modules() if isinstance(m, (Attention, ScaleAwareModulation))]
        for stage in SMALL["smt"].make(depths=(2, 2, 4, 2)).get_submodule("stages").children()
    ]
    assert kinds == [["m", "m"], ["m", "m"], ["m", "a", "m", "a"], ["a", "a"]]
