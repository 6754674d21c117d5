"""SparseFormer against its official implementation, its mechanism, and its bootstrapping from a plain ViT."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from support import fill, golden, small_vit
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.models.official import load_official, variants
from vitreous.models.sparseformer import network as sf
from vitreous.models.sparseformer.focus import look, move
from vitreous.prove.cost import macs
from vitreous.ship import ship_all


def small(style: sf.Style, seed: int = 0, **kwargs: Any) -> sf.SparseFormer:
    torch.manual_seed(seed)
    shape: dict[str, Any] = dict(widths=(64, 128), depth=1, tokens=10, points=9, conv_dim=8, repeats=2, num_classes=7)
    model = sf.SparseFormer(style, **{**shape, **kwargs})
    for name, p in model.named_parameters():
        if p.ndim > 1 and name != "initial_roi.weight":
            nn.init.normal_(p, std=0.08)  # the zero-initialised layers that steer the boxes among them
    return model.eval()


def official_state(info: dict[str, Any], grid: Tensor) -> dict[str, Tensor]:
    state = {name: torch.from_numpy(np.asarray(fill(name, tuple(shape)))) for name, shape, _ in info["state"]}
    return {**state, "initial_roi.weight": grid.detach().clone()}  # the goldens keep the constructor's boxes


def test_golden() -> None:
    """The published v1_tiny.

    With the golden's weights the boxes grow to 235 images, and the *reference itself* moves its output by 8 % when the input
    moves by 1e-7, and by 18 % between float32 and float64. So the strict comparison is in float64, where rounding is 1e-16.
    """
    info, out, x = golden("sparseformer--v1_tiny_f64")
    state = official_state(info, sf.SparseFormer(sf.V1, (64, 64), 0, 49).initial_roi.weight)
    model = load_official("v1_tiny", state)
    assert sum(p.numel() for p in model.parameters()) == info["params"] == 31_522_212
    with torch.no_grad():
        got = model.double()(x.double())[:, :128].numpy()
    assert np.abs(got - out).max() / np.abs(out).max() < 1e-4
    # The float32 golden: same state dict, same size, and a result within the reference's own rounding.
    single, rounded, _ = golden("sparseformer--v1_tiny")
    assert single["state"] == info["state"] and single["params"] == info["params"]
    assert np.abs(got - rounded).max() / np.abs(rounded).max() < 0.3


@pytest.mark.parametrize(("name", "style"), [("v1", sf.V1), ("btsp", sf.BTSP), ("clip", replace(sf.BTSP, quick_gelu=True))])
def test_small_goldens_of_both_styles(name: str, style: sf.Style) -> None:
    info, out, x = golden(f"sparseformer--{name}_mini_f64")
    points, depth = (9, 1) if name == "v1" else (16, 2)
    model = sf.SparseFormer(style, (64, 128), depth, 10, points, 16, num_classes=10, head_bias=name != "clip")
    model.load_state_dict(sf.convert(official_state(info, model.initial_roi.weight)), strict=True)
    assert sum(p.numel() for p in model.parameters()) == info["params"]
    with torch.no_grad():
        got = model.eval().double()(x.double()).numpy()
    assert np.abs(got - out).max() / np.abs(out).max() < 1e-4


def test_every_published_variant_is_registered() -> None:
    sizes = {  # parameters of the official models, in millions
        "v1_tiny": 31.522212,
        "v1_small": 47.575056,
        "v1_base": 81.076996,
        "btsp_augreg_base": 64.185448,
        "btsp_augreg_large": 212.426984,
        "btsp_openai_clip_base": 63.809664,
        "btsp_openai_clip_large": 212.188476,
    }
    for variant, size in sizes.items():
        with torch.device("meta"):  # shapes only
            model = timm.create_model(f"sparseformer_{variant}")
        assert sum(p.numel() for p in model.parameters()) == round(size * 1e6)
        assert {f"sparseformer--{variant}", f"sparseformer--sparseformer_{variant}"} <= set(variants())


def test_names_of_the_2023_release_load_too() -> None:
    model = timm.create_model("sparseformer_v1_tiny", widths=(64, 128), depth=1, tokens=4, conv_dim=8)
    new = {
        "focusing.0.adaptive_mixing.out_proj.bias": "layers.0.adaptive_mixing.tuo_proj.bias",
        "focusing.0.attn.qkv.weight": "layers.0.attn.in_proj_weight",
        "focusing.2.attn.proj.bias": "layers.2.attn.out_proj.bias",
        "blocks.0.norm1.weight": "layers.3.ln_attn.weight",
        "blocks.0.norm2.weight": "layers.3.ffn.0.weight",
        "blocks.0.mlp.fc1.weight": "layers.3.ffn.1.weight",
        "blocks.0.mlp.fc2.weight": "layers.3.ffn.3.weight",
        "initial_roi.weight": "token_roi.weight",
        "norm.bias": "head.norm.bias",
        "proj.bias": "head.classifier.bias",
    }
    state = model.state_dict()
    old = {new.get(name, name): tensor for name, tensor in state.items()}
    assert sf.convert(old).keys() == state.keys()


def test_move() -> None:
    box = torch.tensor([[[0.2, 0.4, 0.6, 0.6]]])
    by = torch.tensor([[[0.5, -1.0, float(np.log(2.0)), 0.0]]])
    assert torch.allclose(move(box, by), torch.tensor([[[0.2, 0.2, 1.0, 0.4]]]), atol=1e-6)


def test_a_token_looks_inside_its_box() -> None:
    """On a map that holds its own coordinates, samples have the box's centre as mean and a third of its size as deviation."""
    along = (torch.arange(64) + 0.5) / 64
    features = torch.stack([along.expand(64, 64), along[:, None].expand(64, 64)])[None]
    roi = torch.tensor([[[0.2, 0.3, 0.6, 0.5], [0.5, 0.3, 0.9, 0.7]]])
    offsets = torch.randn(1, 2, 16, 2, generator=torch.Generator().manual_seed(0))
    sampled = look(features, roi, offsets * 5 + 3, "border")
    assert torch.allclose(sampled.mean(2), torch.tensor([[[0.4, 0.4], [0.7, 0.5]]]), atol=1e-4)
    assert torch.allclose(sampled.std(2) * 3, torch.tensor([[[0.4, 0.2], [0.4, 0.4]]]), atol=1e-3)
    outside = torch.tensor([[[1.5, 1.5, 2.0, 2.0]]])
    assert look(features, outside, offsets[:, :1], "zeros").abs().max() == 0
    assert look(features, outside, offsets[:, :1], "border").min() > 0.9


@pytest.mark.parametrize("style", [sf.V1, sf.BTSP])
def test_boxes_start_on_a_grid_and_follow_the_image(style: sf.Style, images: Tensor) -> None:
    model = small(style, repeats=4)
    with torch.no_grad():
        _, seen = model.focus(images)
    assert len(seen) == 5 and all(boxes.shape == (6, 10, 4) for boxes in seen)
    at = 0 if style is sf.BTSP else None  # v1 moves before it looks
    start = model.initial_roi.weight
    assert torch.equal(start[:9, 2:] - start[:9, :2], torch.full((9, 2), 0.5)) and start[9].tolist() == [0, 0, 1, 1]
    if at is not None:
        assert torch.equal(seen[at][0], start)
    moved = [(b - a).abs().mean().item() for a, b in pairwise(seen)]
    assert min(moved) > 1e-4
    assert (seen[-1][0] - seen[-1][1]).abs().max() > 1e-4  # not the same for every image
    for focus in model.focusing:
        if isinstance(focus, sf.Focus) and "adjust" in focus.ops:
            nn.init.zeros_(focus.roi_adjust_module[-1].weight)
    with torch.no_grad():
        _, still = model.focus(images)
    assert all(torch.allclose(boxes[0], start, atol=1e-6) for boxes in still)


def test_repeats_share_weights_and_tokens_do_not_grow_with_the_image() -> None:
    once, twice, often = (small(sf.V1, repeats=n) for n in (1, 2, 4))
    assert sum(p.numel() for p in once.parameters()) == sum(p.numel() for p in often.parameters())
    x = torch.zeros(1, 3, 64, 64)
    assert macs(often, x) - macs(once, x) == 3 * (macs(twice, x) - macs(once, x)) > 0
    stem = [8 * 3 * 7 * 7 * (side // 2) ** 2 for side in (64, 128)]  # its convolution
    rest = [macs(once, torch.zeros(1, 3, side, side)) - cost for side, cost in zip((64, 128), stem, strict=True)]
    assert rest[0] == rest[1] > 0


@pytest.mark.parametrize("style", [sf.V1, sf.BTSP])
def test_gradients_reach_every_parameter(style: sf.Style, images: Tensor) -> None:
    model = small(style, drop_path_rate=0.1).train()
    model.blocks.eval()
    for focus in model.focusing:
        focus.eval()
    model(images).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("style", [sf.V1, sf.BTSP])
def test_contract(style: sf.Style, images: Tensor, tmp_path: Path) -> None:
    model = small(style)
    with torch.no_grad():
        logits = model(images)
        features = model.forward_features(images)
        assert features.shape == (6, 10 + style.class_token, 128)
        assert torch.equal(model.forward_head(features), logits)
        half = small(style).bfloat16()(images.bfloat16())
        assert half.dtype == torch.bfloat16 and half.isfinite().all()
    ship_all(small(style, repeats=1), [tmp_path / "m.onnx", tmp_path / "m.xml"], example=images)
    model.reset_classifier(3)
    assert model(images).shape == (6, 3)
    model.reset_classifier(0)
    assert model(images).shape == (6, 128)
    assert small(style, num_classes=0)(images).shape == (6, 128)
    assert small(style, in_chans=1)(images[:, :1]).shape == (6, 7)
    with pytest.raises(VitreousError, match="load_official"):
        timm.create_model("sparseformer_v1_tiny", pretrained=True)
    with pytest.raises(VitreousError, match="multiples of 8"):
        small(sf.BTSP, widths=(60, 128))


def test_bootstrap_inherits_and_freezes(vit: nn.Module, images: Tensor) -> None:
    model = sf.bootstrap(vit, tokens=8, keep=3, tune=1, points=9, conv_dim=8)
    source: Any = vit
    tokens = torch.randn(2, 9, 48)
    with torch.no_grad():
        expected = tokens
        for block in source.blocks[1:]:  # the first of four is truncated
            expected = block(expected)
        got = tokens
        for block in model.blocks:
            got = block(got)
        assert torch.equal(got, expected)
        assert torch.allclose(model.forward_head(expected), source.forward_head(source.norm(expected)), atol=1e-6)
        assert torch.equal(model.cls_embedding.weight, source.cls_token[0])
    assert model(images).shape == (6, 7)
    trained = {name.split(".")[0] + "." + name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name.split(".")[0] + "." + name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"blocks.1", "blocks.2", "norm.weight", "norm.bias", "proj.weight", "proj.bias"}
    assert {"focusing.0", "focusing.1", "focusing.2", "blocks.0", "cls_embedding.weight", "initial_roi.weight"} <= trained
    assert all(p.requires_grad for p in vit.parameters())
    assert len(sf.bootstrap(vit).blocks) == 3  # two thirds of four


def test_bootstrap_aligns_without_labels(vit: nn.Module, images: Tensor) -> None:
    model = sf.bootstrap(vit, tokens=8, keep=2, tune=1, points=9, conv_dim=8)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    first = sf.align(model, vit, images).item()
    for _ in range(12):
        optimizer.zero_grad()
        sf.align(model, vit, images).backward()
        optimizer.step()
    assert sf.align(model, vit, images).item() < 0.5 * first
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(p.grad is None for p in vit.parameters())


def test_bootstrap_of_other_models() -> None:
    averaged = small_vit(depth=3, global_pool="avg", class_token=False, init_values=0.1)
    model = sf.bootstrap(averaged, tokens=4, points=4, conv_dim=8)
    assert model.cls_embedding is None and model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    with pytest.raises(VitreousError, match="plain"):
        sf.bootstrap(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24))
    with pytest.raises(VitreousError, match="keep=9"):
        sf.bootstrap(averaged, keep=9)
