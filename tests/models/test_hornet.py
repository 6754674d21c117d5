from __future__ import annotations

import torch

from vitreous.models.hornet import GlobalLocalFilter, GnConv


def test_the_interactions_have_the_order_that_the_name_says() -> None:
    """Without biases, t times the input gives t ** (order + 1) times the output: n gates and what they gate."""
    torch.manual_seed(0)
    for order in (2, 5):
        conv = GnConv(32, order)
        for name, p in conv.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(p)
        x = torch.randn(1, 32, 9, 9, dtype=torch.float64)
        conv.double()
        torch.testing.assert_close(conv(2 * x), 2 ** (order + 1) * conv(x))


def test_a_global_filter_reaches_the_whole_map_and_any_size() -> None:
    torch.manual_seed(0)
    layer = GlobalLocalFilter(8, 8)
    for side in (8, 11):
        x = torch.randn(1, 8, side, side)
        changed = x.clone()
        changed[:, :, 0, 0] += torch.randn(8)
        moved = (layer(changed) - layer(x)).abs().sum(1)[0]
        assert moved.min() > 0
