"""All heads of all layers, told in patches."""

from __future__ import annotations

import pytest
import timm
import torch
from support import small_vit

import vitreous as vt
from vitreous.see.look import look

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("query", ["class", 5])
def test_maps_are_the_rows_of_attention(query: str | int) -> None:
    model = small_vit()
    found = look(model, X)
    with torch.no_grad(), vt.glass(model) as g:
        out = model(X)
    h, w = found.grid
    assert len(found.layers) == len(g.attention) == 4 and torch.equal(found.out, out)
    for layer, a in zip(found.layers, g.attention, strict=True):
        row = 0 if query == "class" else 1 + 5
        expected = a[:, :, row, 1:].unflatten(-1, (h, w))
        torch.testing.assert_close(layer.maps(query), expected)


def test_without_class_token_the_mean_of_the_patches_is_shown() -> None:
    model = small_vit(class_token=False, global_pool="avg")
    found = look(model, X, [1])
    with torch.no_grad(), vt.glass(model) as g:
        model(X)
    (layer,) = found.layers
    torch.testing.assert_close(layer.maps().flatten(2), g.attention[1].mean(2))


def test_merged_tokens_share_their_attention_and_dropped_ones_ask_nothing() -> None:
    merged = vt.slim(small_vit(), vt.tokens.ToMe(r=3))
    for layer in look(merged, X).layers:
        whole = layer.maps("class").sum((2, 3)) + layer.attention[:, :, 0, 0]
        torch.testing.assert_close(whole, torch.ones_like(whole))
    dropped = look(vt.slim(small_vit(), vt.tokens.RandomChoice(keep=0.5, at=(1,))), X).layers[-1]
    asking = torch.stack([dropped.maps(i).sum((1, 2, 3)) > 0 for i in range(4)], 1)
    assert asking.any() and not asking.all()


def test_windows_say_why_not() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 1), embed_dim=24, num_heads=(2, 2)
    )
    found = look(model.eval(), torch.randn(1, 3, 56, 56))
    with pytest.raises(vt.VitreousError, match="windows"):
        found.layers[0].maps()


def test_unknown_patches_are_named() -> None:
    with pytest.raises(vt.VitreousError, match="0 to"):
        look(small_vit(), X).layers[0].maps(10_000)
