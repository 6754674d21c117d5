from __future__ import annotations

from typing import Any, cast

import torch
from small_models import SMALL

from vitreous.models.overlock import ContMix, adaptive_avg_pool, neighbourhoods


def test_neighbourhoods_stay_inside_of_the_map() -> None:
    places, offsets = neighbourhoods(6, 7, 5, torch.device("cpu"))
    for row, column, top, left in ((0, 0, 0, 0), (3, 3, 1, 1), (5, 6, 1, 2)):
        wanted = [(r, c) for r in range(top, top + 5) for c in range(left, left + 5)]
        place = row * 7 + column
        assert places[place].tolist() == [r * 7 + c for r, c in wanted]
        assert offsets[place].tolist() == [(r - row + 4) * 9 + c - column + 4 for r, c in wanted]


def test_the_pooling_is_pytorchs() -> None:
    x = torch.randn(1, 2, 13, 8)
    for size in ((7, 7), (14, 3)):
        torch.testing.assert_close(adaptive_avg_pool(x, size), torch.nn.functional.adaptive_avg_pool2d(x, size))


def test_what_is_far_away_decides_the_kernel_but_is_not_mixed() -> None:
    torch.manual_seed(0)
    mixer = ContMix(8, 4, kernel=7, num_heads=2).eval()
    x, key = torch.randn(1, 8, 14, 14), torch.randn(1, 4, 14, 14)
    far = x.clone()
    far[..., 13, 13] += 1
    assert (mixer(far, x, key) - mixer(x, x, key))[..., :10, :10].abs().max() < 1e-6
    context = key.clone()
    context[..., 13, 13] += 1
    assert (mixer(x, x, context) - mixer(x, x, key))[..., 0, 0].abs().max() > 1e-6


def test_the_overview_comes_first_and_has_a_head_of_its_own() -> None:
    small = SMALL["overlock"]
    model, x = cast(Any, small.make()), small.images()
    logits, auxiliary = model.forward_auxiliary(x)
    torch.testing.assert_close(logits, model(x))
    auxiliary.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.aux_head.parameters())
    torch.nn.init.constant_(model.stages[2].context.bias, 3.0)
    assert (model(x) - logits).abs().max() > 1e-6
