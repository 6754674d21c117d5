"""NViT: its criterion by the golden, and that what is removed is really gone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
from support import GOLDENS, fill, small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous.blocks import plain_blocks
from vitreous.models.revit import revit_shape
from vitreous.prune import NViT
from vitreous.prune.cut import separate
from vitreous.prune.saliency import Latency, adjusted, after_removal, criterion
from vitreous.prune.units import KINDS, structures


class Oracle(Latency):
    """The latency that the golden was made with."""

    def block(self, i: int, embedding: float, heads: float, qk: float, v: float, mlp: float) -> float:
        whole = 32 * 4 * (3 * 16 + 16) + 2 * 32 * 32
        products = embedding * heads * (2 * qk + v) + embedding * heads * v + 2 * embedding * mlp
        return 1e-3 * 12 * products / whole + 2e-5 * heads


def as_linear(name: str, state: dict[str, np.ndarray]) -> nn.Linear:
    """The reference holds [dim, in, head], and of the projection [out, dim, head]."""
    w = torch.from_numpy(state[f"{name}.weight"]).double()
    b = torch.from_numpy(state[f"{name}.bias"]).double()
    if name.endswith((".Q", ".K", ".V")):
        w, b = w.permute(2, 0, 1).flatten(0, 1), b.T.flatten()
    elif w.ndim == 3:
        w = w.permute(0, 2, 1).flatten(1)
    layer = nn.Linear(w.shape[1], w.shape[0]).double()
    layer.weight, layer.bias = nn.Parameter(w.clone()), nn.Parameter(b.clone())
    return layer


class Block(nn.Module):
    def __init__(self, i: int, state: dict[str, np.ndarray]) -> None:
        super().__init__()
        at = f"blocks.{i}"
        self.attn = nn.Module()
        for part, name in (("q_proj", "qkv.Q"), ("k_proj", "qkv.K"), ("v_proj", "qkv.V"), ("proj", "proj")):
            setattr(self.attn, part, as_linear(f"{at}.attn.{name}", state))
        self.attn.num_heads, self.attn.position = 4, None
        self.mlp = nn.Sequential(as_linear(f"{at}.mlp.fc1", state), nn.GELU(), as_linear(f"{at}.mlp.fc2", state))
        self.norms = nn.ParameterList(
            torch.from_numpy(state[f"{at}.{n}.{p}"]).double() for n in ("norm1", "norm2") for p in ("weight", "bias")
        )


def test_golden_criterion_latency_gates_and_thresholds() -> None:
    golden = np.load(GOLDENS / "nvit--criterion.npz")
    info = json.loads(bytes(golden["info"]))
    shapes = {name: tuple(shape) for name, shape, kind in info["state"] if kind == "fill"}
    state = {name: fill(name, shape) for name, shape in shapes.items()}
    patches = nn.Linear(768, 32).double()
    patches.weight.data = torch.from_numpy(state["patch_embed.proj.weight"]).double().flatten(1)
    patches.bias.data = torch.from_numpy(state["patch_embed.proj.bias"]).double()
    blocks: Any = nn.ModuleList(Block(i, state) for i in range(12))
    same = lambda t: t
    units = structures(blocks, ("embedding", "heads", "qk", "v", "mlp"), [(patches.weight, same), (patches.bias, same)])
    assert [u.size for u in units] == [size for _, size in info["layers"]]

    def gradients(t: int, b: int) -> None:
        g = {n: 0.01 * fill(f"grad{t}.{b}.{n}", s).astype(np.float64) for n, s in shapes.items()}
        patches.weight.grad = torch.from_numpy(g["patch_embed.proj.weight"]).flatten(1)
        patches.bias.grad = torch.from_numpy(g["patch_embed.proj.bias"])
        for block, other in zip(blocks, (Block(i, g) for i in range(12))):
            for p, q in zip(block.parameters(), other.parameters(), strict=True):
                p.grad = q.data

    alive = [torch.ones(u.size, dtype=torch.float64) for u in units]
    latency, averaged = Oracle([0] * 5, [6] * 12), None
    groups = [{"embedding": 16, "heads": 2, "qk": 8, "v": 8, "mlp": 16}[u.kind] for u in units]
    for t in range(4):
        found = []
        for b in range(2):
            gradients(t, b)
            found.append([criterion(u, 12) for u in units])
            if t == b == 0:
                np.testing.assert_allclose(torch.cat(found[0]), golden["criterion_first_batch"], rtol=1e-9)
        new = [torch.stack(of).mean(0) for of in zip(*found)]
        averaged = new if averaged is None else [0.9 * a + 0.1 * n for a, n in zip(averaged, new)]
        np.testing.assert_allclose(torch.cat(averaged), golden[f"averaged_{t}"], rtol=1e-9, err_msg=str(t))
        width = int(alive[0].sum())
        dims = [{"embedding": width} | {u.kind: int(a.sum()) for u, a in zip(units, alive) if u.block == i} for i in range(12)]
        gains = [latency.gain(u.kind, u.block, dims) for u in units]
        values = adjusted(averaged, alive, gains, 5e-4)
        np.testing.assert_allclose(torch.cat(values), golden[f"latency_adjusted_{t}"], rtol=1e-7, atol=1e-15, err_msg=str(t))
        left, threshold = after_removal(values, groups, max(1, 8 * t))
        np.testing.assert_allclose(threshold, golden[f"threshold_{t}"], rtol=1e-9)
        np.testing.assert_array_equal(torch.cat(left), golden[f"gates_{t}"])
        for u, gate in zip(units, left):
            u.zero(~gate)
        alive = [gate.double() for gate in left]
        dims = [{"embedding": width} | {u.kind: int(a.sum()) for u, a in zip(units, alive) if u.block == i} for i in range(12)]
        assert latency.total(dims) == pytest.approx(float(golden[f"latency_{t}"]))


def test_what_is_cut_computes_what_zeroed_units_do(images: Tensor) -> None:
    """Heads, dimensions and hidden units stand for themselves; the scale stays that of the original heads."""
    net = small_vit()
    small = NViT(keep=0.6, structures=KINDS[1:], rounds=1).apply(net, images)
    plan = vt.steps.history_of(small).done[0][1]
    zeroed = small_vit()
    blocks = plain_blocks(zeroed, "test")
    for block in blocks:
        separate(block.attn)
    for unit in structures(blocks, KINDS[1:]):
        gone = torch.ones(unit.size, dtype=torch.bool)
        gone[plan[unit.kind][str(unit.block)]] = False
        unit.zero(gone)
    with torch.no_grad():
        torch.testing.assert_close(small(images), zeroed(images), rtol=1e-4, atol=1e-5)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(small) < 0.9 * count(net) and "covers" in plan


def test_channels_are_gone_everywhere(images: Tensor) -> None:
    net = small_vit()
    small = NViT(keep=0.7, structures=("embedding",), rounds=1).apply(net, images)
    width, left = net.embed_dim, small.embed_dim
    assert left < width and small.pos_embed.shape[-1] == small.norm.weight.shape[0] == small.head.in_features == left
    assert not any(width in p.shape for n, p in small.named_parameters() if "qkv" not in n and "proj" not in n and "fc" not in n)
    features = small_vit()
    features.reset_classifier(0)
    with pytest.raises(vt.VitreousError, match="no embedding that could go"):
        NViT(structures=("embedding",)).apply(features, images)


def test_latency_says_what_goes(images: Tensor) -> None:
    """Where only the MLP takes time, only hidden units need to go, and the more the longer they take."""
    mlp = NViT(keep=0.5, costs=(0.0, 1.0, 0.0, 0.0, 0.0), latency=1e6, rounds=1, structures=KINDS[1:]).apply(small_vit(), images)
    plan = vt.steps.history_of(mlp).done[0][1]
    assert all(len(kept) == b.attn.num_heads for b, kept in zip(small_vit().blocks, plan["heads"].values()))
    assert sum(map(len, plan["mlp"].values())) <= 0.5 * sum(b.mlp.fc1.out_features for b in small_vit().blocks)


def test_refusals(images: Tensor) -> None:
    for wrong in (dict(keep=0.0), dict(structures=("toes",)), dict(structures=()), dict(rounds=0), dict(costs=(1.0,))):
        with pytest.raises(vt.VitreousError, match="NViT: "):
            NViT(**wrong)
    with pytest.raises(vt.VitreousError, match="cannot be reached"):
        NViT(keep=0.05, structures=("heads",)).apply(small_vit(), images)
    assert not vt.steps.history_of(NViT(keep=1.0).apply(small_vit(), images)).done[0][1]


def test_the_published_shapes() -> None:
    """ReViT-T and -S by the redistribution rule; scores are divided by the root of 64 whatever queries have."""
    tiny, small = revit_shape(176), revit_shape(384)
    assert tiny["heads"] == [10, 2, 2, 4, 4, 4, 4, 4, 4, 2, 2, 10] and small["heads"][1:4] == [4, 4, 8]
    assert small["qk"][:4] == [32, 16, 16, 32] and small["mlp"] == [1152] * 3 + [2304] * 6 + [1152] * 3
    with torch.device("meta"):
        net = timm.create_model("revit_tiny")
    q, proj = net.blocks[0].attn.q_proj, net.blocks[0].attn.proj
    assert q.out_features == 160 and proj.in_features == 640 and net.blocks[0].attn.scale == 1 / 8
    net = timm.create_model("revit_tiny", width=104, img_size=32, num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    assert net(x).shape == (2, 7) and vt.read(net).plain
    vt.tokens.EViT(keep=0.5).apply(net)(x)
    with pytest.raises(vt.VitreousError, match="without heads"):
        revit_shape(64)
