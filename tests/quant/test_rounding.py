"""Learned rounding, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.quant.layers import Quantizer
from vitreous.quant.rounding import PENALTY, SoftRounding, annealed, learn_rounding


def quantizer(weight: Tensor, bits: int, limit: int | None = None) -> Quantizer:
    q = Quantizer(bits, symmetric=bits == 8, limit=limit, channels=len(weight))
    q.set(*q.grid(*weight.flatten(1).aminmax(dim=1)))
    return q


def by_hand(v: float) -> SoftRounding:
    """One weight of 0.7 between 0.5 and 1, whose variable is `v`."""
    q = Quantizer(4, symmetric=True, channels=1)
    q.set(torch.tensor([0.5]), torch.tensor([0]))
    soft = SoftRounding(torch.tensor([[0.7]]), q)
    with torch.no_grad():
        soft.v.fill_(v)
    return soft


def test_the_rectified_sigmoid_by_hand() -> None:
    middle = by_hand(0.0)  # σ = 0.5, h = 0.5·1.2 − 0.1 = 0.5
    assert middle().item() == pytest.approx(0.75)
    some = by_hand(1.0)  # σ = 0.7310586, h = 0.7772703, 2h − 1 = 0.5545406
    assert some().item() == pytest.approx(0.8886352, abs=1e-6)
    # The penalty 1 − |2h − 1|³ has the slope −6·0.5545406² in h, and h in V the slope 1.2·0.7310586·0.2689414.
    assert some.gradient(torch.zeros(1, 1), 3.0).item() == pytest.approx(-PENALTY * 6 * 0.5545406**2 * 0.2359343, rel=1e-5)
    assert some.hard().item() == 1.0 and by_hand(-0.1).hard().item() == 0.5
    for v, end in ((3.0, 1.0), (-3.0, 0.5)):  # σ(3) = 0.953, h = 1.043, cut to 1
        assert by_hand(v)().item() == end and by_hand(v).gradient(torch.ones(1, 1), 2.0).item() == 0


def test_it_starts_at_the_float_weight_and_rounds_to_its_neighbours() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 20)
    for bits in (8, 4):
        q = quantizer(weight, bits)
        soft = SoftRounding(weight, q)
        # Asymmetric grids round the zero point, which may cut the ends by half a step; within it is exact.
        low, high = ((end - q.zero_point[:, None]) * q.scale[:, None] for end in (q.low, q.high))
        inner = (weight > low) & (weight < high)
        assert inner.float().mean() > 0.9
        assert torch.allclose(soft()[inner], weight[inner], atol=1e-5)
        assert torch.allclose(soft.hard(), q(weight), atol=1e-5), "nearest, before anything is learned"
        with torch.no_grad():
            soft.v.uniform_(-5, 5)
        hard = soft.hard()
        assert torch.allclose(q(hard), hard, atol=1e-6), "the quantizer leaves it where it is"
        assert ((hard - weight).abs() <= 1.01 * q.scale[:, None] + 1e-6)[inner].all()
        soft().sum().backward()
        assert soft.v.grad is not None and (soft.v.grad >= 0).all() and soft.v.grad.any()


@pytest.mark.parametrize("beta", [None, 2.0, 11.5])
def test_the_gradient_is_that_of_loss_and_penalty(beta: float | None) -> None:
    torch.manual_seed(0)
    weight, slope = torch.randn(6, 20), torch.randn(6, 20)
    for bits in (8, 3):
        soft = SoftRounding(weight, quantizer(weight, bits))
        with torch.no_grad():
            soft.v.uniform_(-4, 4)
        loss = (soft() * slope).sum()
        if beta is not None:
            loss = loss + PENALTY * (1 - (2 * soft.h() - 1).abs() ** beta).sum()
        loss.backward()
        at_the_end = (soft.floor + soft.h() - soft.low).abs().minimum((soft.floor + soft.h() - soft.high).abs()) < 1e-6
        got = soft.gradient(slope, beta)
        assert soft.v.grad is not None and torch.allclose(got[~at_the_end], soft.v.grad[~at_the_end], atol=1e-6)
        assert got.any() and (got == 0).any()


def test_limits_are_kept() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 30)
    q = quantizer(weight, 8, limit=63)
    soft = SoftRounding(weight * 1.2, q)  # beyond the grid
    with torch.no_grad():
        soft.v.fill_(9)
        assert (soft() / q.scale[:, None]).abs().max() < 63.01
    assert (soft.hard() / q.scale[:, None]).round().abs().max() == 63


def test_beta_warms_up_and_falls() -> None:
    assert annealed(0.0) is None and annealed(0.19) is None
    betas = [annealed(0.2 + 0.01 * i) for i in range(81)]
    assert betas[0] == pytest.approx(20) and betas[-1] == pytest.approx(2) and betas[40] == pytest.approx(11)
    assert betas == sorted(betas, reverse=True)


def correlated(rows: int, width: int) -> Tensor:
    return torch.randn(rows, 4) @ torch.randn(4, width) + 0.1 * torch.randn(rows, width)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_it_beats_nearest_on_the_output(bits: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    x = correlated(400, 32)
    y = layer(x).detach()
    q = quantizer(layer.weight.detach(), bits)
    learned = learn_rounding(layer, x.reshape(20, 20, 32), y.reshape(20, 20, 16), q, iterations=150)
    nearest = q(layer.weight.detach())
    assert learned.shape == layer.weight.shape and torch.allclose(q(learned), learned, atol=1e-6)
    assert ((learned - layer.weight).abs() <= 1.01 * q.scale[:, None]).all()

    def error(w: Tensor) -> float:
        return float((nn.functional.linear(x, w, layer.bias) - y).square().mean())

    assert error(learned) < 0.35 * error(nearest)
    assert not layer.weight.grad and torch.equal(learned, learn_rounding(layer, x, y, q, 150)), "the same each time"


def test_no_output_is_worse_than_rounded_to_nearest() -> None:
    """A few iterations at the highest rate leave weights on their way."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 64), correlated(400, 32)
    q = quantizer(layer.weight.detach(), 4)
    learned = learn_rounding(layer, x, layer(x).detach(), q, iterations=8)

    def errors(w: Tensor) -> Tensor:
        return (x @ (w - layer.weight.detach()).T).square().mean(0)

    assert (errors(learned) <= errors(q(layer.weight.detach())) + 1e-9).all()
    assert not torch.equal(learned, q(layer.weight.detach()))


def test_it_makes_up_for_what_its_input_lost() -> None:
    """Asymmetric reconstruction: the target is the float output on the float input."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, bias=False)
    x = correlated(400, 32)
    lost = x.clone()
    lost[:, :4] = 0
    y = layer(x).detach()
    q = quantizer(layer.weight.detach(), 4)
    knows, blind = learn_rounding(layer, lost, y, q, 150), learn_rounding(layer, x, y, q, 150)
    assert (lost @ knows.T - y).square().mean() < 0.8 * (lost @ blind.T - y).square().mean()


def test_convolutions_are_learned_too_and_work_without_gradients_around() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 4, 4)
    x = nn.functional.interpolate(torch.randn(16, 3, 4, 4), 16, mode="bilinear")
    y = layer(x).detach()
    q = quantizer(layer.weight.detach(), 4)
    with torch.no_grad():
        learned = learn_rounding(layer, x, y, q, 150)
        errors = [(nn.functional.conv2d(x, w, layer.bias, 4) - y).square().mean() for w in (learned, q(layer.weight))]
    assert errors[0] < 0.5 * errors[1]


def test_bad_input() -> None:
    layer, q = nn.Linear(4, 2), quantizer(torch.ones(2, 4), 4)
    with pytest.raises(VitreousError, match="NaN"):
        learn_rounding(layer, torch.full((3, 4), float("nan")), torch.zeros(3, 2), q, 2)
    with pytest.raises(VitreousError, match="groups"):
        learn_rounding(nn.Conv2d(4, 4, 2, 2, groups=2), torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 2, 2), q, 2)
    with pytest.raises(VitreousError, match="iterations"):
        learn_rounding(layer, torch.zeros(3, 4), torch.zeros(3, 2), q, 0)
    constant = learn_rounding(layer, torch.zeros(3, 4), torch.zeros(3, 2), q, 5)
    assert torch.isfinite(constant).all()
