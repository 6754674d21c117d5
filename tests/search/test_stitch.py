"""SN-Net v2: routes between two models, their first solution, and how they are drawn in training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from learning import pictures, vit
from support import GOLDENS, command, golden, official_state
from torch import nn

import vitreous as vt
from vitreous import VitreousError
from vitreous.learn.sn_net import draw, groups
from vitreous.models import load_official
from vitreous.models.sn_net import SNNet, StitchingLayer, arguments, routes
from vitreous.search.nets import stitch as stitching


def two(depth: int = 3) -> tuple[nn.Module, nn.Module]:
    return vit(depth=depth), vit(depth=depth, embed_dim=48)


def test_least_squares_as_published() -> None:
    with np.load(GOLDENS / "sn-netv2--least_squares.npz") as z:
        w, b = stitching.least_squares(torch.from_numpy(z["x1"]), torch.from_numpy(z["x2"]))
        np.testing.assert_allclose(w, z["w"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(b, z["b"], rtol=1e-9, atol=1e-12)


def test_routes_give_what_the_official_net_gives() -> None:
    info, expected, x = golden("sn-netv2--ti_s_r16")
    state = official_state(info)
    net = load_official("sn-netv2--ti_s_r16", state)
    assert isinstance(net, SNNet) and sum(p.numel() for p in net.parameters()) == info["params"]
    assert (len(net.routes), len(net.usable)) == (info["stitches"]["total"], info["stitches"]["usable"])
    out = []
    with torch.no_grad():
        for net.route in info["kwargs"]["stitch_ids"]:
            said, route = info["configs"][str(net.route)], net.at(net.route)
            assert list(route.anchors) == said["comb_id"]
            assert [[b, min(e - 1, 12)] for b, e in route.blocks][:-1] == said.get("route", [[]])[:-1]
            out.append(net(x)[:, :20])
    assert abs(torch.cat(out, 1).numpy() - expected).max() <= 1e-4 * abs(expected).max()
    with pytest.raises(VitreousError, match="do not fit"):
        load_official("sn-netv2--ti_s_r16", {**state, "left.over": torch.zeros(1)})


def test_unequal_depths() -> None:
    """Twice as deep: a block of the small one stands for two of the large, and 134 routes are usable as well."""
    found = routes(12, 24)
    assert len(found) == 135 and str(found[4]) == "S0…2 → L6…23"
    with pytest.raises(VitreousError, match="divide"):
        routes(12, 16)


def test_stitching_layers_carry_the_features_over() -> None:
    """Between a model and itself least squares leaves the tokens as they are: every route answers as the model does."""
    small, x = vit(depth=3, embed_dim=24), pictures()[0]
    net = stitching.stitch(small, small, x, rank=4)
    wanted = small(x)
    for route in net.usable:
        net.route = route
        torch.testing.assert_close(net(x), wanted, rtol=1e-3, atol=1e-3)
    before = StitchingLayer(24, 24, 4)
    net.stitches[0][0] = before
    net.route = next(i for i in net.usable if net.at(i).anchors == (0, 1) and net.at(i).layers == (0,))
    assert (net(x) - wanted).norm() > 0.1 * wanted.norm()


def test_a_route_alone_is_an_ordinary_model(tmp_path: Path) -> None:
    small, large = two()
    net = stitching.stitch(small, large, pictures()[0], rank=4)
    with torch.no_grad():
        net.stitches[0][0].lora_B.normal_()
    x = pictures()[0][:4]
    for route in (0, 1, 2, len(net.routes) - 1):
        net.route = route
        alone = stitching.single(net, route)
        torch.testing.assert_close(alone(x), net(x))
        assert route < 2 or sum(p.numel() for p in alone.parameters()) < sum(p.numel() for p in net.parameters())
    vt.save(alone, tmp_path / "one.safetensors")
    torch.testing.assert_close(vt.open(tmp_path / "one.safetensors")(x), alone(x))
    with vt.glass(alone) as g:
        alone(x)
    assert len(g.attention) == sum(e - b for b, e in net.at(route).blocks)


def test_training_moves_one_route_a_step_and_not_the_frozen_weights() -> None:
    net = stitching.stitch(*two(), pictures()[0], rank=4)
    trained = vt.learn.train(net, pictures(), vt.learn.Stitched(), epochs=2, batch=16, augment=None)
    assert torch.equal(trained.stitches[0][0].weight, net.stitches[0][0].weight)
    assert any(not torch.equal(a.lora_B, b.lora_B) for a, b in zip(trained.stitches[0], net.stitches[0], strict=True))
    with pytest.raises(VitreousError, match="vitreous stitch"):
        vt.learn.train(vit(), pictures(), vt.learn.Stitched(), epochs=1, batch=16, augment=None)


def test_costs_are_drawn_before_routes() -> None:
    """Of DeiT-Ti and DeiT-S most routes lie in the middle; the cheapest and the dearest group train as often as the fullest."""
    net = SNNet(anchors=((192, 12, 3), (384, 12, 6)), rank=4)
    cut = groups(net, 0.2)
    assert sorted(i for g in cut for i in g) == sorted(net.usable)
    assert all(net.macs(g[-1]) - net.macs(g[0]) <= 0.2 * (net.macs(1) - net.macs(0)) for g in cut)
    torch.manual_seed(0)
    drawn = Counter(next(j for j, g in enumerate(cut) if r in g) for r in (draw(cut) for _ in range(4000)))
    assert max(drawn.values()) < 1.2 * min(drawn.values()) and max(map(len, cut)) > 3 * min(map(len, cut))


def test_what_cannot_be_stitched() -> None:
    small = vit()
    with pytest.raises(VitreousError, match="num_classes is 4 in one and 5"):
        arguments(small, vit(classes=5))
    with pytest.raises(VitreousError, match="plain vision transformers"):
        arguments(small, timm.create_model("resnet18"))
    with pytest.raises(VitreousError, match="small model first"):
        stitching.stitch(vit(depth=4), vit(depth=2), pictures()[0])


def test_at_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shape = dict(img_size=28, in_chans=3, patch_size=7, num_classes=10, depth=2, num_heads=2)
    for name, width in (("a", 16), ("b", 32)):
        vt.save(vt.open("vit_tiny_patch16_224", embed_dim=width, **shape), tmp_path / f"{name}.safetensors")
    a, b, out = (str(tmp_path / f"{n}.safetensors") for n in ("a", "b", "net"))
    status, said, err = command(monkeypatch, capsys, "stitch", a, b, "--limit", "200", "--rank", "2", "--out", out)
    assert (status, err) == (0, "") and "GMACs" in said
    one = str(tmp_path / "one.safetensors")
    status, said, _ = command(monkeypatch, capsys, "stitch", out, "--limit", "200", "--macs", "1e9", "--out", one)
    assert status == 0 and "alone" in said
    assert vt.open(one)(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
    for words, reason in (([a], "two models"), ([out, b], "already"), ([out, "--macs", "9"], "cheapest")):
        status, _, err = command(
            monkeypatch, capsys, "stitch", *words, "--limit", "200", "--out", str(tmp_path / "c.safetensors")
        )
        assert status == 2 and reason in err
