"""Second-order rounding, against its formula, nearest rounding, and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.quant import gptq
from vitreous.quant.gptq import input_grams, second_order_rounding
from vitreous.quant.layers import Quantizer, QuantLinear


def unit(channels: int, bits: int = 4) -> Quantizer:
    """Grid points at the integers −limit … limit."""
    return Quantizer(bits, symmetric=True, channels=channels)


def calibrated(weight: Tensor, bits: int = 4, symmetric: bool = False, limit: int | None = None) -> Quantizer:
    quantizer = Quantizer(bits, symmetric, limit, channels=len(weight))
    quantizer.set(*quantizer.grid(*weight.aminmax(dim=1)))
    return quantizer


def correlated(rows: int = 512, inputs: int = 40, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs // 3, generator=g) @ torch.randn(inputs // 3, inputs, generator=g) + 0.1 * torch.randn(
        rows, inputs, generator=g
    )


def test_by_hand() -> None:
    """Rounding 0.4 to 0 costs 0.4; H₂₁/H₂₂ of it goes to the second weight, H's diagonal being raised by 1 % of 1.5."""
    weight, hessian = torch.tensor([[0.4, 0.4]]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert second_order_rounding(weight, hessian, unit(1)).tolist() == [[0.0, 1.0]]
    fine = Quantizer(8, symmetric=True, limit=2**20, channels=2)
    fine.low, fine.high = -(2**20), 2**20
    fine.set(torch.tensor([1.0, 1e-5]), torch.zeros(2))  # a grid for each of the two inputs
    wanted = 0.4 + 0.4 * 1.0 / 1.015
    assert second_order_rounding(weight, hessian, fine)[0, 1].item() == pytest.approx(wanted, abs=1e-5)
    # The input with the larger diagonal is rounded first wherever it stands.
    flipped = second_order_rounding(torch.tensor([[0.4, 0.4]]), hessian.flip(0, 1), unit(1))
    assert flipped.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", [128, 7])
def test_less_output_error_than_nearest(bits: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated()
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(3))
    quantizer, hessian = calibrated(weight, bits), x.T @ x
    whole = second_order_rounding(weight, hessian, quantizer)
    monkeypatch.setattr(gptq, "BLOCK", block)
    rounded = second_order_rounding(weight, hessian, quantizer)
    assert (rounded - whole).abs().gt(1e-5).float().mean() < 0.02, "blocks are only a matter of speed"

    def error(w: Tensor) -> float:
        return float(((w - weight) @ x.T).square().mean())

    assert error(rounded) < 0.5 * error(quantizer(weight))
    fresh = correlated(seed=0)[256:]
    assert ((rounded - weight) @ fresh.T).square().mean() < 0.5 * ((quantizer(weight) - weight) @ fresh.T).square().mean()


def test_among_the_best_of_all_roundings() -> None:
    x = correlated(inputs=8)
    weight = torch.rand(1, 8, generator=torch.Generator().manual_seed(1)) * 4
    rounded = second_order_rounding(weight, x.T @ x, unit(1))
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)))
    errors = ((weight.floor() + choices - weight) @ x.T).square().mean(1)
    error = ((rounded - weight) @ x.T).square().mean()
    nearest = ((weight.round() - weight) @ x.T).square().mean()
    assert error < nearest and (errors < error).sum() <= 12, "among the best 5 % of the 256"


def test_nearest_when_inputs_do_not_correlate() -> None:
    weight = torch.randn(10, 30, generator=torch.Generator().manual_seed(2))
    quantizer = calibrated(weight)
    hessian = torch.diag(torch.rand(30, generator=torch.Generator().manual_seed(4)))
    assert torch.allclose(second_order_rounding(weight, hessian, quantizer), quantizer(weight), atol=1e-6)


def test_dead_inputs_are_rounded_to_nearest() -> None:
    x = correlated()
    x[:, [0, 7, 39]] = 0
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    quantizer = calibrated(weight)
    rounded = second_order_rounding(weight, x.T @ x, quantizer)
    assert torch.isfinite(rounded).all()
    assert torch.allclose(rounded[:, [0, 7, 39]], quantizer(weight)[:, [0, 7, 39]], atol=1e-6)
    never = second_order_rounding(weight, torch.zeros(40, 40), quantizer)
    assert torch.allclose(never, quantizer(weight), atol=1e-6), "a layer that never ran"


@pytest.mark.parametrize(("bits", "symmetric", "limit"), [(8, True, None), (8, True, 63), (4, False, None), (3, False, None)])
def test_stays_on_the_grid(bits: int, symmetric: bool, limit: int | None) -> None:
    x = correlated()
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(5))
    weight[3] = 0
    quantizer = calibrated(weight, bits, symmetric, limit)
    rounded = second_order_rounding(weight, x.T @ x, quantizer)
    assert torch.equal(quantizer(rounded), rounded), "the fake quantizer leaves a baked weight where it is"
    q = (rounded / quantizer.scale[:, None]).round() + quantizer.zero_point[:, None]
    assert q.min() >= (-quantizer.limit if symmetric else 0) and q.max() <= quantizer.limit
    assert torch.equal(second_order_rounding(rounded, x.T @ x, quantizer), rounded), "nothing is left to make good"


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    x = correlated()
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(5))
    a, b = (second_order_rounding(weight, x.T @ x * factor, calibrated(weight)) for factor in (1.0, 1e-4))
    assert (a != b).float().mean() < 0.02


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(VitreousError, match=r"\[O, I\]"):
        second_order_rounding(torch.ones(2, 3), torch.eye(4), unit(2))
    with pytest.raises(VitreousError, match="scales"):
        second_order_rounding(torch.ones(2, 3), torch.eye(3), unit(3))
    with pytest.raises(VitreousError, match="NaN"):
        second_order_rounding(torch.ones(2, 3), torch.eye(3) * float("nan"), unit(2))


class Net(nn.Module):
    """A patch embedding, a layer that quantizes its input, one that does not, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second, self.idle = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(9, 2)
        x = Quantizer(4)
        x.set(torch.tensor(0.5), torch.tensor(8))
        self.first = QuantLinear(self.first, x, calibrated(self.first.weight.detach()))

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(self.embed(images).flatten(2).mT)).mean(1)


def test_grams_are_of_what_each_layer_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = Net(), torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(gptq, "BATCH", 3)
    names = ["embed", "first", "second", "idle"]
    grams = input_grams(net, names, images)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with torch.no_grad():
        tokens = net.embed(images).flatten(2).mT
        read = {"first": net.first.quant_x(tokens), "second": net.first(tokens)}
        for name, x in read.items():
            assert torch.allclose(grams[name], torch.einsum("bni,bnj->ij", x, x) / 28, rtol=1e-4, atol=1e-5)
        assert torch.equal(grams["idle"], torch.zeros(9, 9))
        # A convolution is a product of its flattened weight with patches: both give the same second moments.
        w = net.embed.weight.flatten(1)
        y = (tokens - net.embed.bias).flatten(0, 1)
        assert torch.allclose(w @ grams["embed"] @ w.T, y.T @ y / 28, rtol=1e-3, atol=1e-5)


def test_bad_images_are_named() -> None:
    with pytest.raises(VitreousError, match=r"'embed' is given NaN"):
        input_grams(Net(), ["embed"], torch.full((1, 3, 8, 8), float("nan")))
