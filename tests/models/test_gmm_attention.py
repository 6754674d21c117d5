"""GMM attention: near tokens count more, by as much as each head has learned."""

from __future__ import annotations

import torch

from vitreous.models.gmm_attention import GaussianMaskAttention, GaussianMixtureMask, gaussian


def test_the_mask_is_the_mixture_of_gaussians() -> None:
    mask = GaussianMixtureMask(heads=2, kernels=3)
    at = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1).view(16, 2)
    squared = (at[:, None] - at).square().sum(-1)
    wanted = sum(mask.alpha[k] * torch.exp(-squared / (2 * mask.sigma[k] ** 2)) for k in range(3))
    torch.testing.assert_close(mask(gaussian(4)), wanted, rtol=1e-3, atol=1e-4)


def test_a_narrow_mask_leaves_distant_tokens_unscored() -> None:
    torch.manual_seed(0)
    attention, x = GaussianMaskAttention(8, num_heads=2, kernels=1), torch.randn(1, 16, 8)
    with torch.no_grad():
        before = attention(x, gaussian(4))
        attention.mask.sigma.fill_(1e-2)
        attention.mask.alpha.fill_(1e8)  # a token then reads itself, or, if unlike itself, all others evenly
        near = attention(x, gaussian(4))
        q, k, _ = attention.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        own = (q * k).sum(-1) > 0
        value = attention.qkv(x)[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
        wanted = attention.proj(value.where(own[..., None], (value.sum(2, keepdim=True) - value) / 15).transpose(1, 2).flatten(2))
    torch.testing.assert_close(near, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, near, atol=1e-2)
