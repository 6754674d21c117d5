"""I&S-ViT: the shift-uniform-log2 quantizer, and weights learned in three stages."""

from __future__ import annotations

import pytest
import torch
from support import error, small_vit
from torch import Tensor, nn

import vitreous.quant.isvit as module
from vitreous.errors import VitreousError
from vitreous.quant.calibration import Watch
from vitreous.quant.isvit import SHIFTS, ChannelWise, ISViT, ShiftUniformLog2, fit_weight
from vitreous.quant.layers import Quantizer, quant_layers
from vitreous.quant.reconstruction import record


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def others() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def uneven() -> nn.Module:
    """A few channels of the LayerNorms are far wider than the rest, as in real ViTs."""
    model = small_vit(depth=2)
    with torch.no_grad():
        for block in model.blocks:
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[:4] *= 25
                norm.bias[4:8] += 8
                layer.weight[:, :4] /= 25
    return model


def covering(low: float, high: float, shift: float, bits: int) -> ShiftUniformLog2:
    q = ShiftUniformLog2(bits)
    q.cover(torch.tensor(low), torch.tensor(high), shift)
    return q


def test_the_shifted_logarithm_by_hand() -> None:
    """Two bits from 0 to 0.875, shift 1/8: log2 of 1/8 to 1 is −3 to 0, in steps of 1; back they are 0, 1/8, 3/8 and 7/8."""
    q = covering(0.0, 0.875, 0.125, 2)
    x = torch.tensor([0.0, 0.05, 0.06, 0.2, 0.24, 0.5, 0.6, 0.875, 2.0])
    #  log2(x + 1/8):  −3, −2.51, −2.43, −1.62, −1.45, −0.68, −0.46, 0, beyond
    expected = torch.tensor([0.0, 0.0, 0.125, 0.125, 0.375, 0.375, 0.875, 0.875, 0.875])
    assert torch.allclose(q(x), expected, atol=1e-6)
    # Steps of 1.5 (log2 from −3 to 1.5, two bits): levels −3, −1.5, 0, 1.5 come back as 2 to the rounded −3, −2, 0, 2.
    wide = covering(0.0, 2**1.5 - 0.125, 0.125, 2)
    assert torch.allclose(wide(torch.tensor([0.0, 0.25, 1.0, 2.5])), torch.tensor([0.0, 0.125, 0.875, 3.875]), atol=1e-6)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_properties_of_the_shifted_logarithm(bits: int, shift: float) -> None:
    q = covering(0.0, 1.0, shift, bits)
    x = torch.linspace(0, 1, 4001)
    y = q(x)
    assert torch.allclose(q(y), y, atol=1e-6), "idempotent"
    assert (y.diff() >= 0).all(), "monotone"
    assert len(y.unique()) <= 2**bits
    # Inclusive: every input is within a step of the logarithm and the rounding to a power of two.
    ratio = torch.log2((y + shift) / (x + shift)).abs()
    assert ratio.max() <= float(q.width) / 2 + 0.5 + 1e-4
    assert (y >= -shift).all() and (y <= 2 ** (0.5 + 0.001) * (1 + shift)).all()
    x = x.clone().requires_grad_(True)
    q(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)), "the gradient passes"


def test_the_search_takes_the_shift_with_the_least_error() -> None:
    torch.manual_seed(0)
    for sharpness in (1.0, 8.0):
        probs = torch.softmax(sharpness * torch.randn(200, 17), -1)
        seen = Watch("probs", False, 10**6)
        seen(probs)
        q = ShiftUniformLog2(3)
        q.search(seen)
        errors = [float((covering(float(probs.min()), float(probs.max()), s, 3)(probs) - probs).square().mean()) for s in SHIFTS]
        assert float((q(probs) - probs).square().mean()) == pytest.approx(min(errors), rel=1e-4)
        assert float(q.shift) == pytest.approx(SHIFTS[errors.index(min(errors))])
    constant = Watch("probs", False, 10)
    constant(torch.zeros(5))
    q.search(constant)
    assert torch.isfinite(q(torch.rand(5))).all()


def test_a_grid_for_each_channel() -> None:
    """Scales 0.5 and 2, zero points −3 and 20, which lie outside of 0 … 15: the channels reach 1.5 … 9 and −40 … −10."""
    q = ChannelWise(4, torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 20.0]))
    x = torch.tensor([[1.0, -50.0], [2.2, -21.2], [9.4, 0.0]], requires_grad=True)
    y = q(x)
    assert torch.allclose(y, torch.tensor([[1.5, -40.0], [2.0, -22.0], [9.0, -10.0]]))
    assert torch.equal(q(y), y)
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])), "only what is not clipped"


def test_weight_grids() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 400)
    weight[:, 0] = 12.0  # an outlier that is worth clipping at few bits
    for bits in (4, 8):
        q = Quantizer(bits, symmetric=bits == 8, channels=3)
        fit_weight(q, weight)
        exact = Quantizer(bits, symmetric=bits == 8, channels=3)
        exact.set(*exact.grid(*weight.aminmax(dim=1)))
        errors = [float((g(weight) - weight).square().mean()) for g in (q, exact)]
        assert errors[0] < 0.9 * errors[1] if bits == 4 else errors[0] == errors[1]


def test_learning_pays_and_each_stage_does_its_part(uneven: nn.Module, images: Tensor, others: Tensor) -> None:
    before = ISViT(3, 4, iterations=0).apply(uneven, images)
    after = ISViT(3, 4, iterations=40, batch=8).apply(uneven, images)
    assert error(after, uneven, others) < 0.85 * error(before, uneven, others)
    for p, q in zip(uneven.parameters(), after.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad and q.grad is None
    assert not after.training


def test_the_stages(uneven: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool, bool]] = []
    floats = [record(uneven, f"blocks.{i}", images)[0] for i in (0, 1)] * 2

    def spy(unit: nn.Module, x: Tensor, y: Tensor, parameters: list, *rest: object) -> None:
        layers = [*quant_layers(unit).values()]
        assert {id(p) for p in parameters} == {id(p) for layer in layers for p in (layer.weight, layer.bias)}
        if len(layers) == 4:
            as_floats = torch.allclose(x, floats[len(seen)], atol=1e-4)
            seen.append((isinstance(layers[0].quant_x, ChannelWise), layers[0].quant_w.watcher is None, as_floats))
            assert isinstance(layers[1].quant_x, Quantizer)

    monkeypatch.setattr(module, "descend", spy)
    ISViT(4, 4).apply(uneven, images)
    assert seen == [(True, False, True)] * 2 + [(False, True, False)] * 2


def test_what_is_learned_lies_on_the_grid_and_within_the_limit(uneven: nn.Module, images: Tensor, others: Tensor) -> None:
    for reduced, limit in ((True, 63), (False, 127)):
        small = ISViT(iterations=6, batch=4, reduce_range=reduced).apply(uneven, images)
        assert not getattr(small, "simulated", None) and error(small, uneven, others) < 0.12
        for layer in quant_layers(small).values():
            q = layer.weight / layer.quant_w.scale[:, None].reshape(-1, *[1] * (layer.weight.ndim - 1))
            assert torch.allclose(q, q.round(), atol=1e-3) and q.abs().max() < limit + 0.1
            assert isinstance(layer.quant_x, Quantizer) and layer.quant_x.scale.ndim == 0
    few = ISViT(4, 4, iterations=0).apply(uneven, images)
    wide, even = (record(m, "blocks.0.norm1", images)[1].flatten(0, 1).aminmax(dim=0) for m in (uneven, few))
    assert (wide.max - wide.min).max() > 20 * (wide.max - wide.min).median()
    assert (even.max - even.min).max() < 2 * (even.max - even.min).median(), "the channels' scales are in the LayerNorm"
    probs = few.blocks[0].attn.operands["probs"]
    assert isinstance(probs, ShiftUniformLog2) and probs.bits == 4
    with pytest.raises(VitreousError, match="iterations"):
        ISViT(iterations=-1)
