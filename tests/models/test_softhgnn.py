"""What SoftHGNN adds: hyperedges that share themselves out among tokens, and of which some are chosen by the image."""

from __future__ import annotations

import pytest
import torch

from vitreous.errors import VitreousError
from vitreous.models.softhgnn import LocalitySelfAttention, SoftHGNN, SoftHyperedges


def test_each_hyperedge_shares_out_one() -> None:
    torch.manual_seed(0)
    shares = SoftHyperedges(8, 5, 2)(torch.randn(2, 7, 8))
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 5))


def test_heads_are_a_mean_of_scaled_products() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(2, 7, 8), SoftHyperedges(8, 5, 2)
    context = torch.cat((x.mean(1), x.max(1).values), 1)
    prototypes = layer.prototype_base + layer.context_net(context).view(2, 5, 8)
    tokens = layer.pre_head_proj(x).view(2, 7, 2, 4).transpose(1, 2)
    logits = (tokens @ prototypes.view(2, 5, 2, 4).permute(0, 2, 3, 1) / 2).mean(1)
    torch.testing.assert_close(layer(x), logits.softmax(1))


def test_the_image_chooses_among_the_dynamic_hyperedges() -> None:
    torch.manual_seed(0)
    layer = SoftHyperedges(8, 7, 2, dynamic=5, top_k=2)
    used = layer(torch.randn(6, 9, 8)).sum(1) > 0
    assert used[:, :2].all() and (used[:, 2:].sum(1) == 2).all()
    assert len({tuple(row.tolist()) for row in used}) > 1
    with pytest.raises(VitreousError, match="cannot be"):
        SoftHyperedges(8, 3, 2, dynamic=5, top_k=2)


def test_messages_come_through_hyperedges_alone() -> None:
    """Without any, tokens are what they were, but for what a bias adds to all alike."""
    torch.manual_seed(0)
    x, layer = torch.randn(1, 6, 8), SoftHGNN(8, 3, 2)
    torch.nn.init.zeros_(layer.node_proj.bias)
    layer.edge_proj.weight.data.zero_()
    layer.edge_proj.bias.data.zero_()
    torch.testing.assert_close(layer(x), x)


def test_no_token_attends_to_itself() -> None:
    torch.manual_seed(0)
    attention = LocalitySelfAttention(8, 2, 4, 0.0)
    x = torch.randn(1, 2, 8)  # of two tokens each gives its value to the other
    values = attention.qkv(x)[..., 16:].flip(1)
    torch.testing.assert_close(attention(x), attention.proj(values))
