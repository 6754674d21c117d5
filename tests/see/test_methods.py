"""What every explanation keeps to, on every token layout; and what is said of those that fail the sanity check."""

from __future__ import annotations

import pytest
import timm
import torch
from support import LAYOUTS, small_vit
from torch import Tensor, nn

from vitreous import see
from vitreous.errors import VitreousError
from vitreous.see import methods

EVERY = pytest.mark.parametrize("name", see.METHODS)


@pytest.mark.parametrize("name", [n for n in see.METHODS if n != "salient_relevance"])  # which is `lrp`, and slow
@pytest.mark.parametrize("layout", ["registers", "distilled", "registers, average"])
def test_each_image_as_if_alone_behind_every_prefix(name: str, layout: str, images: Tensor) -> None:
    model, explain = LAYOUTS[layout][0](), see.METHODS[name]
    x, classes = images[:3], torch.tensor([0, 3, 6])
    maps = explain(model, x, classes)
    assert maps.shape == (3, 4, 4) and (maps >= 0).all() and torch.isfinite(maps).all() and maps.std() > 0
    assert not maps.requires_grad
    for i in (2, 0):  # a second call knows nothing of the first
        torch.testing.assert_close(explain(model, x[i : i + 1], int(classes[i]))[0], maps[i], atol=1e-5, rtol=1e-3)


@EVERY
def test_the_model_is_left_as_it_was(name: str, images: Tensor) -> None:
    model = small_vit(depth=2, proj_drop_rate=0.5).train()
    model.blocks[0].eval()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    modes, before = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    maps = see.METHODS[name](model, images[:2])
    with torch.inference_mode():
        torch.testing.assert_close(see.METHODS[name](model, images[:2]), maps)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters()) and [p.requires_grad for p in model.parameters()][-1]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled() and not images.requires_grad


@EVERY
def test_a_model_that_only_embeds(name: str, images: Tensor) -> None:
    model = small_vit(depth=2)
    model.reset_classifier(0)
    maps = see.METHODS[name](model, images[:2])
    assert maps.shape == (2, 4, 4) and maps.std() > 0


CLASSES = [n for n in see.METHODS if n not in methods.CLASSLESS]


@pytest.mark.parametrize("name", CLASSES)
def test_another_class_has_another_map(name: str, vit: nn.Module, images: Tensor) -> None:
    explain = see.METHODS[name]
    assert not torch.allclose(explain(vit, images[:2], 1), explain(vit, images[:2], 5), rtol=0.05)
    predicted = vit(images[:2]).argmax(1)
    torch.testing.assert_close(explain(vit, images[:2]), explain(vit, images[:2], predicted))
    with pytest.raises(VitreousError, match="no target 7"):
        explain(vit, images, 7)
    with pytest.raises(VitreousError, match="one for each of the 6"):
        explain(vit, images, torch.tensor([1, 2]))


@EVERY
def test_hierarchical_and_convolutional_models_or_a_reason(name: str) -> None:
    torch.manual_seed(0)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2), num_classes=5
    )
    resnet = timm.create_model("resnet18", num_classes=5)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for model, grid in ((swin, (8, 8)), (resnet, (2, 2))):
        if "cam" in name or name in ("integrated_gradients", "occlusion"):
            maps = see.METHODS[name](model.eval(), x)
            assert maps.shape[1:] == grid and (maps >= 0).all() and maps.max() > 0
        else:
            with pytest.raises(VitreousError, match=r"use see\.grad_cam|plain"):
                see.METHODS[name](model.eval(), x)


def test_an_explanation_that_fails_the_sanity_check_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"model": "vit_fashion", "correlation": 0.81, "bound": 0.5, "passes": False, "images": 16, "date": "2026-01-02"}
    measured = {"rollout": {"bundled": found, "other": {**found, "passes": True}}, "lrp": {"bundled": {**found, "passes": True}}}
    monkeypatch.setattr(methods, "sanity", lambda: measured)
    said = see.warning("rollout")
    assert said is not None and "fails the sanity check" in said and "0.81 on vit_fashion, 2026-01-02" in said
    assert see.warning("lrp") is None and see.warning("occlusion") is None


def test_what_was_measured_can_be_read() -> None:
    for method, models in methods.sanity().items():
        assert method in see.METHODS
        for found in models.values():
            assert -1 <= found["correlation"] <= 1 and found["passes"] == (found["correlation"] <= found["bound"])
