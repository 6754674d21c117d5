from __future__ import annotations

import timm
import torch

from vitreous.models.cas_vit import AdditiveTokenMixer


def test_queries_and_keys_meet_by_addition() -> None:
    """With the contexts opened, the mixer is Γ(q + k) · v: twice the input gives four times the output."""
    torch.manual_seed(0)
    mixer = AdditiveTokenMixer(8).eval()
    assert mixer.dwc.bias is not None and mixer.proj.bias is not None
    torch.nn.init.zeros_(mixer.dwc.bias)
    torch.nn.init.zeros_(mixer.proj.bias)
    x = torch.randn(1, 8, 6, 6)
    gated = mixer(x)
    mixer.context_q, mixer.context_k = torch.nn.Sequential(), torch.nn.Sequential()
    q, k, v = mixer.qkv(x).chunk(3, 1)
    torch.testing.assert_close(mixer(x), mixer.proj(mixer.dwc(q + k) * v))
    torch.testing.assert_close(mixer(2 * x), 4 * mixer(x))
    assert (gated - mixer(x)).abs().max() > 0.01


def test_the_published_parameters_count_the_distillation_head() -> None:
    for name, millions in (("rcvit_xs", 3.20), ("rcvit_s", 5.76), ("rcvit_m", 12.42), ("rcvit_t", 21.76)):
        with torch.device("meta"):
            model = timm.create_model(name, distillation=True)
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.01
