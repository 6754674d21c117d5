"""What L2ViT adds: attention whose cost is linear, bounded below, and concentrated again by convolutions."""

from __future__ import annotations

import torch

from vitreous.models.l2vit import L2Block, LinearAttention


def test_linear_attention_is_the_quadratic_one() -> None:
    """Queries by keys first, as the paper writes it, with the bound of 100 on their sum: small sums are divided by 100."""
    torch.manual_seed(0)
    attention = LinearAttention(8, 2).double()
    for size in (1.0, 30.0):  # below the bound, and above it
        x = size * torch.randn(1, 3, 4, 8).double()
        q, k, v = attention.qkv(x).flatten(1, 2).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = q.relu() @ k.relu().mT
        weights = scores / scores.sum(-1, keepdim=True).clamp(min=100)
        out = (weights @ v * attention.temperature).transpose(1, 2).flatten(2).unflatten(1, (3, 4))
        assert (scores.sum(-1) > 100).any() == (size > 1)
        torch.testing.assert_close(attention(x), attention.proj(out), rtol=1e-5, atol=1e-6)


def test_concentration_is_local() -> None:
    """Linear attention alone tells all places nearly the same; behind it, the module sees 13 × 13 places."""
    torch.manual_seed(0)
    block = L2Block(4, 1, 0, 1.0, 0.0, 0.0).eval()
    x = torch.randn(1, 16, 16, 4, requires_grad=True)
    block.local(x)[0, 8, 8].sum().backward()
    assert x.grad is not None
    rows = torch.nonzero(x.grad.abs().sum((0, 2, 3)) > 0).flatten().tolist()
    assert rows == list(range(2, 15))
