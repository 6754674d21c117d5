"""DuoFormer: regions across scales, and attention within and between them."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from small_models import SMALL

from vitreous import VitreousError
from vitreous.models.duoformer import regions


def test_a_region_has_the_same_place_in_every_scale() -> None:
    """Its tokens row by row, but column by column in 2 × 2."""
    for k, order in ((1, [0]), (2, [0, 6, 1, 7]), (4, [*range(4), *range(12, 16), *range(24, 28), *range(36, 40)])):
        side = 3 * k
        found = regions(torch.arange(side * side).view(1, 1, side, side), 3)[0, :, :, 0]
        corners = (torch.arange(3)[:, None] * side * k + torch.arange(3) * k).flatten()
        assert torch.equal(found, corners[:, None] + torch.tensor(order))


def test_scales_meet_within_regions_and_regions_behind_them() -> None:
    model = cast(Any, SMALL["duoformer"].make())
    seen: dict[str, torch.Tensor] = {}
    model.scale_blocks.register_forward_hook(lambda _, given, out: seen.update(scales=given[0], out=out))
    model.blocks.register_forward_hook(lambda _, given, __: seen.update(patches=given[0]))
    with torch.no_grad():
        model(SMALL["duoformer"].images(2))
    assert seen["scales"].shape == (2 * 4, 1 + 1 + 4 + 16, 32) and seen["patches"].shape == (2, 5, 32)
    first = seen["out"].unflatten(0, (2, 4))[:, :, 0]
    torch.testing.assert_close(seen["patches"][:, 1:], first + model.pos_embed[:, 1:])
    out, changed = seen["out"], seen["scales"].clone()
    changed[0, -1] += torch.randn(32)  # the finest scale of one region alone
    with torch.no_grad():
        moved = (model.scale_blocks(changed) - out).abs().amax((1, 2)) > 1e-6
    assert moved.tolist() == [True] + [False] * 7


def test_scale_tokens_of_channels_are_each_regions_own() -> None:
    model = cast(Any, SMALL["duoformer channel"].make())
    widths = model.backbone.feature_info.channels()
    maps = [torch.randn(2, c, s, s) for c, s in zip(widths, (16, 8, 4, 2), strict=True)]
    assert model.channel_token(maps).shape == (2, 4, 1, 32)
    assert isinstance(cast(Any, SMALL["duoformer"].make()).channel_token, torch.nn.Parameter)


@pytest.mark.parametrize("wrong", [dict(scales=5), dict(scale_token="mean"), dict(img_size=100)])
def test_what_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(VitreousError, match="DuoFormer takes"):
        timm.create_model("duoformer_resnet50_2scales", **wrong)


def test_it_is_made_for_224_pixels_by_default() -> None:
    with torch.device("meta"):
        model = cast(Any, timm.create_model("duoformer_resnet18_4scales", depth=1, embed_dim=24, num_heads=2))
    assert model.size == (224, 224) and model.pos_embed.shape == (1, 50, 24)
