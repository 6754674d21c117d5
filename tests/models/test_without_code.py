"""Architectures of which no official code exists: what their papers claim of the mechanism.

DualToken-ViT, DSM, DCT-HistoTransformer and MAFormer.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import SMALL
from torch import Tensor, nn

from vitreous.mixers.cosine import dct2, idct2
from vitreous.models.dct_histotransformer import DCTAttention
from vitreous.models.dsm import DynamicSpectrum
from vitreous.models.maformer import AttentionFusion


@pytest.mark.parametrize("name", ["dsm_small", "dct_histotransformer", "maformer_small", "dualtoken_vit_small"])
def test_it_is_made_as_registered(name: str) -> None:
    with torch.device("meta"):
        model = cast(Any, timm.create_model(name))
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, model.num_classes)


# ---- DSM


def test_with_equal_weights_the_mixer_is_its_projection() -> None:
    mixer, x = DynamicSpectrum(8, 7), torch.randn(2, 8, 7, 7)
    nn.init.constant_(mixer.spectra, 1.0)
    torch.testing.assert_close(mixer(x), mixer.proj(x), rtol=1e-4, atol=1e-5)


def test_each_image_chooses_its_weights_among_the_learned() -> None:
    torch.manual_seed(0)
    mixer, x = DynamicSpectrum(8, 7, spectra=3), 3 * torch.randn(2, 8, 7, 7) + torch.randn(2, 8, 1, 1)
    shares = mixer.choose(x.mean((2, 3))).softmax(1)
    torch.testing.assert_close(mixer.weights(x), torch.einsum("bk,kchw->bchw", shares, mixer.spectra))
    assert (shares[0] - shares[1]).abs().max() > 1e-3


def test_a_spectrum_means_the_same_half_waves_at_another_size() -> None:
    """One that lets two frequencies pass and no others gives back a wave of them in a map of any size, and not its neighbours."""
    mixer = DynamicSpectrum(1, 7)
    nn.init.zeros_(mixer.spectra)
    mixer.spectra.data[:, :, 2, 3] = 1
    mixer.proj = cast(Any, nn.Identity())
    for height, width in ((7, 7), (5, 12)):
        only = torch.zeros(1, 1, height, width)
        only[..., 2, 3] = 4
        wave = idct2(only, height, width)
        torch.testing.assert_close(mixer(wave), wave)
        assert mixer(idct2(only.roll(1, 3), height, width)).abs().max() < 1e-5


# ---- DCT-HistoTransformer


def test_attention_is_among_low_frequencies_alone() -> None:
    torch.manual_seed(0)
    attn, x = DCTAttention(8, 2, 0.5).eval(), torch.randn(2, 8, 8, 8)
    high = dct2(x).clone()
    high[..., :4, :4] = 0
    with torch.no_grad():
        y = attn(x)
        torch.testing.assert_close(attn(x + 5 * idct2(high, 8, 8)), y, rtol=1e-4, atol=1e-4)
        assert dct2(y)[..., 4:, :].abs().max() < 1e-5 < dct2(y)[..., :4, :4].abs().max()
    seen: list[int] = []
    attn.qkv.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    attn(x)
    assert seen == [16], "a quarter of the tokens"


def test_with_all_frequencies_it_is_attention_among_them() -> None:
    attn, x = DCTAttention(8, 2, 1.0).eval(), torch.randn(2, 8, 4, 4)
    q, k, v = attn.qkv(dct2(x).flatten(2).mT).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    wanted = attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(dct2(attn(x)), wanted, rtol=1e-4, atol=1e-5)


# ---- MAFormer


def gradient(attend: nn.Module, x: Tensor) -> Tensor:
    """Which places of `[1, H, W, C]` the first one's answer depends on."""
    x = x.clone().requires_grad_()
    attend(x)[0, 0, 0].abs().sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().sum(-1) > 0


def test_windows_ask_a_summary_of_the_whole_map() -> None:
    torch.manual_seed(0)
    fusion, x = AttentionFusion(8, 2, 4, 64, 5), torch.randn(1, 8, 8, 8)
    assert gradient(fusion, x).all()
    assert gradient(fusion.local, x).nonzero().amax().item() == 3, "windows alone see their own"
    seen: list[Tensor] = []
    fusion.cross.register_forward_hook(lambda _, given, __: seen.extend(given))
    fusion(x)
    torch.testing.assert_close(seen[0], fusion.local(x).flatten(1, 2))
    wanted = torch.einsum("mn,bnc->bmc", fusion.down.weight, x.flatten(1, 2)) + fusion.down.bias[:, None]
    torch.testing.assert_close(seen[1], wanted)
    with torch.no_grad():
        for p in (fusion.cross.proj.weight, fusion.cross.proj.bias):
            p.zero_()
    torch.testing.assert_close(fusion(x), fusion.local(x))


# ---- DualToken-ViT


def test_global_tokens_go_along_through_all_stages() -> None:
    model, x = cast(Any, SMALL["dualtoken-vit"].make()), SMALL["dualtoken-vit"].images(1)
    given: list[tuple[Tensor, Tensor]] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _, args, out: given.append((args[0][1], out[1])))
    with torch.no_grad():
        model(x)
        assert given[0][0].shape == (1, 4, 16) and torch.equal(given[0][0], model.stem.tokens)
        for before, after in pairwise(given):
            assert torch.equal(before[1], after[0])
        block, (map_, known) = model.stages[0].blocks[0], (torch.randn(1, 16, 16, 16), torch.randn(1, 4, 16))
        out, updated = block(map_, known)
        moved, _ = block(map_, known + torch.randn(1, 4, 16))
        assert updated.shape == known.shape and (moved - out).abs().amax((0, 1)).min() > 0, "every place hears of them"


def test_the_map_is_made_small_in_steps() -> None:
    block = cast(Any, SMALL["dualtoken-vit"].make()).stages[0].blocks[0]
    sides = []
    for layer in block.down:
        layer.register_forward_hook(lambda _, __, out: sides.append(out.shape[-1]))
    block(torch.randn(1, 16, 16, 16), torch.randn(1, 4, 16))
    assert sides == [8, 8, 4, 4, 2, 2]
