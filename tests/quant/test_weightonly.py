"""Weights in few bits, activations in floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from support import small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous.errors import VitreousError
from vitreous.quant import weightonly
from vitreous.quant.gptq import input_grams, second_order_rounding
from vitreous.quant.minmax import MinMax
from vitreous.quant.weightonly import GroupQuantizer, WeightOnly, WeightOnlyLinear, learned_rounding
from vitreous.steps import slim
from vitreous.tokens import MCTF, EViT

ROUNDINGS = ("nearest", "learned", "second-order")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit(depth=2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weightonly, "ITERATIONS", 60)


def linears(model: nn.Module) -> dict[str, WeightOnlyLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, WeightOnlyLinear)}


def error(small: nn.Module, model: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float(((small(images) - model(images)).norm(dim=1) / model(images).norm(dim=1)).mean())


def calibrated(weight: Tensor, bits: int, groups: int) -> GroupQuantizer:
    w = GroupQuantizer(bits, len(weight), groups)
    w.set(*w.grid(*w.rows(weight).aminmax(dim=1)))
    return w


def test_by_hand() -> None:
    """Groups of two: (−1, 2) has step 3/15 and zero point 5; (0, 1.5) step 0.1 and zero point 0."""
    weight = torch.tensor([[-1.0, 2.0, 0.0, 1.5]])
    w = calibrated(weight, 4, 2)
    assert torch.allclose(w.scale, torch.tensor([[0.2, 0.1]])) and w.zero_point.tolist() == [[5, 0]]
    assert torch.allclose(w(torch.tensor([[0.49, 9.0, 0.56, -3.0]])), torch.tensor([[0.4, 2.0, 0.6, 0.0]]))
    eight = calibrated(weight, 8, 1)
    assert torch.allclose(eight.scale, torch.tensor([[2 / 127]])) and eight.zero_point.tolist() == [[0]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_grid(bits: int, groups: int) -> None:
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 49)
    w = calibrated(weight, bits, groups)
    out = w(weight)
    assert torch.equal(w(out), out), "idempotent"
    half = 0.5 * w.scale.repeat_interleave(48 // groups, 1)
    assert ((out - weight).abs() <= half * (1.001 if bits == 8 else 2.001)).all(), "a zero point is rounded too"
    assert w(torch.zeros(5, 48)).eq(0).all()
    ordered = weight.sort(dim=1).values
    runs = calibrated(ordered, bits, groups)(ordered).unflatten(1, (groups, -1))
    assert (runs.diff(dim=2) >= 0).all(), "monotone in each group"
    x = weight.clone().requires_grad_()
    w(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


def test_finer_groups_cost_less(model: nn.Module, images: Tensor) -> None:
    errors = [error(WeightOnly(4, group).apply(model), model, images) for group in (16, 256)]
    assert 0 < errors[0] < errors[1] < 0.5
    assert error(WeightOnly(8).apply(model), model, images) < 0.2 * errors[0]


def test_what_is_quantized(model: nn.Module, images: Tensor) -> None:
    small = WeightOnly(4).apply(model)
    names = {f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert linears(small).keys() == names | {"head"}
    assert {name.split(".")[-1]: len(m.quant_w.scale[0]) for name, m in linears(small).items()} == {
        **dict.fromkeys(("qkv", "proj", "fc1", "head"), 1),  # rows of 48, shorter than a group
        "fc2": 192 // 64,
    }
    wide = linears(WeightOnly(4, group=32).apply(model))
    assert len(wide["head"].quant_w.scale[0]) == 48 // 16, "32 does not divide 48"
    assert all(m.quant_w.scale.shape == (m.out_features, 1) for m in linears(WeightOnly(8).apply(model)).values())
    assert torch.equal(small.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert not hasattr(small, "simulated"), "runtimes execute it"
    for name, m in linears(small).items():  # where round-off of another runtime cannot move them
        assert torch.equal(m.weight, m.quant_w(m.weight))
        assert torch.equal(m.weight, m.quant_w(model.get_submodule(name).weight))


def test_rounding_keeps_what_layers_give(images: Tensor) -> None:
    model = small_vit(depth=1)
    made = {rounding: WeightOnly(4, rounding=rounding).apply(model, images) for rounding in ROUNDINGS}
    grams = input_grams(model, linears(made["nearest"]), images)
    for name, gram in grams.items():
        float_weight = model.get_submodule(name).weight
        cost = {}
        for rounding, small in made.items():
            layer = linears(small)[name]
            assert torch.equal(layer.quant_w.scale, linears(made["nearest"])[name].quant_w.scale)
            off = layer.quant_w(layer.weight) - float_weight
            cost[rounding] = float(((off @ gram) * off).sum())
            assert torch.equal(layer.quant_w(layer.weight), layer.weight), "baked"
            if name == "head" and rounding != "nearest":
                by = learned_rounding if rounding == "learned" else second_order_rounding
                assert torch.equal(layer.weight, by(float_weight, gram, layer.quant_w)), "on what the float model reads"
        assert cost["second-order"] < 0.9 * cost["nearest"] and cost["learned"] < 0.9 * cost["nearest"], name
    for rounding in ("learned", "second-order"):
        assert error(made[rounding], model, images) < error(made["nearest"], model, images)


def test_learned_rounding_goes_up_or_down_by_one_step() -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 32, generator=g), torch.randn(200, 8, generator=g) @ torch.randn(8, 32, generator=g)
    w = calibrated(weight, 4, 2)
    rounded = learned_rounding(nn.Parameter(weight), x.T @ x / 200, w)
    steps = (rounded - weight) / w.scale.repeat_interleave(16, 1)
    assert steps.abs().max() <= 1.001 or (rounded == w(weight))[steps.abs() > 1].all(), "clipped ones apart"
    assert torch.equal(w(rounded), rounded) and not torch.equal(rounded, w(weight))


def test_other_anatomies(images: Tensor) -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 2)
    )
    for model in (swin.eval(), small_vit(depth=1, qkv_bias=False), small_vit(depth=1, reg_tokens=2, init_values=0.1)):
        for rounding in ("nearest", "second-order"):
            small = WeightOnly(4, rounding=rounding).apply(model, images)
            assert 0 < error(small, model, images) < 0.6
            assert not any(type(m) is nn.Linear for m in small.modules())


@pytest.mark.parametrize("partner", [EViT(keep=0.5), MCTF(r=2)], ids=str)
def test_token_steps_before_and_after(partner: vt.Step, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    after, before = slim(model, [partner, WeightOnly(4)]), slim(model, [WeightOnly(4), partner])
    with torch.no_grad():
        assert torch.equal(after(images), before(images))
    assert error(after, partner.apply(model), images) < 0.6


def test_trains(model: nn.Module, images: Tensor) -> None:
    small = WeightOnly(4).apply(model).train()
    small(images).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())


def test_memory_is_bounded_and_parts_are_kept(
    model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, told = WeightOnly(4, rounding="second-order"), []
    whole = slim(model, step, images, progress=lambda _, share: told.append(share))
    assert told == sorted(told) and len(told) == 2 + len(linears(whole))
    monkeypatch.setattr(weightonly, "GRAMS", 1)
    assert [*weightonly._at_a_time(linears(whole))] == [[name] for name in linears(whole)]
    a = slim(model, step, images, resume=tmp_path)
    monkeypatch.setattr(weightonly, "second_order_rounding", None)  # what is kept is not computed again
    b = slim(model, step, images, resume=tmp_path)
    for small in (a, b):
        assert all(torch.equal(v, small.state_dict()[k]) for k, v in whole.state_dict().items())


def test_what_is_refused(model: nn.Module, images: Tensor) -> None:
    for arguments, message in [
        ({"bits": 6}, "bits must be 8 or 4"),
        ({"group": 24}, "group must be one of"),
        ({"rounding": "up"}, "rounding must be"),
    ]:
        with pytest.raises(VitreousError, match=message):
            WeightOnly(**arguments)
    for rounding in ("learned", "second-order"):
        with pytest.raises(VitreousError, match="needs calibration images"):
            WeightOnly(rounding=rounding).apply(model)
        with pytest.raises(VitreousError, match="no calibration images"):
            WeightOnly(rounding=rounding).apply(model, images[:0])
    with pytest.raises(VitreousError, match="quantized already"):
        slim(model, [MinMax(), WeightOnly()], images)
    with pytest.raises(VitreousError, match="quantized already"):
        slim(model, [WeightOnly(), MinMax()], images)
    with pytest.raises(VitreousError, match="no linear layer"):
        WeightOnly().apply(nn.Conv2d(3, 4, 3))


def test_constant_and_zero_weights(model: nn.Module, images: Tensor) -> None:
    odd = small_vit(depth=1)
    with torch.no_grad():
        odd.blocks[0].mlp.fc1.weight.zero_()
        odd.blocks[0].mlp.fc2.weight.fill_(0.5)
    for rounding in ("nearest", "second-order"):
        small = WeightOnly(4, rounding=rounding).apply(odd, images)
        assert torch.isfinite(small(images)).all()
        fc1, fc2 = small.blocks[0].mlp.fc1, small.blocks[0].mlp.fc2
        assert fc1.quant_w(fc1.weight).eq(0).all() and torch.allclose(fc2.quant_w(fc2.weight), torch.tensor(0.5))
