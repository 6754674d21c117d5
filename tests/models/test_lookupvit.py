"""LookupViT: sizes and costs of the paper, the ideas themselves, and what every architecture must do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.macs import CountMacs
from vitreous.models.lookupvit import LookupBlock, LookupViT, resize_matrix
from vitreous.models.official import load_official
from vitreous.prove.cost import macs
from vitreous.ship import Runtime, ship_all

TINY = dict(img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5, compress=(3, 4))


def tiny(**kwargs: object) -> LookupViT:
    torch.manual_seed(0)
    model = LookupViT(**{**TINY, **kwargs})
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def counted(model: nn.Module) -> int:
    with CountMacs() as count, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    return count.total


# The paper's complexity of a block, (3NM + 2M²)·C + (4N + 15M)·C², in every block but the last, which has no way back.
@pytest.mark.parametrize(("name", "width"), [("small", 384), ("base", 768)])
def test_macs_are_the_papers(name: str, width: int) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(f"lookupvit_{name}_patch16_224").eval()
        vit = timm.create_model(f"vit_{name}_patch16_224").eval()
    for side in (3, 5, 7, 10):
        model.compress = (side, side)
        n, m = 196, side * side
        block = (3 * n * m + 2 * m * m) * width + (4 * n + 15 * m) * width**2
        way_back = n * m * width + (2 * n + m) * width**2
        expected = 12 * block - way_back + n * width * 768 + 1000 * width
        assert abs(counted(model) - expected) < 2e-3 * expected
    model.compress = (5, 5)
    assert 0.45 < counted(model) / counted(vit) < 0.5  # the paper's factor of 2


def test_resizing_is_bilinear() -> None:
    x = torch.randn(1, 1, 14, 9)
    expected = F.interpolate(x, size=(5, 4), mode="bilinear", antialias=True, align_corners=False)
    assert torch.allclose(resize_matrix(14, 5) @ x @ resize_matrix(9, 4).T, expected, atol=1e-6)


def test_compressed_tokens_start_as_resized_patches(x: Tensor) -> None:
    model = tiny()
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda _, given, __: seen.extend(given))
    with torch.no_grad():
        model(x)
        grid = (model.patch_embed(x) + model.pos_embed).unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(3, 4), mode="bilinear", antialias=True).flatten(2).mT
    assert torch.allclose(seen[0], expected, atol=1e-5) and seen[1].shape == (3, 64, 32)


def test_one_map_in_both_directions() -> None:
    torch.manual_seed(0)
    cross = LookupBlock(32, 2, 0.0, last=False).cross
    nn.init.eye_(cross.v_back.weight)
    nn.init.eye_(cross.proj_back.weight)
    nn.init.zeros_(cross.v_back.bias)
    nn.init.zeros_(cross.proj_back.bias)
    nn.init.normal_(cross.q.weight)
    compressed, lookup = torch.randn(1, 4, 32), torch.randn(1, 10, 32)
    with torch.no_grad():
        _, probs = cross.gather(compressed, lookup)
        back = cross.send(compressed, probs)
    assert torch.allclose(probs.sum(-1), torch.ones(1, 2, 4), atol=1e-5)
    for head in range(2):
        a = probs[0, head].T  # [N, M]
        expected = a / a.sum(1, keepdim=True) @ compressed[0, :, head * 16 : head * 16 + 16]
        assert torch.allclose(back[0, :, head * 16 : head * 16 + 16], expected, atol=1e-5)


def test_news_reaches_the_lookup_tokens_and_comes_back(x: Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        before = model(x)
        model.blocks[0].cross.proj_back.weight.zero_()
        model.blocks[0].cross.proj_back.bias.zero_()
        deaf = model(x)
        model.blocks[0].mlp_lookup.fc2.weight.zero_()
        idle = model(x)
    assert (before - deaf).abs().max() > 1e-3 and (deaf - idle).abs().max() > 1e-3


def test_compression_is_chosen_at_run_time(x: Tensor) -> None:
    model = tiny()
    weights = model.state_dict()
    shapes, costs = [], []
    for grid in ((2, 2), (3, 4), (8, 8)):
        model.compress = grid
        with torch.no_grad():
            shapes.append(tuple(model.forward_features(x).shape))
            assert model(x).shape == (3, 5)
        costs.append(macs(model, x[:1]))
    assert shapes == [(3, 4, 32), (3, 12, 32), (3, 64, 32)] and costs == sorted(set(costs))
    assert tiny(compress=7).load_state_dict(weights)
    for wrong in ((0, 3), (9, 3), (3,)):
        with pytest.raises(VitreousError, match="compress must be"):
            model.compress = wrong
    assert model.compress == (8, 8)


def test_every_parameter_learns(x: Tensor) -> None:
    model = tiny(drop_path_rate=0.1).train()
    F.cross_entropy(model(x.repeat(4, 1, 1, 1)), torch.arange(12) % 5).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_classifier(x: Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.allclose(features, model.forward_features(x).mean(1))
        model.reset_classifier(0)
        assert model.get_classifier() is model.head and torch.equal(model(x), features)
        model.reset_classifier(9)
        assert model(x).shape == (3, 9) and tiny(num_classes=0)(x).shape == (3, 32)
        assert tiny().bfloat16()(x.bfloat16()).isfinite().all()
        assert tiny(img_size=(32, 16), compress=(4, 2))(x[..., :16]).shape == (3, 5)
    with pytest.raises(VitreousError, match="global_pool"):
        model.reset_classifier(3, "token")


def test_registered() -> None:
    small: dict[str, Any] = dict(img_size=32, depth=2, num_classes=4, compress=2)
    for name in ("small", "base", "large"):
        assert "first_conv" in timm.create_model(f"lookupvit_{name}_patch16_224", **small).pretrained_cfg
    model = timm.create_model("lookupvit_small_patch16_224", **small)
    again = load_official("lookupvit_small_patch16_224", model.state_dict(), **small)
    assert torch.equal(again.head.weight, model.head.weight)


def test_exports(x: Tensor, tmp_path: Path) -> None:
    model = tiny()
    model.compress = (2, 3)
    for shipment in ship_all(model, [tmp_path / "m.onnx", tmp_path / "m.xml"]):
        runtime = Runtime(shipment.path)
        for n in (1, 3):
            with torch.no_grad():
                assert (runtime(x[:n]) - model(x[:n])).abs().max() < 1e-3
