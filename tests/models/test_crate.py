from __future__ import annotations

import torch
import torch.nn.functional as F

from vitreous import glass
from vitreous.models.crate import ISTA, SubspaceAttention


def test_ista_lowers_what_it_optimises() -> None:
    """½ |z − D a|² + λ |a|₁ is lower at the step's result than at a = z, and the result is sparse and not negative."""
    torch.manual_seed(0)
    step, z = ISTA(16), torch.randn(32, 16).abs()
    a = step(z)

    def objective(a: torch.Tensor) -> torch.Tensor:
        return 0.5 * (z - F.linear(a, step.dictionary)).square().sum(-1) + step.lambd * a.abs().sum(-1)

    assert (objective(a) < objective(z)).all()
    assert (a >= 0).all() and (a == 0).any()


def test_query_key_and_value_are_one_code() -> None:
    """The scores are symmetric, so that the map's rows, their normalisation undone, are too."""
    torch.manual_seed(0)
    attention, x = SubspaceAttention(8, 2).eval(), torch.randn(1, 5, 8)
    with torch.no_grad(), glass(attention) as g:
        attention(x)
    [probabilities] = g.attention
    logs = probabilities.log()
    difference = logs - logs.mT
    torch.testing.assert_close(difference, difference[..., :1] - difference[..., :1].mT, rtol=1e-3, atol=1e-4)
    assert sum(p.numel() for p in attention.parameters()) == 2 * 8 * 8 + 8
