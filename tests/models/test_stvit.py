"""STViT-R: what the official code computes, and what every architecture must do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapes
import timm
import torch
import torch.nn.functional as F
from support import fill, golden
from torch import Tensor, nn

from vitreous import VitreousError
from vitreous.models import stvit
from vitreous.models.official import load_official, variants
from vitreous.ship import ship_all

FLAGS = ("use_global", "use_conv_pos", "relative_pos", "shortcut")
SMALL: dict[str, Any] = dict(embed_dim=16, depths=(1, 1, 6, 1), num_heads=(1, 2, 4, 8), num_classes=7, drop_path_rate=0.0)


def official_state(info: dict[str, Any]) -> dict[str, Tensor]:
    """The golden's weights under the official names; what constructors compute is zero."""
    return {
        name: torch.zeros(shape, dtype=torch.long) if kind == "fixed" else torch.from_numpy(np.asarray(fill(name, tuple(shape))))
        for name, shape, kind in info["state"]
    }


def small(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("stvit_r_swin_tiny", **{**SMALL, **kwargs})
    for p in model.parameters():
        nn.init.normal_(p, std=0.15) if p.ndim > 1 else None
    for name, p in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(p, 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def test_official_output() -> None:
    info, expected, x = golden("stvit--r_swin_s")
    state = official_state(info)
    model = load_official("stvit--r_swin_s", state)
    assert sum(p.numel() for p in model.parameters()) == info["params"]
    with torch.no_grad():
        out = model(x)[:, : expected.shape[1]].numpy()
    assert abs(out - expected).max() <= 1e-4 * abs(expected).max()
    with pytest.raises(VitreousError, match="do not fit"):
        load_official("stvit--r_swin_s", {k: v for k, v in state.items() if k != "layers.2.blocks.1.layer_scale_1"})


@pytest.mark.parametrize(
    ("name", "variant", "parameters", "giga"),
    [
        ("tiny", "t", 28_320_214, None),
        ("tiny_c24", "t_c24", 28_330_432, None),
        ("small", "s", 49_625_518, 5.83),
        ("base", "b", 87_812_336, 10.26),
        ("large", "l", 196_653_940, None),
    ],
)
def test_published_sizes(name: str, variant: str, parameters: int, giga: float | None) -> None:
    """Parameters and MACs of the official logs; those of the other configurations are counted."""
    model = shapes.on_paper(f"stvit_r_swin_{name}")
    assert sum(p.numel() for p in model.parameters()) == parameters
    if giga is not None:
        assert shapes.macs(model) / 1e9 == pytest.approx(giga, rel=0.02)
    assert f"stvit--r_swin_{variant}" in variants()


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_official_tensors(flag: str, images: Tensor) -> None:
    """Every flag changes the answer, and adds the tensors that it has in the official code."""
    names = {
        "use_global": ["layers.2.centers"],
        "use_conv_pos": ["layers.2.blocks.1.conv_pos.weight", "layers.2.blocks.1.conv_pos.bias"],
        "relative_pos": [f"layers.2.blocks.{i}.attn.relative_position_bias_table" for i in (3, 4)],
        "shortcut": [],
    }[flag]
    plain, model = small(), small(**{flag: True})
    assert sorted(model.state_dict().keys() - plain.state_dict().keys()) == sorted(names)
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad():
        assert (model(images) - plain(images)).abs().max() > 1e-4
    theirs = {
        "layers.2.semantic_token2": "layers.2.centers",
        "layers.2.blocks.1.conv_pos.proj.0.weight": "layers.2.blocks.1.conv_pos.weight",
        "layers.2.blocks.4.attn.relative_position_bias_table": "layers.2.blocks.4.attn.relative_position_bias_table",
        "layers.2.downsample.norm.weight": "layers.3.downsample.norm.weight",
    }
    assert list(stvit.convert(dict.fromkeys(theirs, torch.zeros(1)))) == list(theirs.values())


def test_semantic_tokens_start_as_adaptive_maxima() -> None:
    block: Any = small().get_submodule("layers.2.blocks.1")
    x = torch.randn(2, 7, 7, 5)
    expected = F.adaptive_max_pool2d(x.permute(0, 3, 1, 2), 3).permute(0, 2, 3, 1)
    torch.testing.assert_close(block._pool(x), expected)
    x = torch.randn(2, 8, 8, 5)
    torch.testing.assert_close(block._pool(x), F.adaptive_max_pool2d(x.permute(0, 3, 1, 2), 3).permute(0, 2, 3, 1))


def test_keys_are_overlapping_windows() -> None:
    block: Any = small().get_submodule("layers.2.blocks.1")
    x = torch.randn(2, 14, 14, 5)
    unfolded = F.unfold(x.permute(0, 3, 1, 2), 10, stride=4).unflatten(1, (5, 100)).permute(0, 3, 2, 1).flatten(0, 1)
    assert torch.equal(block._surroundings(x), unfolded)


def test_third_stage_thinks_in_few_tokens_and_restores_the_image(images: Tensor) -> None:
    model = small()
    seen: list[tuple[int, ...]] = []
    stage: Any = model.get_submodule("layers.2")
    hooks = [b.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[1:-1]))) for b in stage.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    assert seen == [(14, 14), (36,), (36,), (36,), (36,), (196,)]


def test_recovery_reads_semantic_tokens(images: Tensor) -> None:
    """Image tokens change in the last block of a cycle only by what they read from semantic tokens."""
    model = small()
    stage: Any = model.get_submodule("layers.2")
    with torch.no_grad():
        before = model(images)
        stage.blocks[3].mlp.fc2.bias += torch.linspace(-1, 1, 64)
        assert (model(images) - before).abs().max() > 1e-4
        stage.blocks[5].ls1.gamma.zero_()
        deaf = model(images)
        stage.blocks[3].mlp.fc2.bias -= torch.linspace(-2, 2, 64)
        torch.testing.assert_close(model(images), deaf)


def test_backward_reaches_everything(images: Tensor) -> None:
    model = small(**dict.fromkeys(FLAGS, True)).train()
    model(images).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        # keys that all move alike move no softmax, and batch statistics swallow what is added before them
        assert p.grad.abs().max() > 0, name


def test_heads_and_dense_features(images: Tensor) -> None:
    model: Any = small()
    with torch.no_grad():
        dense = model.forward_features(images)
        assert dense.shape == (2, 7, 7, 128)
        features = model.forward_head(dense, pre_logits=True)
        assert torch.allclose(features, dense.mean((1, 2)), atol=1e-6)
        model.reset_classifier(0)
        assert torch.equal(model(images), features)
        assert small(num_classes=0)(images).shape == (2, 128)
        model.reset_classifier(5)
        assert model(images).shape == (2, 5)
        maps = small(features_only=True)(images)
        _, (*_, third, _) = small().forward_intermediates(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(56, 56, 16), (28, 28, 32), (14, 14, 64), (7, 7, 128)]
    assert third.shape[-2:] == (14, 14) or third.shape[1:3] == (14, 14)


def test_low_precision_and_export(images: Tensor, tmp_path: Path) -> None:
    model = small(relative_pos=True, use_conv_pos=True)
    with torch.no_grad():
        assert torch.isfinite(copy.deepcopy(model).bfloat16()(images.bfloat16())).all()
    for made in ship_all(model, [tmp_path / "m.onnx", tmp_path / "m.xml"], example=images, tolerance=1e-3):
        assert made.parity.agreement == 1


def test_refusals(images: Tensor) -> None:
    with pytest.raises(VitreousError, match="choose img_size and window_size"):
        small(img_size=384, window_size=12)
    with pytest.raises(VitreousError, match="cycles of 6"):
        small(depths=(1, 1, 4, 1))
    with pytest.raises(VitreousError, match="built for images of"):
        small()(images[..., :192])
    with pytest.raises(VitreousError, match="create it again"):
        small().set_input_size((256, 256))
    assert small(img_size=256, window_size=8)(torch.zeros(1, 3, 256, 256)).shape == (1, 7)
