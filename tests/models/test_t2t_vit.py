from __future__ import annotations

import torch

from vitreous.models.t2t_vit import DenseBlock, T2TViT, TokenPerformer


def test_performer_is_attention_by_positive_features() -> None:
    """Its linear form gives what the whole N × N map of φ(q)·φ(k), its rows normalised, gives."""
    torch.manual_seed(0)
    layer = TokenPerformer(12, 8).eval()
    x = torch.randn(2, 5, 12)
    k, q, v = layer.kqv(layer.norm1(x)).chunk(3, -1)
    scores = layer.phi(q) @ layer.phi(k).mT
    assert (scores > 0).all()
    wanted = v + layer.proj(scores / scores.sum(-1, keepdim=True) @ v)
    torch.testing.assert_close(layer(x), wanted + layer.mlp(layer.norm2(wanted)), rtol=1e-4, atol=1e-5)


def test_tokens_overlap() -> None:
    """Each token is made of more than its own 16 × 16 pixels: soft splits reach into the neighbours."""
    torch.manual_seed(0)
    model = T2TViT(64, embed_dim=16, depth=1, num_heads=2, tokens_type="transformer").eval()
    for layer in (model.patch_embed.attention1, model.patch_embed.attention2):
        torch.nn.init.zeros_(layer.proj.weight)  # so that only the soft splits mix places
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    model.patch_embed(x)[0, 5].sum().backward()  # row 1, column 1 of 4 × 4
    assert x.grad is not None
    rows = x.grad[0].abs().sum((0, 2)).nonzero()
    assert rows.min() < 16 and rows.max() >= 32


def test_dense_blocks_keep_all_that_came_before() -> None:
    torch.manual_seed(0)
    block, x = DenseBlock(4, 8, 2), torch.randn(1, 3, 8)
    y = block(x)
    assert y.shape == (1, 3, 12) and torch.equal(y[..., :8], x)
