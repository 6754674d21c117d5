"""Transformer attribution and full LRP: against the reference, and where it is at fault."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import timm
import torch
from support import GOLDENS, filled, small_vit
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.relevance import relevance, tape
from vitreous.see.lrp import BATCH, _attribution, lrp, transformer_attribution


def published_sum(a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: shares c / y, negative ones too; then the branches are scaled so that their sums share by their size."""
    s = torch.where(y == 0, 0, r / (y + 1e-9))
    parts = [a * s, b * s]
    sums = [part.flatten(1).sum(1) for part in parts]
    whole = r.flatten(1).sum(1) / (sums[0].abs() + sums[1].abs())
    of_a, of_b = ((t.abs() * whole / t).view(-1, *[1] * (y.ndim - 1)) * part for t, part in zip(sums, parts, strict=True))
    return of_a, of_b


def published_product(a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    scale = 0.125 if y.shape[-1] == y.shape[-2] else 1.0  # of the scores; theirs are not scaled before their 1e-9 is added
    s = torch.where(y == 0, 0, r / (y + 1e-9 * scale))
    return a * (s @ b.mT), b * (a.mT @ s)


def worst(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture
def vit() -> nn.Module:
    return small_vit()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_the_reference_by_its_own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the rule for what cancels is the reference's: with its rule, its maps in double precision.

    The tolerance is what that rule makes of the 1e-9 that the reference adds here and there.
    """
    monkeypatch.setattr(tape, "sum_rule", published_sum)
    monkeypatch.setattr(tape, "product_rule", published_product)
    model = filled(timm.create_model("deit_tiny_patch16_224")).double()
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)).double()
    with np.load(GOLDENS / "see--transformer-attribution--deit.npz") as file:
        attribution, target = torch.from_numpy(file["map_f64_eps1e-6"])[:1], json.loads(bytes(file["info"]))["target_class"]
    with np.load(GOLDENS / "see--lrp-full--deit.npz") as file:
        full, passed = torch.from_numpy(file["map_f64_eps1e-6"])[:1], torch.from_numpy(file["attn_relevance_sum_f64"])[:1]
    found = relevance(model, x, target, gradients=True)
    assert worst(found.pixels.sum(1), full) < 1e-3
    assert worst(_attribution(found, (14, 14)), attribution) < 1e-3
    assert worst(torch.stack([a.sum((1, 2, 3)) for a in found.attention.values()], 1), passed) < 1e-3


def test_single_precision_is_noise_by_the_published_rule_and_enough_by_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(timm.create_model("deit_tiny_patch16_224", img_size=64, depth=6))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def loss() -> float:
        exact = relevance(copy.deepcopy(model).double(), x.double(), 281).pixels.sum(1)
        return worst(relevance(model, x, 281).pixels.sum(1), exact)

    assert loss() < 1e-4
    monkeypatch.setattr(tape, "sum_rule", published_sum)
    monkeypatch.setattr(tape, "product_rule", published_product)
    assert loss() > 1e-2


@pytest.mark.parametrize("draw", [lrp, transformer_attribution])
def test_heatmaps(draw, vit: nn.Module, images: Tensor) -> None:
    maps = draw(vit, images)
    assert maps.shape == (3, 4, 4) and (maps >= 0).all() and maps.std() > 0
    classes = vit(images).argmax(1)
    assert torch.equal(maps, draw(vit, images, classes))
    assert not torch.allclose(maps, draw(vit, images, (classes + 1) % 7))
    many = torch.cat([images, images])
    assert worst(draw(vit, many)[3:], maps) < 1e-5, "more images than go together"
    with torch.inference_mode():
        assert torch.equal(maps, draw(vit, images))


def test_what_a_patch_did_is_seen_there() -> None:
    """A model that reads one patch: all relevance lies on it."""
    model = small_vit(depth=1, global_pool="avg", class_token=False, pos_embed="none")
    x = torch.zeros(1, 3, 32, 32)
    x[:, :, 8:16, 16:24] = 1
    with torch.no_grad():
        model.patch_embed.proj.bias.zero_()
        for p in (model.blocks[0].attn.proj, model.blocks[0].mlp.fc2):
            p.weight.zero_()
            p.bias.zero_()
    maps = lrp(model, x, 3)
    assert maps[0, 1, 2] / maps.sum() > 0.999


def test_bad_input(vit: nn.Module, images: Tensor) -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1))
    for draw in (lrp, transformer_attribution):
        with pytest.raises(VitreousError, match="no target 7"):
            draw(vit, images, 7)
        with pytest.raises(VitreousError, match="one for each of the 3"):
            draw(vit, images, torch.tensor([1, 2]))
        with pytest.raises(VitreousError, match="batch axis"):
            draw(vit, images[0])
        with pytest.raises(VitreousError, match="plain"):
            draw(swin, torch.randn(1, 3, 64, 64))


def test_a_target_that_fits_a_part_of_the_images_alone_is_refused(vit: nn.Module) -> None:
    """Images are explained a few at a time: a target for one such part must not be taken for each of them."""
    x = torch.randn(2 * BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for explain in (lrp, transformer_attribution):
        with pytest.raises(VitreousError, match=f"each of the {2 * BATCH} images, not int64"):
            explain(vit, x, torch.zeros(BATCH, dtype=torch.long))
