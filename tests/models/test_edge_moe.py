"""Edge-MoE: the approximations by the golden; experts by task, each read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from support import GOLDENS
from torch import Tensor, nn

import vitreous as vt
from vitreous.models.edge_moe import EdgeMoE, TableGELU, TaskExperts, gelu_table, online_softmax, weight_traffic
from vitreous.ship import ship_all


def small(**how: Any) -> nn.Module:
    torch.manual_seed(0)
    size = dict(img_size=(16, 32), patch_size=8, embed_dim=24, depth=4, num_heads=3, hidden=16, experts=6, num_classes=5)
    model = timm.create_model("edge_moe_m3vit", **{**size, **how}).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 16, 32, generator=torch.Generator().manual_seed(1))


def test_golden() -> None:
    z = np.load(GOLDENS / "edge-moe--gelu_softmax.npz")
    np.testing.assert_allclose(gelu_table(), z["table"], atol=1e-12)
    act = TableGELU().double()
    act.table = gelu_table()
    given = torch.from_numpy(z["x"])
    np.testing.assert_allclose(act(given), z["gelu"], atol=1e-9)
    assert float((act(given) - F.gelu(given)).abs().max()) < 1e-4
    scores = torch.from_numpy(z["scores"])
    most, sums = online_softmax(scores)
    np.testing.assert_allclose(most.T, z["trace"][:, 0], rtol=1e-12)
    np.testing.assert_allclose(sums.T, z["trace"][:, 1], rtol=1e-12)
    torch.testing.assert_close((scores - most[:, -1:]).exp() / sums[:, -1:], scores.softmax(-1))


def test_experts_by_queue_are_experts_by_token(x: Tensor) -> None:
    layer = TaskExperts(8, tasks=2, experts=5, hidden=6, top=2, act=nn.GELU())
    for p in layer.parameters():
        nn.init.normal_(p)
    tokens = torch.randn(2, 9, 8)
    for task in (0, 1):
        scores, chosen = layer.route(tokens.flatten(0, 1), task)
        assert (scores.sum(1) < 1).all(), "scores over all experts, not renormalised"
        each = zip(tokens.flatten(0, 1), scores, chosen, strict=True)
        wanted = [sum(w * layer.expert(int(i), t) for w, i in zip(ws, of, strict=True)) for t, ws, of in each]
        torch.testing.assert_close(layer(tokens, task), torch.stack(wanted).view_as(tokens))
    assert not torch.allclose(layer(tokens, 0), layer(tokens, 1)), "each task has its gate"


def test_each_expert_is_read_once(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = small(), list[int]()
    expert = TaskExperts.expert
    monkeypatch.setattr(TaskExperts, "expert", lambda self, i, t: read.append(i) or expert(self, i, t))
    found = weight_traffic(model, x, task=1)
    assert [t.layer for t in found] == ["blocks.1.mlp", "blocks.3.mlp"]
    assert len(read) == sum(t.used for t in found) and all(t.tokens == 4 * 9 for t in found)
    for t in found:
        assert t.by_token == 2 * t.tokens * t.by_expert // t.used and t.by_expert < t.by_token
    with pytest.raises(vt.VitreousError, match="no experts"):
        weight_traffic(nn.Linear(2, 2), x)


def test_tasks(x: Tensor) -> None:
    model = small(tasks=3)
    with torch.no_grad():
        answers = [model(x, task) for task in range(3)]
    assert all(a.shape == (4, 5) for a in answers) and not torch.allclose(answers[1], answers[2])
    model.train()
    model(x, 2).sum().backward()
    gate = model.blocks[1].mlp.gate.grad
    assert gate[2].any() and not gate[:2].any() and model.heads[1].weight.grad.any()
    with pytest.raises(vt.VitreousError, match="no task 3"):
        model(x, 3)
    with pytest.raises(vt.VitreousError, match="top ≤ experts"):
        small(top=9)


def test_ships_as_it_computes(x: Tensor, tmp_path: Path) -> None:
    """Exported, all experts see all tokens; the answers are those of the queues. Saved, it is the same again."""
    model = small()
    [shipment] = ship_all(model, [tmp_path / "m.xml"], example=x)
    assert shipment.parity.worst <= 1e-3
    vt.save(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(vt.load(tmp_path / "m.safetensors", base=small())(x), model(x))
    model.reset_classifier(3)
    assert model(x).shape == model(x, 1).shape == (4, 3)
    assert isinstance(model, EdgeMoE)


def test_published_size() -> None:
    with torch.device("meta"):
        model = timm.create_model("edge_moe_m3vit", num_classes=0)
    experts = 6 * 16 * (2 * 192 * 384 + 192 + 384)
    assert sum(p.numel() for n, p in model.named_parameters() if ".mlp.fc" in n or ".mlp.bias" in n) >= experts
    assert model.patch_embed.num_patches == 128 and model.blocks[0].attn.scale == 0.125
