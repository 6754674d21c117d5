"""Architectures that timm keeps well, each small, with random weights: what works on them, and why the rest does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import GroupNorm1
from timm.models.gcvit import GlobalContextVit
from timm.models.metaformer import MetaFormer
from timm.models.volo import VOLO
from torch import Tensor, nn

import vitreous as vt
from vitreous.cli.systems import listed
from vitreous.quant.layers import QuantLinear
from vitreous.see import METHODS
from vitreous.ship import ship_all

CLASSES = 7
ATTENTION = ("attention", "rollout", "grad_rollout", "transformer_attribution", "lrp", "salient_relevance")
RELEVANCE = ATTENTION[3:]


@dataclass(frozen=True)
class Timm:
    """A small model of timm's, and what Vitreous cannot do with it; all else must work.

    seen: attention maps that `glass` sees in one run.
    refused: by method of `see.METHODS` or name of a step, parts of the reason given.
    """

    make: Callable[[], nn.Module]
    side: int
    seen: int
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)


def named(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: vt.open(name, num_classes=CLASSES, **kwargs)


def poolformer() -> nn.Module:
    shape: dict[str, Any] = dict(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), mlp_act=nn.GELU, norm_layers=GroupNorm1)
    plain: dict[str, Any] = dict(downsample_norm=None, mlp_bias=True, res_scale_init_values=None, use_mlp_head=False)
    return MetaFormer(num_classes=CLASSES, layer_scale_init_values=1e-5, **shape, **plain)


def all_of(names: tuple[str, ...], *reason: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(names, reason)


def not_plain(block: str, reason: str) -> dict[str, tuple[str, ...]]:
    return all_of(("EViT", "Heads"), f"'{block}'", reason)


NO_GRID = all_of(ATTENTION, "needs one grid of patches, and")
NO_ATTENTION = all_of((*ATTENTION, "EViT", "Heads"), "attention, and")
BIAS = "adds a bias for each pair of places in a fixed grid or window"
NO_QKV = "computes something else than"
HALVES: dict[str, Any] = dict(depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2))

MODELS: dict[str, Timm] = {
    "convit": Timm(
        named("convit_tiny", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, local_up_to_layer=1),
        side=32,
        seen=3,
        refused=all_of(("rollout", "grad_rollout"), "layer 'blocks.0.attn' of ConVit attends 16 × 16 where 17 tokens are")
        | all_of(RELEVANCE, NO_QKV)
        | not_plain("blocks.0", NO_QKV),
    ),
    "crossvit": Timm(
        named(
            "crossvit_9_240",
            img_size=32,
            img_scale=(1.0, 1.0),
            patch_size=(8, 16),
            embed_dim=(16, 32),
            depth=((1, 1, 0),),
            num_heads=(2, 2),
        ),
        side=32,
        seen=4,
        refused=NO_GRID
        | all_of(("grad_cam", "grad_cam_pp", "layer_cam", "eigen_cam"), "'blocks.0' of CrossVit gives no single map of places")
        | not_plain("blocks.0.blocks.0.0", "the grid of tokens changes between its stages"),
    ),
    "tnt": Timm(
        named("tnt_s_patch16_224", img_size=32, embed_dim=32, inner_dim=8, depth=2, num_heads_inner=2, num_heads_outer=2),
        side=32,
        seen=4,
        refused=NO_GRID | not_plain("blocks.0", "it does not run on a plain sequence"),
    ),
    "volo": Timm(
        lambda: VOLO([1, 1, 1, 1], 32, num_classes=CLASSES, embed_dims=[16, 32, 32, 32], num_heads=[1, 2, 2, 2]),
        side=32,
        seen=6,
        refused=NO_GRID | not_plain("network.0.0", "it does not run on a plain sequence"),
    ),
    "davit": Timm(
        named("davit_tiny", **HALVES),
        side=64,
        seen=4,
        refused=NO_GRID | not_plain("stages.0.blocks.0.0", "it does not run on a plain sequence of tokens"),
    ),
    "gcvit": Timm(
        lambda: GlobalContextVit(
            num_classes=CLASSES,
            img_size=64,
            depths=(1, 1),
            num_heads=(1, 2),
            embed_dim=16,
            window_size=(4, 4),
        ),
        side=64,
        seen=2,
        refused=NO_GRID | not_plain("stages.0.blocks.0", BIAS),
    ),
    "maxvit": Timm(
        named(
            "maxvit_tiny_tf_224",
            img_size=64,
            depths=(1, 1),
            embed_dim=(16, 32),
            stem_width=16,
            transformer_dim_head=8,
        ),
        side=64,
        seen=4,
        refused=NO_GRID | not_plain("stages.0.blocks.0.attn_block", BIAS),
    ),
    "poolformer": Timm(poolformer, side=64, seen=0, refused=NO_ATTENTION),
    "convnext": Timm(named("convnext_tiny", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)), side=64, seen=0, refused=NO_ATTENTION),
    "efficientformer": Timm(
        named("efficientformer_l1", depths=(1, 1, 1, 2), embed_dims=(16, 16, 32, 32)),
        side=224,
        seen=1,
        refused=NO_GRID | not_plain("stages.3.blocks.2", BIAS),
    ),
    "tinyvit": Timm(
        named("tiny_vit_5m_224", **HALVES),
        side=64,
        seen=1,
        refused=NO_GRID | not_plain("stages.1.blocks.0", BIAS),
    ),
    "next-vit": Timm(
        named("nextvit_small", depths=(1, 1, 5, 1)),
        side=64,
        seen=3,
        refused=NO_GRID | not_plain("stages.0.blocks.0", "it does not run on a plain sequence"),
    ),
    "halonet": Timm(
        named("halonet26t", width_factor=0.25),
        side=256,
        seen=3,
        refused=NO_GRID | not_plain("stages.2.1.self_attn", "lies in no block that has a norm of its own"),
    ),
    "vitamin": Timm(
        named("vitamin_small_224", img_size=64, depth=2),
        side=64,
        seen=2,
        refused=all_of(RELEVANCE, "no rule for 'avg_pool2d'"),
    ),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def made(name: str, n: int = 2) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = vt.open(MODELS[name].make())
    for p in model.parameters():
        if p.ndim > 1:  # timm's own are so small that two classes of a deep model hardly differ
            nn.init.trunc_normal_(p, std=0.1)
    return model, torch.randn(n, 3, MODELS[name].side, MODELS[name].side)


def works_or_says_why(name: str, what: str, use: Callable[[], None]) -> None:
    refused = MODELS[name].refused
    if what not in refused:
        use()
        return
    with pytest.raises(vt.VitreousError) as error:
        use()
    assert all(part in str(error.value) for part in refused[what]), (what, str(error.value))


def test_each_has_its_row() -> None:
    """In `systems.toml`, with variants that timm knows."""
    rows = {row["slug"]: row for row in listed("backbone")}
    for name in MODELS:
        assert len(rows[name]["variants"]) >= 2 and all(timm.is_model(v) for v in rows[name]["variants"]), name


@EVERY
def test_glass(name: str) -> None:
    model, x = made(name)
    with torch.no_grad(), vt.glass(model) as g:
        seen = model(x)
    with torch.no_grad():
        torch.testing.assert_close(seen, model(x), rtol=1e-4, atol=1e-5)
    assert len(g.attention) == MODELS[name].seen
    assert all(a.isfinite().all() and (a.sum(-1) - 1).abs().max() < 1e-4 for a in g.attention)


@EVERY
def test_explanations(name: str) -> None:
    model, x = made(name, 1)

    def explain(method: str) -> None:
        few = {"steps": 2} if method == "integrated_gradients" else {}
        heat = METHODS[method](model, x, **few)
        assert heat.ndim == 3 and len(heat) == 1 and heat.isfinite().all() and (heat >= 0).all(), method

    for method in METHODS:
        works_or_says_why(name, method, lambda method=method: explain(method))


@EVERY
def test_steps(name: str) -> None:
    model, x = made(name)
    with torch.no_grad():
        wanted = model(x)

    def quantize() -> None:
        small = vt.slim(model, vt.quant.RepQ(weights=8, activations=8), calibration=x)
        with torch.no_grad():
            assert (small(x) - wanted).norm() < 0.2 * wanted.norm()
        assert any(isinstance(m, QuantLinear) for m in small.modules())

    def prune() -> None:
        small = vt.slim(model, vt.prune.Heads(share=0.25), calibration=x)
        assert small(x).shape == wanted.shape
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())

    def shorten() -> None:
        small = vt.slim(model, vt.tokens.EViT(keep=0.5, at=(1,)))
        with vt.traced(small) as trace:
            assert small(x).shape == wanted.shape
        assert len(trace) == 1

    for what, use in {"EViT": shorten, "RepQ": quantize, "Heads": prune}.items():
        works_or_says_why(name, what, use)


@EVERY
def test_ship(name: str, tmp_path: Path) -> None:
    """To OpenVINO, by way of ONNX, for any batch."""
    model, x = made(name)
    [shipment] = ship_all(model, [tmp_path / "model.xml"], example=x)
    assert shipment.parity.worst <= 1e-3
