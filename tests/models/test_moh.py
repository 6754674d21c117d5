"""MoH: which heads a token uses, and what that changes."""

from __future__ import annotations

import pytest
import torch
from small_models import SMALL

from vitreous import VitreousError, glass
from vitreous.models import moh


def test_a_token_uses_the_heads_it_scores_highest() -> None:
    torch.manual_seed(0)
    router = moh.HeadRouter(16, heads=8, shared=2, routed=3)
    x = torch.randn(2, 5, 16)
    gates = router(x)
    shared, routed = gates[..., :2], gates[..., 2:]
    assert (shared > 0).all()
    assert ((routed > 0).sum(-1) == 3).all()
    scores = router.routed(x)
    assert (scores[routed > 0].view(2, 5, 3).amin(-1) >= scores.masked_fill(routed > 0, -9).amax(-1)).all()
    torch.testing.assert_close(shared.sum(-1) / 2 + routed.sum(-1) / 3, torch.full((2, 5), 2.0))


def test_heads_that_no_token_chose_do_not_matter() -> None:
    torch.manual_seed(0)
    attention, x = moh.CosineAttention(16, heads=4, shared=1, routed=1, side=4).eval(), torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        attention.router.routed.weight.zero_()
        attention.router.routed.weight[0] = 1.0
        x[:] = x.abs()  # every token scores the first routed head highest
        before = attention(x)
        attention.kv.weight[16 + 8 :] = 0.0  # values of the last two heads
        torch.testing.assert_close(attention(x), before)
        attention.kv.weight[16 + 4 :] = 0.0
        assert not torch.allclose(attention(x), before, atol=1e-4)


def test_the_load_balance_loss_tells_even_use_from_one_head_for_all() -> None:
    model = SMALL["moh"].make().train()
    with moh.load_balance(model) as losses:
        model(SMALL["moh"].images())
    even = torch.stack(losses).mean()
    assert even.requires_grad and len(losses) == sum(isinstance(m, moh.HeadRouter) and m.n_routed > 0 for m in model.modules())
    for router in (m for m in model.modules() if isinstance(m, moh.HeadRouter) and m.n_routed):
        weight = torch.zeros_like(router.routed.weight)
        weight[0] = 9.0
        router.routed.weight.data = weight.where(weight > 0, -9.0)
        x = torch.ones(1, 4, weight.shape[1])
        with moh.load_balance(router) as one:
            router(x)
        assert one[0] > even


def test_local_and_distant_keys_share_one_softmax() -> None:
    small = SMALL["moh"]
    model = small.make()
    with torch.no_grad(), glass(model) as g:
        model(small.images())
    first = g.attention[0]
    assert first.shape[-1] == 9 + 2 * 2  # at 64 pixels, 16 x 16 positions, pooled by 8
    torch.testing.assert_close(first.sum(-1), torch.ones(first.shape[:-1]))
    assert (first[:, :, 0, [0, 1, 2, 3, 6]] == 0).all()  # the first corner has no neighbours above and on its left


def test_sides_must_be_multiples_of_32() -> None:
    with pytest.raises(VitreousError, match="multiples of 32"):
        SMALL["moh"].make()(torch.zeros(1, 3, 72, 72))
