"""GMM attention: near tokens count more, by as much as each head has learned."""

from __future__ import annotations

import pytest
import torch
from small_models import SMALL
from torch import nn

from vitreous import VitreousError, glass
from vitreous.models.gmm_attention import GaussianMaskAttention, GaussianMixtureMask, gaussian
from vitreous.models.gmm_attention.swin import GaussianMaskWindowAttention, GMMSwin

# How many layers of each small model have a mask, and how many, those of the class token alone, have none.
LAYERS = {"": (4, 0), " swin": (4, 0), " cait": (2, 2), " pit": (3, 0), " t2t": (4, 0)}


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


@pytest.mark.parametrize("family", LAYERS)
def test_masks_multiply_scores_before_all_else(family: str) -> None:
    """Where all α are zero, a token attends evenly to all of the grid, or of the window's part that no shift keeps apart."""
    small, (masked, plain) = SMALL[f"gmm-attention{family}"], LAYERS[family]
    model = small.make()
    with torch.no_grad(), glass(model) as g:
        model(small.images())
        before = list(g.attention)
        for name, p in model.named_parameters():
            if name.endswith(("mask.alpha", "relative_position_bias_table")):
                p.zero_()
        g.clear()
        model(small.images())
    assert len(g.attention) == len(before) == masked + plain
    for attention, old in zip(g.attention[:masked], before, strict=False):
        assert (attention - old).abs().max() > 0.01 * attention.max()
        grid = attention[..., 1:, 1:] if family == " pit" else attention
        even = grid / grid.amax(-1, keepdim=True)
        assert ((even > 0.9999) | (even < (1e-30 if family == " swin" else 0))).all()


def test_scores_of_the_class_token_are_not_masked() -> None:
    torch.manual_seed(0)
    attention, x = GaussianMaskAttention(8, num_heads=2, kernels=1, prefix=1), torch.randn(1, 5, 8)
    nn.init.zeros_(attention.mask.alpha)
    with torch.no_grad():
        q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / 2
        scores[..., 1:, 1:] = 0
        wanted = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x, gaussian(2)), wanted)


def test_windows_must_fill_the_maps_of_swin() -> None:
    with pytest.raises(VitreousError, match=r"stage 2 .* windows of 4"):
        GMMSwin(img_size=48)
    with pytest.raises(VitreousError, match="needs the Gaussian"):
        GaussianMaskWindowAttention(8, 2, 1, window_size=4)(torch.randn(1, 16, 8))
