"""The grids themselves: levels, zero points, powers of √2, and what runtimes can take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitreous.quant.calibration import search, search_log, weight_grid
from vitreous.quant.layers import LogSqrt2, Quantizer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_output_lies_on_the_grid_and_near_its_input(x: Tensor, bits: int, symmetric: bool) -> None:
    quantizer = Quantizer(bits, symmetric)
    quantizer.set(*quantizer.grid(x.amin(), x.amax()))
    q = (quantizer(x) / quantizer.scale).round() + quantizer.zero_point
    assert torch.allclose((q - quantizer.zero_point) * quantizer.scale, quantizer(x), atol=1e-6)
    assert q.min() >= (-(2 ** (bits - 1)) + 1 if symmetric else 0) and q.max() <= 2 ** (bits - symmetric) - 1
    assert (quantizer(x) - x).abs().max() <= quantizer.scale * (0.5 if symmetric else 1.01)
    assert quantizer(torch.zeros(3)).eq(0).all(), "zero must be exact"


def test_one_scale_for_each_channel(x: Tensor) -> None:
    rows = x * torch.tensor([1.0, 10.0, 100.0, 0.01])[:, None]
    quantizer = Quantizer(8, symmetric=True, channels=4)
    quantizer.set(*quantizer.grid(*rows.aminmax(dim=1)))
    assert ((quantizer(rows) - rows).abs().amax(1) <= 0.501 * quantizer.scale).all()
    assert torch.allclose(quantizer.scale, rows.abs().amax(1) / 127)


def test_a_reduced_range_uses_half_of_the_integers(x: Tensor) -> None:
    quantizer = Quantizer(8, symmetric=True, limit=63)
    quantizer.set(*quantizer.grid(x.amin(), x.amax()))
    assert (quantizer(x) / quantizer.scale).round().abs().max() == 63


def test_what_is_constant_gives_no_nan() -> None:
    for value in (0.0, 3.0, -2.0):
        for symmetric in (False, True):
            quantizer = Quantizer(8, symmetric)
            constant = torch.full((5,), value)
            quantizer.set(*quantizer.grid(constant.amin(), constant.amax()))
            assert torch.allclose(quantizer(constant), constant, rtol=1e-5)
            assert torch.isfinite(quantizer(torch.randn(9))).all()


def test_log2_with_the_parity_scale_is_log_sqrt2() -> None:
    """Section 3.3 of RepQ-ViT: 2^(−⌈q/2⌉)·s̃ = s·√2^(−q)."""
    p = torch.linspace(0, 1, 4001)
    for bits, scale in ((4, 0.7), (3, 1.0), (6, 0.2)):
        quantizer = LogSqrt2(bits)
        quantizer.scale.fill_(scale)
        q = torch.clamp(torch.round(-2 * torch.log2(p / scale)), min=0)
        expected = torch.where(q < 2**bits, scale * 2 ** (-q / 2), 0.0)
        assert torch.allclose(quantizer(p), expected, rtol=1e-6, atol=0)
        assert quantizer(p).unique().numel() <= 2**bits + 1
    assert torch.isfinite(quantizer(torch.zeros(3))).all()


def test_gradients_pass_through() -> None:
    p = torch.rand(20, requires_grad=True)
    LogSqrt2(4)(p).sum().backward()
    assert p.grad is not None and torch.equal(p.grad, torch.ones(20))


def test_the_search_keeps_the_percentile_with_the_least_error() -> None:
    g = torch.Generator().manual_seed(0)
    calm = torch.rand(20_000, generator=g)
    wild = calm.clone()
    wild[::1000] *= 20  # one in a thousand: the wide ranges waste levels on them
    quantizer = Quantizer(4)
    for x, p in ((calm, 0.99999), (wild, None)):
        scale, zero = search(x[:, None], quantizer.grid, 0, 15)

        def error(s: Tensor, z: Tensor, x: Tensor = x) -> float:
            return float((((x / s).round() + z).clamp(0, 15).sub(z).mul(s) - x).square().mean())

        every = [quantizer.grid(x.quantile(1 - c), x.quantile(c)) for c in (0.999, 0.9999, 0.99999)]
        assert error(scale, zero) == pytest.approx(min(error(*grid) for grid in every), rel=1e-3)
        if p:
            assert scale.item() == pytest.approx(float(x.quantile(p)) / 15, rel=1e-2)


def test_the_search_treats_columns_apart() -> None:
    x = torch.randn(5000, 6, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7)
    quantizer = Quantizer(4)
    scale, zero = search(x, quantizer.grid, 0, 15)
    alone = [search(x[:, [i]], quantizer.grid, 0, 15) for i in range(6)]
    assert torch.allclose(scale, torch.cat([s for s, _ in alone])) and torch.equal(zero, torch.cat([z for _, z in alone]))


def test_the_scale_of_a_logarithmic_grid_is_searched() -> None:
    """Below a few rare ones lie most values, on which the grid should begin."""
    x = torch.cat([0.83 * torch.rand(20_000, generator=torch.Generator().manual_seed(0)) ** 0.2, torch.ones(10)])
    quantizer = LogSqrt2(4)
    scales = [x.quantile(p) for p in (0.999, 0.9999, 0.99999)]
    errors = [float((quantizer.on_grid(x, s) - x).square().mean()) for s in scales]
    assert errors[0] < 0.97 * min(errors[1:]) and search_log(x, quantizer) == scales[0]


def test_weights_are_clipped_below_eight_bits_alone() -> None:
    weight = torch.rand(3, 40_000, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 12.0
    for bits in (4, 8):
        q = Quantizer(bits, symmetric=bits == 8, channels=3)
        found, whole = weight_grid(weight, q)[0], q.grid(*weight.aminmax(dim=1))[0]
        assert torch.equal(found, whole) if bits == 8 else (found < 0.2 * whole).all()
