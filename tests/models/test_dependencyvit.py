"""DependencyViT: reversed attention, the tree, the Lite variant, and what every architecture must do."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.macs import CountMacs
from vitreous.models.dependencyvit import (
    TEMPERATURE,
    DependencyViT,
    ReversedAttention,
    dependency_tree,
    likeliest_tree,
)
from vitreous.models.official import load_official
from vitreous.ship import Runtime, ship_all


def tiny(**kwargs: object) -> DependencyViT:
    torch.manual_seed(0)
    model = DependencyViT(**{**dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5), **kwargs})
    for n, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
        elif n.endswith("gamma"):
            nn.init.ones_(p)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_children_send() -> None:
    torch.manual_seed(0)
    attn = ReversedAttention(16, 2)
    x, sent = torch.randn(1, 5, 16), torch.rand(1, 5, 1)
    y, still = attn(x, sent)
    q, k, v = (t.reshape(5, 2, 8) for t in attn.qkv(x)[0].chunk(3, -1))
    share = (attn.head_selector(x)[0] / TEMPERATURE).softmax(-1)
    expected_sent = sent[0, :, 0] * attn.message_controller(x)[0, :, 0].sigmoid()
    out, mask = torch.zeros(5, 2, 8), torch.zeros(5, 5)
    for head, child, parent in itertools.product(range(2), range(5), range(5)):
        row = (q[child, head] @ k[:, head].T * 8**-0.5).softmax(-1)  # over the parents of this child
        message = row[parent] * share[child, head] * expected_sent[child]
        out[parent, head] += message * v[child, head]
        mask[child, parent] += message
    assert torch.allclose(y[0], attn.proj(out.flatten(1)), atol=1e-5)
    assert torch.allclose(still[0, :, 0], expected_sent, atol=1e-6)
    assert torch.allclose(attn.messages(x, sent)[0], mask, atol=1e-6)
    assert torch.allclose(mask.sum(1), expected_sent, atol=1e-6)  # each child sends one message, split


def test_who_fell_silent_stays_silent(x: Tensor) -> None:
    model = tiny()
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out[1]))
    with torch.no_grad():
        model(x)
    assert all((b < a).all() for a, b in itertools.pairwise(seen))


def test_read_out_is_weighted_by_what_is_still_sent(x: Tensor) -> None:
    model = tiny()
    last: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda _, __, out: last.extend(out[:2]))
    with torch.no_grad():
        logits = model(x)
        tokens, sent = last
        pooled = (model.norm(tokens) * sent).sum(1) / sent.sum(1)
        assert torch.allclose(logits, model.head(pooled), atol=1e-5)
        assert (logits - model.head(model.norm(tokens).mean(1))).abs().max() > 1e-4


def test_lite_prunes_the_leaves(x: Tensor) -> None:
    model = tiny(depth=12, lite=True, img_size=80)
    x = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(1))
    seen: list[tuple[Tensor, ...]] = []
    pruned: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: seen.append((given[2], out[2])))
        block.attn.register_forward_hook(lambda _, __, out: pruned.append(out[1][..., 0]))
    with torch.no_grad():
        model(x)
    assert [after.shape[1] for _, after in seen] == [100, 84, 84, 84, 68, 68, 68, 52, 52, 52, 36, 36]
    for (before, after), sent in zip(seen, pruned, strict=True):
        for i in range(2):
            stays = torch.isin(before[i], after[i])
            assert stays.all() or sent[i][stays].min() >= sent[i][~stays].max()
            assert (after[i].diff() > 0).all()


def test_lite_costs_less() -> None:
    costs = []
    for name in ("dependencyvit_tiny", "dependencyvit_lite_tiny"):
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        with CountMacs() as count, torch.no_grad():
            model(torch.zeros(1, 3, 224, 224, device="meta"))
        costs.append(count.total)
    n, c = 196, 192
    per_token = 12 * c * c + c * 12 + c * c // 2 + c // 2
    assert costs[0] == 12 * (n * per_token + 2 * n * n * c) + n * c * 768 + 1000 * c
    assert 0.65 < costs[1] / costs[0] < 0.75


# Beside DeiT of the same width: no class token and no bias on q, k, v, but selector, controller and layer scale in each block.
@pytest.mark.parametrize(("size", "deit"), [("tiny", "deit_tiny_patch16_224"), ("small", "deit_small_patch16_224")])
def test_size(size: str, deit: str) -> None:
    with torch.device("meta"):
        model, other = timm.create_model(f"dependencyvit_{size}"), timm.create_model(deit)
    c: Any = model.embed_dim
    added = 12 * (c * 12 + c * (c // 2) + c // 2 + 2 * c - 3 * c) - 2 * c
    count, before = (sum(p.numel() for p in m.parameters()) for m in (model, other))
    assert count == before + added


def forest(parents: np.ndarray) -> bool:
    for node in range(len(parents)):
        for _ in range(len(parents)):
            node = parents[node]
            if node < 0:
                break
        else:
            return False
    return True


def test_likeliest_tree_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(6):
        m = rng.random((5, 5)) ** 4
        np.fill_diagonal(m, 0.3)
        logs = np.log(m / m.sum(1, keepdims=True))

        def value(parents: np.ndarray, logs: np.ndarray = logs) -> float:
            return sum(logs[c, p] for c, p in enumerate(parents) if p >= 0)

        trees = [np.array(t) for t in itertools.product(range(-1, 5), repeat=5) if t.count(-1) == 1]
        best = max((t for t in trees if all(c != p for c, p in enumerate(t)) and forest(t)), key=value)
        assert np.array_equal(likeliest_tree(m), best)


def test_tree_follows_the_messages(x: Tensor) -> None:
    for lite, depth in ((False, 3), (True, 8)):
        model = tiny(lite=lite, depth=depth)
        parents = dependency_tree(model.train(), x)
        assert model.training and parents.shape == (3, 16) and parents.dtype == np.int64
        assert all((p == -1).sum() == 1 and forest(p) for p in parents)
        assert not model.blocks[0]._forward_hooks
    model = tiny(depth=1)
    with torch.no_grad():
        mask = model.blocks[0].attn.messages(
            model.blocks[0].norm1(model.patch_embed(x) + model.pos_embed),
            torch.ones(3, 16, 1),
        )
    assert np.array_equal(dependency_tree(model, x)[0], likeliest_tree(mask[0].double().numpy()))
    with pytest.raises(VitreousError, match="reversed attention"):
        dependency_tree(nn.Identity(), x)


def test_every_parameter_learns(x: Tensor) -> None:
    for lite, depth in ((False, 3), (True, 5)):
        model = tiny(drop_path_rate=0.1, lite=lite, depth=depth).train()
        F.cross_entropy(model(x.repeat(4, 1, 1, 1)), torch.arange(12) % 5).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_classifier(x: Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(0)
        assert model.get_classifier() is model.head and torch.equal(model(x), features)
        model.reset_classifier(9)
        assert model(x).shape == (3, 9) and tiny(num_classes=0)(x).shape == (3, 32)
        assert tiny(depth=12, lite=True).bfloat16()(x.bfloat16()).isfinite().all()
        assert tiny(img_size=(32, 16))(x[..., :16]).shape == (3, 5)
    with pytest.raises(VitreousError, match="global_pool"):
        model.reset_classifier(3, "token")


def test_registered() -> None:
    small: dict[str, Any] = dict(img_size=32, depth=2, num_classes=4)
    for name in ("tiny", "small", "lite_tiny", "lite_small"):
        model: Any = timm.create_model(f"dependencyvit_{name}", **small)
        again = load_official(f"dependencyvit_{name}", model.state_dict(), **small)
        assert torch.equal(again.head.weight, model.head.weight)
        assert model.pretrained_cfg["classifier"] == "head"


@pytest.mark.parametrize("lite", [False, True])
def test_exports(lite: bool, x: Tensor, tmp_path: Path) -> None:
    model = tiny(lite=lite, depth=2)
    for shipment in ship_all(model, [tmp_path / "m.onnx", tmp_path / "m.xml"]):
        runtime = Runtime(shipment.path)
        for n in (1, 3):
            with torch.no_grad():
                assert (runtime(x[:n]) - model(x[:n])).abs().max() < 1e-3
