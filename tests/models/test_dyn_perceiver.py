"""Dynamic Perceiver against its official implementation, its two branches, and calibrated early exits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from support import fill, golden
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.models.dyn_perceiver import network as dp
from vitreous.models.early_exit import HELD, _planned, _thresholds, calibrate_exits, dynamic, exit_macs
from vitreous.models.official import load_official, variants
from vitreous.prove.cost import macs
from vitreous.ship import ship_all


def tiny() -> dp.Backbone:
    """Four stages of one convolution each: 8, 16, 16, 16 and 24 channels, strides 4 to 16."""

    def conv(a: int, b: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())

    return dp.Backbone(conv(3, 8, 4), (conv(8, 16, 1), conv(16, 16, 2), conv(16, 16, 2), conv(16, 24, 1)), hidden=12)


def small(seed: int = 0, **kwargs: Any) -> dp.DynPerceiver:
    torch.manual_seed(seed)
    model = dp.DynPerceiver(tiny, **{**dict(num_latents=16, depth_factor=(1, 0, 0, 1), num_classes=7), **kwargs})
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("variant", ["mobilenetV3_0x75_perceiver_t128", "reg800m_perceiver_t128", "resnet50_0375_perceiver_t128"])
def test_goldens_of_the_published_checkpoints(variant: str) -> None:
    info, out, x = golden(f"dyn-perceiver--{variant}")
    state = {name: torch.from_numpy(np.asarray(fill(name, tuple(shape)))) for name, shape, _ in info["state"]}
    model: Any = load_official(variant, state)
    assert sum(p.numel() for p in model.parameters()) == info["params"]
    with torch.no_grad():
        exits = model(x)  # all four, in eval mode too, as the official repository
    got = torch.cat([logits[:, :32] for logits in exits], dim=1).numpy()
    assert np.abs(got - out).max() / np.abs(out).max() < 1e-4
    if variant.startswith("mobilenet"):  # its own count of GMACs
        assert np.allclose(np.array(exit_macs(model, (3, 224, 224))) / 1e9, info["own_gmacs_exits"], rtol=0.005)


def test_every_published_variant_is_registered() -> None:
    names = [name for name, _ in dp.published()]
    assert len(names) == len(set(names)) == 56
    assert {f"dyn-perceiver--{name}" for name in names} <= set(variants())
    for name in names:
        assert timm.is_model(name)
    for name, parameters in (  # of the official models, in millions
        ("mobilenetV3_0x5_perceiver_t128", 4.698264),
        ("mobilenetV3_perceiver_t256", 15.198336),
        ("reg400m_perceiver_t32", 11.592972),
    ):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == round(parameters * 1e6)


def test_training_gives_four_exits_and_evaluation_one(images: Tensor) -> None:
    model = small()
    with torch.no_grad():
        every = small(exit=None)(images)
        assert len(every) == len(dp.EXITS) and all(logits.shape == (6, 7) for logits in every)
        for i in range(4):
            assert torch.equal(small(exit=i)(images), every[i])
        assert torch.equal(model(images), every[3])
        assert len(model.train()(images)) == 4
    counts = [macs(small(exit=i), images[:1]) for i in range(4)]
    assert counts == sorted(counts) and tuple(counts) == exit_macs(model, (3, 32, 32))
    with pytest.raises(VitreousError, match="exit is 4"):
        small(exit=4)


def test_latents_are_halved_and_widened(images: Tensor) -> None:
    model = small()
    shapes: list[tuple[int, ...]] = []
    for exchange in model.exchanges:
        exchange.register_forward_hook(lambda m, args, out: shapes.append(tuple(out[1].shape)))
    model(images)
    assert shapes == [(6, 16, 8), (6, 8, 16), (6, 4, 16), (6, 2, 16)]


def test_the_branches_read_each_other(images: Tensor) -> None:
    def reached(exit: int, name: str, **kwargs: Any) -> bool:
        """Whether the logits of an exit depend on a parameter."""
        model = small(exit=exit, **kwargs)
        model(images).sum().backward()
        grad = model.get_parameter(name).grad
        return grad is not None and bool(grad.abs().sum() > 0)

    # z → x: the latents reach the map's own exit, unless that direction is cut
    assert reached(2, "latent") and not reached(2, "latent", with_z2x=False)
    # x → z: the early exit, which reads latents only, sees the map of stage 2
    assert reached(0, "stages.1.0.weight") and not reached(0, "stages.1.0.weight", with_x2z=False)
    # no exit waits for a later stage
    assert not reached(0, "stages.2.0.weight") and not reached(1, "stages.3.0.weight")
    # an exit is told what the one before it said
    assert reached(1, "head.early.weight") and not reached(1, "head.early.weight", with_isc=False)
    # the last exit's map has read the latents again
    assert small(with_last_CA=False).last_z2x is None and reached(3, "last_z2x.attn.q_proj.weight")


def test_keys_have_a_learned_place(images: Tensor) -> None:
    model = small(exit=0)
    with torch.no_grad():
        before = model(images)
        model.get_parameter("exchanges.2.x2z.attn.relative_position_bias").normal_()
        assert not torch.allclose(model(images), before, atol=1e-3)


def test_gradients_reach_every_parameter(images: Tensor) -> None:
    model = small().train()
    sum(logits.square().sum() for logits in model(images)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_thresholds_follow_the_plan() -> None:
    """Each exit takes its planned number of the images that are left, and the most confident of them."""
    confidence = torch.rand(4, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.tensor([0.3, 0.1, 0.0, 0.6], dtype=torch.float64)
    thresholds, stopped = _thresholds(confidence, shares)
    assert torch.allclose(stopped, shares)
    first = confidence[0].topk(60)
    assert abs(thresholds[0].item() - first.values[-1].item()) < 1e-6
    left = torch.ones(200, dtype=torch.bool)
    left[first.indices] = False
    assert abs(thresholds[1].item() - confidence[1][left].topk(20).values[-1].item()) < 1e-6
    assert thresholds[2] == torch.inf and thresholds[3] == -torch.inf


def test_exits_are_held_back_as_published() -> None:
    """By hand, at a ratio of 2: shares of 1, 2, 4, 8 fifteenths; the first keeps 0.85 of its, the third half of what it has."""
    first = 0.85 / 15
    rest = (1 - first) / 14  # of 2, 4 and 8
    expected = [first, 2 * rest, 2 * rest, 10 * rest]
    assert _planned(np.log(2), HELD).tolist() == pytest.approx(expected)
    assert _planned(np.log(2), (1, 1, 1, 1)).tolist() == pytest.approx([1 / 15, 2 / 15, 4 / 15, 8 / 15])
    for log_ratio in (-40.0, -1.0, 0.0, 3.0, 40.0):
        shares = _planned(log_ratio, HELD)
        assert shares.sum() == pytest.approx(1) and shares.min() >= 0


def test_a_budget_is_planned_with_the_published_factors() -> None:
    model = small()
    images = torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    costs = exit_macs(model, (3, 32, 32))
    shares = calibrate_exits(model, images, budget=0.5 * (costs[0] + costs[3])).shares
    half_ratio = shares[2] / shares[1]  # at a ratio r between exits the shares are 1, r, r²/2 and r³ + r²/2 from the second on
    assert shares[3] / shares[1] == pytest.approx((2 * half_ratio) ** 2 + half_ratio, rel=0.2)
    assert calibrate_exits(model, images, budget=costs[0]).shares[0] == 1  # too little for images to pass the first exit


def single(images: Tensor) -> Iterator[Tensor]:
    return iter(images.split(1))


def test_calibrated_model_keeps_shares_and_budget() -> None:
    model = small()
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    found = calibrate_exits(model, single(images), shares=(0.25, 0.25, 0.25, 0.25))
    assert found.shares == (0.25, 0.25, 0.25, 0.25) and found.macs == exit_macs(model, (3, 32, 32))
    assert found.expected == pytest.approx(np.mean(found.macs))
    taken = [dynamic(model, x) for x in single(images)]
    assert [sum(d.exit == i for d in taken) for i in range(4)] == [10, 10, 10, 10]
    assert np.mean([d.macs for d in taken]) == pytest.approx(found.expected)
    with torch.no_grad():
        every = [logits for logits in model.exits(images)]
    for i, d in enumerate(taken):
        assert torch.allclose(d.logits[0], every[d.exit][i], atol=1e-4)
        assert d.confidence == pytest.approx(d.logits.softmax(1).max().item()) and d.macs == found.macs[d.exit]

    costs = found.macs
    last = 0.0
    for budget in np.linspace(costs[0], costs[3], 6):
        found = calibrate_exits(model, [(images, torch.zeros(40))], budget=budget)
        assert last <= found.expected <= budget
        assert found.expected > budget - 0.1 * (costs[3] - costs[0])
        last = found.expected
    assert found.shares == (0, 0, 0, 1)  # all the budget: nobody stops early


def test_dynamic_does_not_run_what_lies_behind_the_exit(images: Tensor) -> None:
    model = small()
    ran: list[int] = []
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda m, args, out, i=i: ran.append(i))
    model.thresholds.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0]))
    exit_macs(model, (3, 32, 32))
    model.counted[3, 32, 32] = (1, 2, 3, 4)
    ran.clear()
    assert dynamic(model, images[:1]).exit == 0 and ran == [0, 1]
    ran.clear()
    model.thresholds[0] = 2.0
    assert dynamic(model, images[:1]).macs == 2 and ran == [0, 1, 2]
    uncalibrated = dynamic(small(), images[:1])
    assert uncalibrated.exit == 3 and torch.equal(uncalibrated.logits, small()(images[:1]))


def test_thresholds_are_saved_with_the_model(images: Tensor) -> None:
    model, other = small(), small()
    calibrate_exits(model, images, shares=(0.5, 0.5, 0, 0))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.thresholds, model.thresholds) and model.thresholds[0] < 1
    model.reset_classifier(3)
    assert model.thresholds[0] == torch.inf


def test_errors(images: Tensor) -> None:
    model = small()
    for kwargs, message in (
        (dict(), "either"),
        (dict(budget=1e9, shares=(1, 0, 0, 0)), "either"),
        (dict(shares=(0.5, 0.5)), "distribution"),
        (dict(shares=(0.5, 0.6, -0.1, 0)), "distribution"),
        (dict(budget=10), "below the first exit"),
    ):
        with pytest.raises(VitreousError, match=message):
            calibrate_exits(model, images, **kwargs)
    with pytest.raises(VitreousError, match="no images"):
        calibrate_exits(model, [], budget=1e9)
    with pytest.raises(VitreousError, match="one size"):
        calibrate_exits(model, [images, images[..., :16]], budget=1e9)
    with pytest.raises(VitreousError, match="one image"):
        dynamic(model, images)
    with pytest.raises(VitreousError, match="training mode"):
        dynamic(small().train(), images[:1])
    with pytest.raises(VitreousError, match="halved"):
        small(num_latents=12)
    with pytest.raises(VitreousError, match="load_official"):
        timm.create_model("reg400m_perceiver_t32", pretrained=True)


def test_contract(images: Tensor) -> None:
    model = small()
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape == (6, model.num_features)
        assert torch.allclose(model.forward_head(features), model(images), atol=1e-5)
        half = small().bfloat16()(images.bfloat16())
        assert half.dtype == torch.bfloat16 and half.isfinite().all()
        assert small(num_classes=0)(images).shape == features.shape
    model.reset_classifier(3)
    assert model(images).shape == (6, 3)
    model.reset_classifier(0)
    assert torch.allclose(model(images), features)
    assert small(in_chans=1)(images[:, :1]).shape == (6, 7)


@pytest.mark.parametrize(("exit", "batch"), [(0, 2), (3, None)])
def test_each_exit_ships(exit: int, batch: int | None, images: Tensor, tmp_path: Path) -> None:
    """At 32 pixels the map is not a multiple of the 7 × 7 grid that it is pooled to."""
    files = ship_all(small(exit=exit), [tmp_path / "m.onnx", tmp_path / "m.xml"], example=images, batch=batch)
    assert all(file.batch == batch for file in files)


@pytest.mark.parametrize(("classes", "multi_label"), [(1, False), (3, True)])
def test_yes_or_no_is_as_sure_as_its_least_sure_answer(classes: int, multi_label: bool) -> None:
    model = small(num_classes=classes, multi_label=multi_label)
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    found = calibrate_exits(model, single(images), shares=(0.5, 0, 0, 0.5))
    assert found.shares == (0.5, 0, 0, 0.5)
    for x in single(images):
        d = dynamic(model, x)
        assert d.confidence == pytest.approx(min(max(p, 1 - p) for p in d.logits[0].sigmoid().tolist()))
