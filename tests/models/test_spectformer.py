from __future__ import annotations

import torch

from vitreous.models.spectformer import SpectFormer, SpectFormerH, SpectralBlock, SpectralGatingNetwork


def test_the_gate_is_a_convolution_as_large_as_the_image() -> None:
    """As the Fourier transform's: and so what moves in moves out, around the edges."""
    torch.manual_seed(0)
    gate, x = SpectralGatingNetwork(3, (6, 4)), torch.randn(2, 24, 3)
    with torch.no_grad():
        spectrum = torch.fft.rfft2(x.reshape(2, 6, 4, 3), dim=(1, 2), norm="ortho")
        wanted = torch.fft.irfft2(spectrum * torch.view_as_complex(gate.complex_weight), s=(6, 4), dim=(1, 2), norm="ortho")
        torch.testing.assert_close(gate(x), wanted.reshape(2, 24, 3), rtol=1e-4, atol=1e-6)
        moved = x.reshape(2, 6, 4, 3).roll((2, 1), (1, 2)).reshape(2, 24, 3)
        torch.testing.assert_close(gate(moved), wanted.roll((2, 1), (1, 2)).reshape(2, 24, 3), rtol=1e-4, atol=1e-6)


def test_spectral_blocks_come_first() -> None:
    blocks = SpectFormer(32, 8, embed_dim=16, num_heads=2, depth=6).blocks
    assert [isinstance(block, SpectralBlock) for block in blocks] == [True] * 4 + [False] * 2


def test_other_tokens_have_a_say() -> None:
    torch.manual_seed(0)
    model = SpectFormerH(32, embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2)).eval()
    with torch.no_grad():
        x = model.forward_features(torch.randn(1, 3, 32, 32))
        torch.testing.assert_close(model.forward_head(x), model.head(x[:, 0]) + 0.5 * model.aux_head(x[:, 1:]).amax(1))
