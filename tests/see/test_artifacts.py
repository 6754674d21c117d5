"""Outlier tokens and attention sinks, where they were put on purpose."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from known_heads import known_heads
from support import small_vit
from torch import Tensor

from vitreous import see
from vitreous.errors import VitreousError
from vitreous.glass import glass
from vitreous.prune import Heads
from vitreous.steps import slim
from vitreous.tokens import EViT


def with_outlier(patch: int) -> Any:
    """Patch 5's stream is far longer than the others'."""
    model: Any = small_vit(depth=2)
    with torch.no_grad():
        model.pos_embed[0, 1 + patch] *= 200
    return model


def test_an_outlier_is_found_where_it_is(images: Tensor) -> None:
    found = see.artifacts(with_outlier(5), images, batch=4)
    np.testing.assert_allclose(found.norms[0], 1 / 16)
    expected = np.zeros((2, 4, 4))
    expected[:, 1, 1] = 1
    np.testing.assert_array_equal(found.where, expected)
    assert (see.artifacts(small_vit(depth=2), images).norms[0] == 0).all()


def test_an_outlier_is_three_times_as_long_as_the_median(images: Tensor) -> None:
    model: Any = known_heads([("global", "global", "global")])
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()  # every patch is of length 1
        model.pos_embed[0, 1 + 4] *= 2.9
        model.pos_embed[0, 1 + 5] *= 3.1
    assert np.flatnonzero(see.artifacts(model, images).where).tolist() == [5]


def test_norms_are_those_of_the_stream_after_each_block(images: Tensor) -> None:
    model = small_vit(depth=2)
    found = see.artifacts(model, images)
    with torch.no_grad(), glass(model, record=("block",)) as g:
        model(images)
    for i, view in enumerate(g.views):
        assert view.block is not None
        norm = view.block[:, 1:].norm(dim=-1)
        assert found.norms[1, i] == pytest.approx(float(norm.nanmedian(1).values.mean()), rel=1e-4)
        assert found.norms[2, i] == pytest.approx(float(norm.amax(1).mean()), rel=1e-4)
    cutoff = float(norm.median())
    above = see.artifacts(model, images, cutoff=cutoff)
    assert above.norms[0, 1] == pytest.approx(float((norm > cutoff).float().mean()), rel=1e-4)


def test_sinks_are_tokens_that_draw_all_attention(images: Tensor) -> None:
    found = see.artifacts(known_heads([("sink", "corner", "global")]), images)
    number, share, on_prefix = found.sinks[:, 0]
    assert number.tolist() == [1, 1, 0]
    assert share[0] > 0.95 and share[1] > 0.95 and share[2] == 0
    assert on_prefix[0] > 0.95 and on_prefix[1] < 0.05 and on_prefix[2] == pytest.approx(1 / 17, rel=0.01)


def test_a_sink_receives_ten_times_an_even_share(images: Tensor) -> None:
    """Of 17 tokens, 10 / 17 = 0.588."""
    model: Any = known_heads([("corner", "corner", "global")])
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        high, low = model.blocks[0].norm1(model.pos_embed)[0, -1, [15, 0]].tolist()  # what keys read of the corner and of others
        keys = model.blocks[0].attn.qkv.weight.unflatten(0, (3, 3, 16))[1]
        for head, share in enumerate((0.55, 0.62)):
            keys[head, 0, 15] = math.log(16 * share / (1 - share)) / (10 * (high - low) / 4)  # queries are 10, √d is 4
    number, share, _ = see.artifacts(model, images).sinks[:, 0]
    assert number.tolist() == [0, 1, 0]
    assert share == pytest.approx([0, 0.62, 0], abs=1e-3)


def test_two_models_are_set_against_each_other(images: Tensor) -> None:
    plain, odd = see.artifacts(small_vit(depth=2), images), see.artifacts(with_outlier(5), images)
    rows = plain.versus(odd)
    assert [r["layer"] for r in rows] == [0, 1]
    assert rows[1]["outliers_change"] == pytest.approx(1 / 16) and rows[1]["outliers_change_low"] > 0.05
    same = plain.versus(plain)[0]
    assert same["on_prefix_change"] == same["on_prefix_change_low"] == same["on_prefix_change_high"] == 0
    with pytest.raises(VitreousError, match="of one depth on the same images"):
        plain.versus(see.artifacts(small_vit(depth=3), images))


def test_slimmed_models_and_pruned_heads(images: Tensor) -> None:
    small = slim(with_outlier(5), EViT(keep=0.5, at=(0,)))
    found = see.artifacts(small, images)
    assert np.isfinite(found.norms).all() and (found.norms[1] > 0).all() and (found.where <= 1).all()
    known: Any = known_heads([("sink", "corner", "global")] * 2)
    with torch.no_grad():
        known.pos_embed[0, 0] *= 100
        known.pos_embed[0, -1] *= 4
    given_up = see.artifacts(slim(known, EViT(keep=0.5, at=(0,), fuse=False)), 0 * images)
    assert given_up.sinks[1, 1, 0] > 0.95, "of the attention that is still paid"
    np.testing.assert_allclose(given_up.norms[:, 1], [1 / 8, 1, 4], rtol=1e-6, err_msg="of the patches that are left")
    pruned = see.artifacts(slim(small_vit(), Heads(share=0.34), images), images)
    assert np.isnan(pruned.sinks[0]).sum() == 4 and len(pruned.rows()) == 8


def test_refusals(images: Tensor) -> None:
    with pytest.raises(VitreousError, match="cutoff must be a norm above 0"):
        see.artifacts(small_vit(), images, cutoff=0)
