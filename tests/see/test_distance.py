"""Attention by distance: rings, pixels, entropy and prefix share against loops, on every token layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from known_heads import known_heads
from scipy.stats import spearmanr
from support import small_vit
from torch import Tensor, nn

from vitreous import see
from vitreous.blocks import traced
from vitreous.errors import VitreousError
from vitreous.glass import glass
from vitreous.prune import Heads
from vitreous.steps import slim
from vitreous.tokens import EViT, ToMe
from vitreous.work import Work, working


def registers() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=(16, 40), patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7
    )
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    return model.eval()


LAYOUTS: dict[str, tuple[Any, int, tuple[int, int]]] = {
    "class token": (lambda: small_vit(depth=2), 1, (4, 4)),
    "five prefix tokens, not square": (registers, 5, (2, 5)),
    "no prefix": (lambda: small_vit(depth=2, class_token=False, global_pool="avg"), 0, (4, 4)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_profiles_are_those_of_a_loop_over_pairs(layout: str) -> None:
    make, prefix, (h, w) = LAYOUTS[layout]
    model, x = make(), torch.randn(3, 3, 8 * h, 8 * w)
    found = see.distance(model, x, batch=2)
    with torch.no_grad(), glass(model) as g:
        model(x)
    for layer, a in enumerate(g.attention):
        for head in range(3):
            hops, far, entropy, on_prefix = np.zeros(max(h, w)), 0.0, 0.0, 0.0
            for map in a[:, head].double().numpy():
                for q in range(h * w):
                    row = map[prefix + q]
                    entropy -= (row * np.log(row)).sum()
                    on_prefix += row[:prefix].sum()
                    for k in range(h * w):
                        share = row[prefix + k] / row[prefix:].sum()
                        dy, dx = abs(q // w - k // w), abs(q % w - k % w)
                        hops[max(dy, dx)] += share
                        far += share * 8 * (dy**2 + dx**2) ** 0.5
            n = 3 * h * w
            np.testing.assert_allclose(found.hops[layer, head], hops / n, rtol=1e-4)
            np.testing.assert_allclose(
                found.measures[:, layer, head], [far / n, entropy / n, on_prefix / n], rtol=1e-4, atol=1e-7
            )
    assert found.grid == (h, w) and found.images == 3
    assert (found.low <= found.measures + 1e-9).all() and (found.measures <= found.high + 1e-9).all()


def test_known_heads_look_as_far_as_they_must() -> None:
    x = torch.randn(8, 3, 32, 32)
    found = see.distance(known_heads([("self", "ring", "global"), ("sink", "right", "local")]), x)
    self_, ring, uniform = found.hops[0]
    assert self_[0] > 0.95 and ring[2] > 0.95
    np.testing.assert_allclose(uniform, found.uniform, rtol=0.02)
    assert found.uniform.sum() == pytest.approx(1) and found.uniform[0] == pytest.approx(1 / 16)
    pixels, entropy, prefix = found.measures
    assert pixels[0, 0] < 0.5 < 16 < pixels[0, 1]
    assert entropy[0, 2] == pytest.approx(np.log(17), rel=0.01) and entropy[0, 0] < 0.3
    assert prefix[1, 0] > 0.95 and prefix[0, 0] < 0.05


def test_slimmed_models_ask_as_the_token_that_a_patch_is_part_of() -> None:
    model, x = small_vit(depth=3), torch.randn(4, 3, 32, 32)
    for step in (ToMe(r=3), EViT(keep=0.6, at=(0,))):
        small = slim(model, step)
        found, whole = see.distance(small, x), see.distance(model, x)
        np.testing.assert_allclose(found.measures[:2, 0], whole.measures[:2, 0], rtol=1e-4)
        np.testing.assert_allclose(found.hops.sum(-1), 1, rtol=1e-4)
    with torch.no_grad(), traced(small) as trace, glass(small) as g:
        small(x)
    a, total, asked = g.attention[1], 0.0, 0
    for b in range(4):
        for q in range(16):
            token = int(trace[0].into[b, 1 + q])
            if token == trace[0].rest:
                continue
            asked += 1
            total += float(a[b, 0, token, 0]) / int((trace[0].into[b, 1:] != trace[0].rest).sum()) / 4
    assert found.measures[2, 1, 0] == pytest.approx(total, rel=1e-4) and asked < 64


def test_pruned_heads_are_nan(images: Tensor) -> None:
    found = see.distance(slim(small_vit(), Heads(share=0.34), images), images)
    assert np.isnan(found.measures[0]).sum() == 4 and len(found.rows()) == 8
    assert not np.isnan(found.by_layer).any() and not np.isnan(found.trend).any()


def test_the_trend_is_spearmans() -> None:
    x = torch.randn(8, 3, 32, 32)
    found = see.distance(known_heads([("self",) * 3, ("local",) * 3, ("global",) * 3]), x)
    assert found.trend[0, 0] > 0.9 and found.trend[0, 1] <= found.trend[0, 0] + 1e-9
    plain = see.distance(small_vit(), x)
    for m in range(3):
        expected = spearmanr(np.repeat(np.arange(4), 3), plain.measures[m].ravel()).statistic
        assert plain.trend[m, 0] == pytest.approx(expected)
    np.testing.assert_allclose(plain.by_layer, plain.measures.mean(-1))


def test_progress_is_told_and_data_sets_are_taken() -> None:
    import vitreous as vt

    model = vt.open()
    data = vt.data.open_data("sample", model, limit=6)
    told: list[float] = []
    with working(Work(told.append)):
        found = see.distance(model, data, batch=4)
    assert told == [pytest.approx(4 / 6), 1.0]
    again = see.distance(model, data.tensor(range(6)), batch=6)
    np.testing.assert_allclose(found.measures, again.measures, rtol=1e-4)
    assert found.measures.shape == (3, 8, 4)


def test_refusals() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 1, 1, 1), embed_dim=24)
    with pytest.raises(VitreousError, match="windows, pooling, channels"):
        see.distance(swin.eval(), torch.randn(1, 3, 56, 56))
    with pytest.raises(VitreousError, match=r"see\.distance shows attention"):
        see.distance(timm.create_model("resnet10t"), torch.randn(1, 3, 32, 32))
    with pytest.raises(VitreousError, match="tensor"):
        see.distance(small_vit(), Tensor())
