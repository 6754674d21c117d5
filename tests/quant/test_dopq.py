"""DopQ: the tangent grid, and the shared scale."""

from __future__ import annotations

import copy

import pytest
import torch
from support import error, small_vit
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.quant import RepQ
from vitreous.quant.dopq import DopQ, TanQ, fit_tan
from vitreous.quant.layers import LogSqrt2, Quantizer
from vitreous.steps import history_of
from vitreous.work import Work, working


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Some channels of the LayerNorms are far wider than the rest."""
    model = small_vit(depth=2)
    with torch.no_grad():
        for block in model.blocks:
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[:4] *= 25
                layer.weight[:, :4] /= 25
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def others() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def tan_grid(bits: int, near_zero: float, near_one: float) -> TanQ:
    quantizer = TanQ(bits)
    quantizer.near_zero.fill_(near_zero)
    quantizer.near_one.fill_(near_one)
    return quantizer


def test_the_tangent_grid_by_hand() -> None:
    """Both angles 45°, 2 bits: tangents −1, −1/3, 1/3, 1 are angles of −45°, −18.43°, 18.43°, 45°."""
    quantizer = tan_grid(2, 1, 1)
    levels = torch.tensor([0, 26.565 / 90, 63.435 / 90, 1])
    assert torch.allclose(quantizer(torch.linspace(0, 1, 1001)).unique(), levels, atol=1e-5)
    # Borders lie where tangents do: −2/3 is −33.69°, so (45 − 33.69)/90 = 0.1257.
    assert quantizer(torch.tensor([0.125, 0.126, 0.5001])).tolist() == pytest.approx([0, 0.29517, 0.70483], abs=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 6, 7])
@pytest.mark.parametrize("near_zero", [0.5, 20.0, 1000.0])
@pytest.mark.parametrize("near_one", [0.05, 3.0, 100.0])
def test_monotone_idempotent_bounded(bits: int, near_zero: float, near_one: float) -> None:
    quantizer, x = tan_grid(bits, near_zero, near_one), torch.linspace(0, 1, 50_001)
    y = quantizer(x)
    assert (y.diff() >= -1e-6).all() and torch.allclose(quantizer(y), y, atol=1e-5)
    assert y[0].abs() < 1e-6 and y[-1] == pytest.approx(1, abs=1e-6) and len(y.unique()) <= 2**bits
    assert quantizer(torch.tensor([-3.0, 5.0])).tolist() == pytest.approx([0, 1], abs=1e-6), "what lies outside is clipped"
    assert (y - x).abs().max() <= y.unique().diff().max() + 1e-5


def test_dense_at_both_ends() -> None:
    def gaps(near_zero: float, near_one: float) -> Tensor:
        return tan_grid(4, near_zero, near_one)(torch.linspace(0, 1, 200_001)).unique().diff()

    both = gaps(3, 3)
    assert both[0] < 0.4 * both.max() and both[-1] < 0.4 * both.max() and both.argmax() == 7
    assert gaps(9, 3)[0] < gaps(3, 3)[0] and gaps(3, 9)[-1] < gaps(3, 3)[-1]


def test_gradient_passes() -> None:
    x = torch.rand(20, requires_grad=True)
    TanQ(4)(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(20))


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_fits_what_softmax_gives(bits: int) -> None:
    x = torch.softmax(3 * torch.randn(300, 100, generator=torch.Generator().manual_seed(0)), -1).flatten()
    quantizer, even = TanQ(bits), Quantizer(bits)
    fit_tan(quantizer, x)
    even.set(*even.grid(x.min(), x.max()))

    def mse(q: nn.Module) -> float:
        return float((q(x) - x).square().mean())

    assert mse(quantizer) < 0.6 * mse(even) and mse(quantizer) < mse(LogSqrt2(bits))
    assert mse(quantizer) < min(mse(tan_grid(bits, a, b)) for a in (0.5, 2.0, 8.0) for b in (0.1, 1.0, 4.0))
    assert quantizer.near_zero > quantizer.near_one, "most values are near 0"


def test_on_models(model: nn.Module, images: Tensor, others: Tensor) -> None:
    six, four = DopQ(6, 6).apply(model, images), DopQ(4, 4).apply(model, images)
    assert error(six, model, others) < 0.6 * error(four, model, others) and error(four, model, others) < 0.8
    assert error(four, model, others) < 1.05 * error(RepQ(4, 4).apply(model, images), model, others)
    assert "4-bit" in four.simulated
    for block in four.blocks:
        assert isinstance(block.attn.operands["probs"], TanQ) and block.attn.operands["probs"].near_zero != 1
    again = copy.deepcopy(model).eval()
    DopQ(4, 4).build(again, history_of(four).done[-1][1])
    again.load_state_dict(four.state_dict())
    with torch.no_grad():
        assert torch.equal(again(others), four(others))
        assert torch.equal(DopQ(4, 4).apply(model, images)(others), four(others))


def test_the_median_is_shared(model: nn.Module, images: Tensor) -> None:
    """γ/r1 and the scale tell the channels' own scales: s = s̃·γ/γ̃."""
    small, mean = DopQ(4, 4).apply(model, images), RepQ(4, 4).apply(model, images)
    for new, other, old in zip(small.blocks, mean.blocks, model.blocks, strict=True):
        scales = new.attn.qkv.quant_x.scale * old.norm1.weight / new.norm1.weight
        assert new.attn.qkv.quant_x.scale == pytest.approx(float(scales.abs().median()), rel=1e-4)
        assert other.attn.qkv.quant_x.scale > 1.5 * new.attn.qkv.quant_x.scale, "the mean follows the wide channels"


def test_a_shared_scale_cancels(model: nn.Module, images: Tensor, others: Tensor) -> None:
    """What the docstring says of MOSF: softmax apart, DopQ without reconstruction computes what RepQ does."""
    a, b = (step(4, 4, softmax=False).apply(model, images) for step in (DopQ, RepQ))
    with torch.no_grad():
        assert torch.allclose(a(others), b(others), atol=1e-3)


def test_eight_bits_run_as_integers(model: nn.Module, images: Tensor, others: Tensor) -> None:
    for softmax in (None, True):
        small, same = (step(softmax=softmax).apply(model, images) for step in (DopQ, RepQ))
        assert not getattr(small, "simulated", "") and not any(isinstance(m, TanQ) for m in small.modules())
        assert error(small, model, others) == pytest.approx(error(same, model, others), rel=0.02)


def test_odd_input(model: nn.Module, images: Tensor) -> None:
    for given in (torch.nn.functional.pad(torch.ones(2, 3, 1, 1), (0, 31, 0, 31)), images[:1]):
        small = DopQ(4, 4).apply(model, given)
        with torch.no_grad():
            assert torch.isfinite(small(images)).all()
    with pytest.raises(VitreousError, match="no calibration images"):
        DopQ(4, 4).apply(model, images[:0])
    with pytest.raises(VitreousError, match="quantized already"):
        DopQ(4, 4).apply(small, images)


def test_tells_its_progress(model: nn.Module, images: Tensor) -> None:
    told: list[float] = []
    with working(Work(told.append)):
        DopQ(4, 4).apply(model, images)
    assert told == [0.5, 1.0], "one for the softmax of each block"
