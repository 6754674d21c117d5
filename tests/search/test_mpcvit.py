"""MPCViT: heads with and without a softmax, how they are searched and decided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learning import pictures, vit

import vitreous as vt
from vitreous import VitreousError
from vitreous.models.mpcvit import MPCViT, heads_of
from vitreous.prune.mpcvit import latency


def small(**kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4)
    return vt.open("mpcvit_7_4_32_search", **shape, **kwargs)


def test_scaling_heads_are_linear_in_their_values_and_softmax_heads_are_not() -> None:
    """Without a softmax attention is q (kᵀ v) / N: doubling the queries doubles what a head gives."""
    attn = heads_of(small())[0]
    x = torch.randn(1, 5, 24)
    with torch.no_grad():
        for alpha, linear in ((0.0, True), (1.0, False)):
            attn.alpha.fill_(alpha)
            attn.proj.bias.zero_()
            before = attn(x)
            attn.qkv.weight[:24] *= 2
            after = attn(x)
            attn.qkv.weight[:24] /= 2
            assert torch.allclose(after, 2 * before, atol=1e-5) == linear
            q, k, v = attn.qkv(x).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
            if linear:
                torch.testing.assert_close(before, attn.proj((q @ (k.mT @ v) * attn.scale / 5).transpose(1, 2).flatten(2)))


def test_alpha_is_learnt_and_the_penalty_pulls_it_down() -> None:
    sums = []
    for strength in (0.0, 1.0):
        given = dict(epochs=4, batch=16, augment=None, optimiser=vt.learn.AdamW(lr=1e-2))
        trained = vt.learn.train(small(), pictures(), vt.learn.MPCSearch(strength), **given)
        sums.append(sum(float(m.alpha.sum()) for m in heads_of(trained)))
    assert sums[1] < sums[0] - 0.2 and sums[0] != 6.0
    with pytest.raises(VitreousError, match="MPCViT"):
        vt.learn.train(vit(), pictures(), vt.learn.MPCSearch(), batch=16, augment=None)


def test_the_largest_over_all_layers_keep_their_softmax(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        for m, values in zip(heads_of(model), ([0.1, 0.9, 0.8], [0.2, 0.7, 0.3]), strict=True):
            m.alpha.copy_(torch.tensor(values).view(1, 3, 1, 1))
    decided = vt.prune.MPCHeads(mu=0.5).apply(model)
    assert [m.alpha.flatten().tolist() for m in heads_of(decided)] == [[0, 1, 1], [0, 1, 0]]
    x = pictures()[0][:4]
    vt.save(decided, tmp_path / "net.safetensors")
    torch.testing.assert_close(vt.open(tmp_path / "net.safetensors")(x), decided(x))
    trained = vt.learn.train(decided, pictures(), epochs=1, batch=16, augment=None)
    assert [m.alpha.flatten().tolist() for m in heads_of(trained)] == [[0, 1, 1], [0, 1, 0]]
    assert "3 of 6 heads" in repr(decided)
    with pytest.raises(VitreousError, match="not of VisionTransformer"):
        vt.prune.MPCHeads().apply(vit())
    with pytest.raises(VitreousError, match=r"\[0, 1\]"):
        vt.prune.MPCHeads(mu=2.0)


def test_latency_as_published() -> None:
    for mu, seconds in ((0.1, 48.0), (0.3, 52.9), (0.5, 58.7), (0.7, 63.6)):
        assert latency(mu) == pytest.approx(seconds, rel=0.02)


def test_plus_keeps_gelu_by_token() -> None:
    model = MPCViT(16, 8, num_classes=4, embed_dim=24, depth=1, num_heads=3, linear_gelu=True)
    x, before = torch.randn(1, 5, 24), model.blocks[0]
    y = before(x)
    with torch.no_grad():
        before.beta[:, 2] = 0.0
    changed = (before(x) - y).abs().sum(2)[0] > 1e-6
    assert changed.tolist() == [False, False, True, False, False]
