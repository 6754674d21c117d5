from __future__ import annotations

import timm
import torch

import vitreous.models  # noqa: F401


def test_tokens_look_back_only_and_the_class_token_sees_all() -> None:
    torch.manual_seed(0)
    model = timm.create_model("illama_tiny", img_size=64, embed_dim=16, num_heads=2, depth=2).eval()
    x = torch.randn(1, 3, 64, 64)
    later = x.clone()
    later[..., 32:, :] += 1  # the last two of four rows of patches
    with torch.no_grad():
        before, after = model.forward_features(x), model.forward_features(later)
        torch.testing.assert_close(before[:, :8], after[:, :8])
        assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-5)
        model.soft_mask_rate = 1.0
        assert not torch.allclose(model.forward_features(x)[:, :8], model.forward_features(later)[:, :8], atol=1e-5)
