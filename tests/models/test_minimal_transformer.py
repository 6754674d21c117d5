"""The minimal transformer: what each omission saves, and what it keeps."""

from __future__ import annotations

import pytest
import timm
import torch

from vitreous import VitreousError
from vitreous.models.minimal_transformer import ReducedAttention


def test_parameters_of_the_reductions() -> None:
    def parameters(name: str) -> int:
        model = timm.create_model(f"minimal_transformer_cifar10_6_1_{name}")
        return sum(p.numel() for p in model.blocks.parameters())

    width, layers = 64, 6
    linear, norm = width * width + width, 2 * width
    assert parameters("mlp_unchanged") == layers * (4 * linear + 8 * width**2 + 5 * width + 2 * norm)
    assert parameters("nomlp_unchanged") == layers * (4 * linear + norm)
    assert parameters("nomlp_wqk") == layers * (3 * linear + norm)
    assert parameters("nomlp_wqk_nowvwo") == layers * (linear + norm)
    assert parameters("nomlp_symmetry") == layers * (2 * linear + width * (width + 1) // 2 + norm)
    assert parameters("nomlp_wqk_nowvwo") < 0.1 * parameters("mlp_unchanged")


@pytest.mark.parametrize("heads", [1, 2])
def test_symmetric_similarity(heads: int) -> None:
    torch.manual_seed(0)
    attention, x = ReducedAttention(8, heads, "symmetric", value=True), torch.randn(1, 5, 8)
    factor = attention.factor[:, attention.places] * attention.lower
    scores = attention.split(x) @ factor @ factor.mT @ attention.split(x).mT
    torch.testing.assert_close(scores, scores.mT)
    assert (factor.triu(1) == 0).all() and torch.count_nonzero(factor) == attention.factor.numel()


def test_without_values_tokens_become_means_of_tokens() -> None:
    torch.manual_seed(0)
    attention, x = ReducedAttention(8, 1, "collapsed", value=False), torch.randn(1, 5, 8)
    with torch.no_grad():
        probabilities = (attention.q(x) @ x.mT * 8**-0.5).softmax(-1)
        torch.testing.assert_close(attention(x), probabilities @ x)
    with pytest.raises(VitreousError, match="single head"):
        ReducedAttention(8, 2, "collapsed", value=True)
