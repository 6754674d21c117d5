"""SiT and its teacher LV-ViT: what the official code computes, and what every architecture must do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import shapes
import timm
import torch
from support import golden, official_state
from torch import Tensor, nn

from vitreous import VitreousError, read, slim, traced
from vitreous.models import sit
from vitreous.models.official import load_official, variants
from vitreous.prove.cost import macs
from vitreous.see import rollout
from vitreous.ship import ship_all
from vitreous.tokens import EViT

SMALL: dict[str, Any] = dict(img_size=64, embed_dim=48, depth=4, num_heads=3, stage_blocks=(1, 1, 2), num_classes=7)


def small(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("sit_lvvit_tiny", **{**SMALL, **kwargs})
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_official_output() -> None:
    info, expected, x = golden("sit--tiny")
    state = official_state(info)
    model = load_official("sit--tiny", state, **info["kwargs"])
    assert sum(p.numel() for p in model.parameters()) == info["params"]
    with torch.no_grad():
        out = model(x)[:, : expected.shape[1]].numpy()
    assert abs(out - expected).max() <= 1e-4 * abs(expected).max()
    with pytest.raises(VitreousError, match="do not fit"):
        load_official("sit--tiny", {**state, "left.over": state["cls_token"]})
    with pytest.raises(VitreousError, match="do not fit"):
        load_official("sit--tiny", {k: v for k, v in state.items() if k != "tsm.0.scale"})


@pytest.mark.parametrize(
    ("name", "millions", "giga"),
    [
        ("sit_lvvit_tiny", 15.9, 1.0),
        ("sit_lvvit_xsmall", 25.6, 1.5),
        ("sit_lvvit_small", 25.6, 4.0),
        ("sit_lvvit_medium", 55.6, 8.1),
        ("sit_lvvit_large", 148.2, 34.4),
        ("lvvit_tiny", 15.7, 3.5),
        ("lvvit_small", 25.4, 5.5),
        ("lvvit_medium", 55.2, 11.9),
        ("lvvit_large", 147.0, 56.1),
    ],
)
def test_published_sizes(name: str, millions: float, giga: float) -> None:
    """Parameters without the reverse modules, and MACs, of the README's table (the aux head counts in it)."""
    model = shapes.on_paper(name)
    parameters = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("rtsm"))
    assert parameters / 1e6 == pytest.approx(millions, rel=0.015)
    assert shapes.macs(model) / 1e9 == pytest.approx(giga, rel=0.06)
    variant = name.removeprefix("sit_lvvit_")
    assert f"sit--{variant}" in variants()


def test_slimming_is_what_it_costs_less_by(images: Tensor) -> None:
    assert macs(small(), images[:1]) < 0.75 * macs(small(distillation_type="none"), images[:1])
    with torch.no_grad(), traced(model := small()) as trace:
        assert model.forward_features(images).shape == (3, 1 + 4, 48)
    assert [r.tokens - 1 for r in trace] == [8, 4]
    with torch.no_grad():
        assert small(distillation_type="none").forward_features(images).shape == (3, 17, 48)


def test_residual_branches_are_divided(images: Tensor) -> None:
    model = small(depth=1, stage_blocks=(1,))
    block = model.get_submodule("blocks.0")
    x = torch.randn(2, 5, 48)
    with torch.no_grad():
        y = x + block.attn(block.norm1(x)) / 2
        torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)) / 2)


def test_stems() -> None:
    x = torch.randn(2, 3, 32, 48)
    for kind, layers in (("4c", 4), ("6c", 6), ("plain", 1)):
        stem = sit.Stem(kind, (32, 48), 16, 3, 48)
        assert sum(isinstance(m, nn.Conv2d) for m in stem) == layers
        assert stem(x).shape == (2, 6, 48)
        assert not isinstance(list(stem)[-1], nn.GELU)


def test_backward_reaches_all_that_forward_uses(images: Tensor) -> None:
    model = small().train()
    model(images).square().sum().backward()
    without = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is None}
    assert without == {"aux_head", "rtsm"}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_heads(images: Tensor) -> None:
    model: Any = small()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        assert features.shape == (3, 48)
        model.reset_classifier(0)
        assert torch.equal(model(images), features)
        assert small(num_classes=0)(images).shape == (3, 48)
        model.reset_classifier(5)
        assert model(images).shape == (3, 5) and model.get_classifier().out_features == 5
    assert not any(p.requires_grad for p in model.aux_head.parameters())
    again = small(num_classes=5)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_low_precision_and_export(images: Tensor, tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        assert torch.isfinite(copy.deepcopy(model).bfloat16()(images.bfloat16())).all()
    for made in ship_all(model, [tmp_path / "m.onnx", tmp_path / "m.xml"], example=images, tolerance=1e-3):
        assert made.parity.agreement == 1


def test_rooms_work_on_it(images: Tensor) -> None:
    """Its blocks are plain and its slimming is traced, so that steps and explanations take it as it is."""
    model = small()
    anatomy = read(model)
    assert anatomy.plain and anatomy.grid == (4, 4) and anatomy.prefix == 1 and anatomy.classifier == "head"
    assert rollout(model, images).shape == (3, 4, 4)
    with torch.no_grad():
        assert torch.isfinite(slim(model, EViT(keep=0.5, at=(3,)))(images)).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(distillation_type="soft"), "distillation_type must be"),
        (dict(depth=5), "must add up to the depth 5"),
        (dict(img_size=60), "do not divide"),
        (dict(patch_size=8), "has patches of 16"),
        (dict(keeping_ratio=0.0), "keeping_ratio must lie"),
    ],
)
def test_refusals(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(VitreousError, match=message):
        small(**wrong)


def test_other_images_are_refused(images: Tensor) -> None:
    with pytest.raises(VitreousError, match="built for images of"):
        small()(images[..., :48])
    with pytest.raises(VitreousError, match="class token"):
        small().reset_classifier(3, global_pool="avg")
