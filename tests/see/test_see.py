"""Explanations: right for batches, frozen and slimmed models, every token layout; an error where they would mislead."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from support import LAYOUTS, from_timm, pooled, small_vit
from torch import Tensor, nn

from vitreous import see
from vitreous.blocks import traced
from vitreous.errors import VitreousError
from vitreous.glass import glass
from vitreous.quant import RepQ
from vitreous.see.rollout import multiply
from vitreous.steps import Step, slim
from vitreous.tokens import EViT, ToMe

METHODS: dict[str, Callable[..., Tensor]] = {
    "attention": see.attention,
    "rollout": see.rollout,
    "grad_rollout": see.grad_rollout,
    "grad_cam": see.grad_cam,
    "grad_cam_pp": see.grad_cam_pp,
    "layer_cam": see.layer_cam,
    "eigen_cam": see.eigen_cam,
}
CAMS = (see.grad_cam, see.grad_cam_pp, see.layer_cam, see.eigen_cam)
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SAME = dict(atol=1e-6, rtol=1e-4)


def product(model: nn.Module, x: Tensor, prefix: int, class_row: bool) -> Tensor:
    """Rollout as the paper writes it: whole matrices, first layer first, and on through each reduction."""
    with torch.no_grad(), traced(model) as trace, glass(model) as g:
        model(x)
    total = torch.eye(g.attention[0].shape[-1])
    for view in g.views:
        assert view.attention is not None
        a = view.attention.mean(1) + torch.eye(view.attention.shape[-1])
        total = a / a.sum(-1, keepdim=True) @ total
        for r in trace:
            if f"{r.layer}.attn" == view.name:
                total = r.matrix() @ total
    return read_row(total, prefix, class_row)[:, prefix:].unflatten(1, (4, 4))


def read_row(a: Tensor, prefix: int, class_row: bool) -> Tensor:
    """What is read of `[B, N, N]`: the class token and, where there is one, the distillation token alike; else the patches."""
    return (a[:, : 2 if prefix == 2 else 1] if class_row else a[:, prefix:]).mean(1)


# ---- plain models


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patches_are_found_behind_every_prefix(layout: str, images: Tensor) -> None:
    make, prefix, class_row = LAYOUTS[layout]
    model = make()
    with torch.no_grad(), glass(model) as g:
        model(images)
    last = g.attention[-1].mean(1)
    row = read_row(last, prefix, class_row)
    same = dict(atol=2e-2, rtol=0.2) if layout == "distilled" else SAME  # two heads are not read quite alike
    torch.testing.assert_close(see.attention(model, images), row[:, prefix:].unflatten(1, (4, 4)), **same)
    torch.testing.assert_close(see.rollout(model, images), product(model, images, prefix, class_row), **same)
    assert see.grad_cam(model, images).shape == (6, 4, 4)


@EVERY
def test_rows_and_columns_of_a_grid_that_is_not_square(method: Callable[..., Tensor]) -> None:
    model = from_timm("vit_tiny_patch16_224", img_size=(32, 48))
    x = torch.randn(2, 3, 32, 48)
    heat = method(model, x)
    assert heat.shape == (2, 4, 6) and (heat >= 0).all() and heat.max() > 0
    # A model of equal weights that takes other sizes must agree, and must read its grid from the image.
    free = from_timm("vit_tiny_patch16_224", img_size=(32, 48), dynamic_img_size=True)
    free.load_state_dict(model.state_dict())
    torch.testing.assert_close(method(free, x), heat, **SAME)
    assert method(free, torch.randn(2, 3, 16, 96)).shape == (2, 2, 12)  # as many patches, laid out otherwise


def test_attention_of_any_layer_head_and_query(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad(), glass(vit) as g:
        vit(images)
    for layer, head, query in [(0, 2, "class"), (-2, 0, 7), (3, "mean", 15), (1, -1, 0)]:
        a = g.attention[layer]
        a = a.mean(1) if head == "mean" else a[:, head]
        expected = a[:, 0 if query == "class" else 1 + int(query), 1:].unflatten(1, (4, 4))
        torch.testing.assert_close(see.attention(vit, images, layer, head, query), expected, **SAME)


def test_rollout_fuses_and_discards(vit: nn.Module, images: Tensor) -> None:
    plain = see.rollout(vit, images)
    assert not torch.allclose(see.rollout(vit, images, fuse="max"), plain)
    assert not torch.allclose(see.rollout(vit, images, fuse="min"), plain)
    torch.testing.assert_close(see.rollout(vit, images, discard=1e-9), plain)
    # What is discarded depends on the image alone, not on the others in the batch.
    some = see.rollout(vit, images, discard=0.6)
    assert (some == 0).any() or not torch.allclose(some, plain)
    torch.testing.assert_close(see.rollout(vit, images[3:4], discard=0.6)[0], some[3], **SAME)
    # Nearly everything goes, but prefix tokens keep each other: no row is empty, and no value NaN.
    assert torch.isfinite(see.rollout(from_timm("vit_small_patch14_reg4_dinov2"), images, discard=0.99)).all()


def test_rollout_through_attention_pooling(images: Tensor) -> None:
    model = from_timm("vit_base_patch16_siglip_224")
    with torch.no_grad(), glass(model) as g:
        model(images)
    total = torch.eye(16)
    for a in g.attention[:-1]:
        a = a.mean(1) + torch.eye(16)
        total = a / a.sum(-1, keepdim=True) @ total
    expected = (g.attention[-1].mean(1) @ total).view(6, 4, 4)
    torch.testing.assert_close(see.rollout(model, images), expected, **SAME)
    torch.testing.assert_close(see.attention(model, images), g.attention[-1].mean(1).view(6, 4, 4), **SAME)
    assert see.grad_cam(model, images).max() > 0


def test_grad_cam_is_what_autograd_gives_at_the_last_norm1(images: Tensor) -> None:
    model = small_vit()
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    handle = model.blocks[-1].norm1.register_forward_hook(keep)
    target = torch.tensor([0, 3, 6, 1, 1, 2])
    model(images).gather(1, target[:, None]).sum().backward()
    handle.remove()
    (places,) = kept
    assert places.grad is not None
    weights = places.grad[:, 1:].mean(1, keepdim=True)
    expected = (weights * places[:, 1:]).sum(2).relu().view(6, 4, 4).detach()
    model.zero_grad()
    torch.testing.assert_close(see.grad_cam(model, images, target), expected, **SAME)
    assert all(p.grad is None for p in model.parameters())
    predicted = model(images).argmax(1)
    torch.testing.assert_close(see.grad_cam(model, images), see.grad_cam(model, images, predicted))
    assert not torch.allclose(see.grad_cam(model, images, 2), see.grad_cam(model, images, 5))


@EVERY
@pytest.mark.parametrize("make", [small_vit, lambda: slim(small_vit(), EViT(keep=0.5)), lambda: slim(small_vit(), ToMe(r=3))])
def test_batches_frozen_weights_no_grad_kernels_and_repetition(
    method: Callable[..., Tensor], make: Callable[[], nn.Module], images: Tensor
) -> None:
    model = make()
    heat = method(model, images)
    assert heat.shape == (6, 4, 4) and (heat >= 0).all() and not heat.requires_grad
    assert (heat.flatten(1).max(1).values > 0).all() or method in CAMS
    torch.testing.assert_close(method(model, images[4:5])[0], heat[4], **SAME)
    assert torch.equal(method(model, images), heat)
    with torch.no_grad():
        assert torch.equal(method(model, images), heat)
    with torch.inference_mode():
        assert torch.equal(method(model, images), heat)
    model.requires_grad_(False)
    assert torch.equal(method(model, images), heat)
    assert torch.is_grad_enabled()
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(method(model, images), heat, **SAME)


@EVERY
def test_a_model_in_training_is_looked_at_in_eval_mode_and_left_so(method: Callable[..., Tensor], images: Tensor) -> None:
    model = small_vit(proj_drop_rate=0.5, drop_path_rate=0.5)
    heat = method(model, images)
    model.train()
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    torch.testing.assert_close(method(model, images), heat)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "cait_xxs24_224"])
def test_models_whose_blocks_are_not_plain(name: str, images: Tensor) -> None:
    model = from_timm(name)
    for method in (see.attention, see.grad_cam):
        assert method(model, images).shape == (6, 4, 4)
    if name.startswith("beit"):
        torch.testing.assert_close(see.rollout(model, images), product(model, images, 1, False), **SAME)
    else:  # the class token joins after the patch blocks
        with pytest.raises(VitreousError, match="blocks_token_only"):
            see.rollout(model, images)


def test_torchvision(images: Tensor) -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64).eval()
    nn.init.normal_(model.heads.head.weight, std=0.2)
    for method in METHODS.values():
        heat = method(model, images)
        assert heat.shape == (6, 4, 4) and heat.max() > 0


def test_grad_cam_of_convolutions_and_stages(images: Tensor) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 96)
    assert see.grad_cam(timm.create_model("resnet18", num_classes=5), x).shape == (2, 2, 3)
    resnet = torchvision.models.resnet18(num_classes=5)
    assert see.grad_cam(resnet, x, layer="layer4").shape == (2, 2, 3)
    with pytest.raises(VitreousError, match="layer4"):
        see.grad_cam(resnet, x)
    swin = timm.create_model(  # its stages give channels last
        "swin_tiny_patch4_window7_224",
        img_size=(32, 64),
        window_size=4,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(1, 2),
        num_classes=5,
    )
    assert see.grad_cam(swin, torch.randn(2, 3, 32, 64)).shape == (2, 4, 8)


# ---- slimmed models

SLIMMED: dict[str, list[Step]] = {
    "EViT": [EViT(keep=0.6)],
    "EViT, dropping": [EViT(keep=0.6, fuse=False)],
    "ToMe": [ToMe(r=3)],
    "quantized": [EViT(keep=0.6), RepQ()],
}


@pytest.mark.parametrize("steps", SLIMMED.values(), ids=SLIMMED)
@pytest.mark.parametrize("layout", ["class token", "registers", "average"])
def test_rollout_goes_on_through_reductions(steps: list[Step], layout: str, images: Tensor) -> None:
    make, prefix, class_row = LAYOUTS[layout]
    small = slim(make(), steps, images)
    heat = see.rollout(small, images)
    torch.testing.assert_close(heat, product(small, images, prefix, class_row), **SAME)
    assert not torch.allclose(heat, see.rollout(make(), images), rtol=1e-2)


@EVERY
def test_a_reduction_that_keeps_all_changes_nothing(method: Callable[..., Tensor], vit: nn.Module, images: Tensor) -> None:
    small = slim(vit, [EViT(keep=1.0)])
    torch.testing.assert_close(method(small, images), method(vit, images), **SAME)
    assert see.survival(small, images) == [] and see.survival(vit, images) == []


@pytest.mark.parametrize("fuse", [True, False])
def test_survival_and_maps_of_kept_and_dropped_patches(vit: nn.Module, images: Tensor, fuse: bool) -> None:
    small = slim(vit, EViT(keep=0.5, at=(1,), fuse=fuse))
    with torch.no_grad(), glass(vit) as g:
        vit(images)
    ((layer, groups),) = see.survival(small, images)
    assert layer == "blocks.1" and groups.shape == (6, 4, 4) and groups.dtype == np.int64
    scores = g.attention[1].mean(1)[:, 0, 1:]
    kept = torch.zeros_like(scores).scatter(1, scores.topk(8).indices, 1).bool().view(6, 4, 4)
    assert ((groups >= 0) == kept.numpy()).all()
    assert all(sorted(row[row >= 0]) == list(range(1, 9)) for row in groups.reshape(6, -1))

    with torch.no_grad(), glass(small) as h:
        small(images)
    last = h.attention[-1].mean(1)[:, 0]  # [B, class token, 8 kept, and the rest if fused]
    heat = see.attention(small, images)
    token = torch.from_numpy(groups).clamp_min(0).flatten(1)
    torch.testing.assert_close(heat[kept], last.gather(1, token).view(6, 4, 4)[kept], **SAME)
    share = torch.where(kept.flatten(1), 0.0, scores)
    share = share / share.sum(1, keepdim=True)
    for b in range(6):
        rest = (last[b, -1] * share[b]).view(4, 4) if fuse else torch.zeros(4, 4)
        torch.testing.assert_close(heat[b][~kept[b]], rest[~kept[b]], **SAME)
    # Before the reduction nothing differs from the original.
    torch.testing.assert_close(see.attention(small, images, layer=1), see.attention(vit, images, layer=1), **SAME)
    # A patch that was given up asks nothing; another still does.
    gone = int((~kept[0]).flatten().nonzero()[0])
    assert see.attention(small, images[:1], query=gone).sum() == 0
    stays = int(kept[0].flatten().nonzero()[0])
    assert see.attention(small, images[:1], query=stays).sum() > 0

    cam = see.grad_cam(small, images, target=1)
    dropped = cam[~kept].view(6, -1)
    if fuse:  # the rest token's value is shared out by weight, where it is positive
        whole = dropped.sum(1, keepdim=True)
        torch.testing.assert_close(dropped, whole * share[~kept.flatten(1)].view(6, -1), **SAME)
        assert (whole > 0).any()
    else:
        assert (dropped == 0).all()
    assert cam[kept].max() > 0


def test_merged_patches_share_a_number_and_a_value(vit: nn.Module, images: Tensor) -> None:
    small = slim(vit, ToMe(r=3))
    found = see.survival(small, images)
    assert [layer for layer, _ in found] == [f"blocks.{i}" for i in range(4)]
    for i, (_, groups) in enumerate(found):
        assert all(len(np.unique(g)) == 16 - 3 * (i + 1) for g in groups)
        assert (groups >= 1).all()  # never into the class token
    with torch.no_grad(), glass(small) as g:
        small(images)
    before = torch.from_numpy(found[2][1]).flatten(1)  # the tokens that the last layer attends to
    heat, cam = see.attention(small, images).flatten(1), see.grad_cam(small, images, target=1).flatten(1)
    last = g.attention[-1].mean(1)[:, 0]
    summed = torch.zeros_like(last).scatter_add(1, before, heat)
    torch.testing.assert_close(summed[:, 1:], last[:, 1:], **SAME)
    for b in range(6):
        for token in before[b].unique():
            members = before[b] == token
            assert heat[b, members].unique().numel() == 1 or np.ptp(heat[b, members].numpy()) < 1e-6
            assert np.ptp(cam[b, members].numpy()) < 1e-6


def test_survival_through_several_reductions(images: Tensor) -> None:
    small = slim(small_vit(depth=8), EViT(keep=0.7))
    found = see.survival(small, images)
    assert [layer for layer, _ in found] == ["blocks.2", "blocks.4", "blocks.6"]
    left = [(groups >= 0).reshape(6, -1).sum(1) for _, groups in found]
    assert (left[0] == 12).all() and (left[1] <= 10).all() and (left[2] <= left[1]).all()
    for (_, a), (_, b) in pairwise(found):
        assert not ((a < 0) & (b >= 0)).any(), "what was given up does not come back"


# ---- what cannot work says so


def refused(match: str, ask: Callable[[], Any]) -> None:
    with pytest.raises(VitreousError, match=match):
        ask()


def test_errors(vit: nn.Module, images: Tensor) -> None:
    resnet = timm.create_model("resnet18", num_classes=5)
    pvt = timm.create_model("pvt_v2_b0", num_classes=5, depths=(1, 1, 1, 1))
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(1, 2),
        num_classes=5,
    )
    for method in (see.attention, see.rollout, see.survival):
        refused("use see.grad_cam", lambda m=method: m(resnet, images))
        refused("one grid of patches", lambda m=method: m(pvt, images))
    refused("windows.*use see.grad_cam", lambda: see.rollout(swin, images))
    refused("windows.*use see.grad_cam", lambda: see.attention(swin, images))
    for method in METHODS.values():
        refused(r"\[B, C, H, W\].*x\[None\]", lambda m=method: m(vit, images[0]))
        refused(r"does not run on images \[1, 3, 40, 40\]", lambda m=method: m(vit, torch.randn(1, 3, 40, 40)))
    refused("4 attention layers", lambda: see.attention(vit, images, layer=4))
    refused("heads 0 to 2", lambda: see.attention(vit, images, heads=3))
    refused("no query 16", lambda: see.attention(vit, images, query=16))
    refused("mean, max or min", lambda: see.rollout(vit, images, fuse="median"))
    refused("discard", lambda: see.rollout(vit, images, discard=1.0))
    refused("classes 0 to 6", lambda: see.grad_cam(vit, images, target=7))
    refused("one for each of the 6", lambda: see.grad_cam(vit, images, target=torch.tensor([1, 2])))
    refused("no layer 4", lambda: see.grad_cam(vit, images, layer=4))
    refused("did you mean blocks.1", lambda: see.grad_cam(vit, images, layer="block.1"))
    refused("no places", lambda: see.grad_cam(vit, images, layer="head"))


def test_a_layer_without_gradient_is_an_error_and_never_a_map_of_zeros(images: Tensor) -> None:
    for layer in ("blocks.3", "norm"):
        refused("no gradient.*after the last attention", lambda at=layer: see.grad_cam(small_vit(), images, layer=at))
    assert see.grad_cam(pooled(), images, layer="blocks.3").max() > 0  # here the patches are what is read
    assert see.grad_cam(small_vit(), images, layer="blocks.2").max() > 0
    headless = small_vit()
    nn.init.zeros_(headless.head.weight)
    refused("head is all zero", lambda: see.grad_cam(headless, images))


def test_quantized_models_are_explained_much_as_before(vit: nn.Module, images: Tensor) -> None:
    small = slim(vit, RepQ(), images)
    for method in (see.attention, see.rollout, lambda m, x: see.grad_cam(m, x, target=2)):
        before, after = method(vit, images), method(small, images)
        assert not torch.equal(before, after)
        assert np.corrcoef(before.flatten(), after.flatten())[0, 1] > 0.95


def test_a_model_without_classes_is_explained_by_its_features(images: Tensor) -> None:
    model = small_vit()
    model.reset_classifier(0)
    nn.init.normal_(model.norm.weight)  # else all features have one norm, and another score is explained
    model.requires_grad_(False)
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        kept.append(out.requires_grad_())
        return kept[0]

    handle = model.blocks[-1].norm1.register_forward_hook(keep)
    slopes = torch.autograd.grad(model(images).square().sum(), kept)[0][:, 1:]
    handle.remove()
    expected = (slopes.mean(1, keepdim=True) * kept[0][:, 1:]).sum(2).relu().view(6, 4, 4).detach()
    torch.testing.assert_close(see.grad_cam(model, images), expected, atol=1e-5, rtol=1e-3)
    assert see.grad_cam(model, images, target=5).max() > 0


def test_pooling_by_several_queries_is_read_by_their_mean() -> None:
    """By hand: the queries read [0, ½, ½] on average; half of the third token is its own, half the first's."""
    layer = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [1, 0, 0]]])
    queries = torch.tensor([[[0.0, 0, 1], [0, 1, 0]]])
    anatomy: Any = SimpleNamespace(prefix=0, blocks=[], kind="a model")
    layers = [("first", layer), ("pooling", queries)]
    heat = multiply(torch.zeros(1, 3, 4, 4), layers, [], anatomy, (1, 3), torch.ones(1, 1), 0.0, "rollout")
    assert heat.tolist() == [[[0.25, 0.5, 0.25]]]
