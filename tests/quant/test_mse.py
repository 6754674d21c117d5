"""The least squared error."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from support import small_vit
from torch import Tensor, nn

from vitreous.quant.layers import Quantizer, quant_layers
from vitreous.quant.minmax import MinMax
from vitreous.quant.mse import MSE, search_range, search_weight
from vitreous.quant.percentile import Histogram, histograms


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit(depth=2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def counted(x: Tensor) -> Histogram:
    seen = Histogram(x.min(), x.max())
    seen(x)
    return seen


def error(quantizer: Quantizer, x: Tensor, scale: Tensor, zero_point: Tensor) -> float:
    quantizer.set(scale, zero_point)
    return float((quantizer(x) - x).double().square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_range_of_a_finer_search_is_much_better(bits: int, symmetric: bool) -> None:
    x = torch.randn(8_000, generator=torch.Generator().manual_seed(bits)) ** 3 + 1  # heavy tails, lopsided
    quantizer = Quantizer(bits, symmetric)
    found = error(quantizer, x, *search_range(quantizer, counted(x)))
    assert found <= error(quantizer, x, *quantizer.grid(x.min(), x.max())) * (1 + 1e-6)
    shares = torch.linspace(0.04, 1, 25)
    pairs = torch.cartesian_prod(shares, shares) if not symmetric else shares[:, None].expand(-1, 2)
    every = min(error(quantizer, x, *quantizer.grid(a * x.min(), b * x.max())) for a, b in pairs)
    assert found <= 1.05 * every


def test_gaussian_at_four_bits_is_clipped_where_theory_says() -> None:
    """A uniform quantizer of 16 levels for a normal variable is best with steps of 0.335 σ (Max, 1960)."""
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer(4)
    scale, _ = search_range(quantizer, counted(x))
    assert float(scale) == pytest.approx(0.335, rel=0.05)
    scale, _ = search_weight(quantizer, x.view(8, -1))
    assert scale.tolist() == pytest.approx([0.335] * 8, rel=0.05)


def test_what_fills_its_grid_is_not_clipped() -> None:
    x = torch.arange(-5, 11).repeat(50) / 10.0
    quantizer = Quantizer(4)
    scale, zero = search_range(quantizer, counted(x))
    assert float(scale) == pytest.approx(0.1) and int(zero) == 5
    assert search_weight(quantizer, x[None])[0].item() == pytest.approx(0.1)


@pytest.mark.parametrize("bits", [3, 8])
def test_channels_of_weights_are_searched_apart(bits: int) -> None:
    g = torch.Generator().manual_seed(2)
    w = torch.randn(6, 300, generator=g) ** 3 * torch.tensor([1.0, 10, 0.1, 5, 1, 1])[:, None]
    w[4], w[5] = 0, 2.5
    quantizer = Quantizer(bits, symmetric=bits == 8, channels=6)
    scale, zero = search_weight(quantizer, w)
    alone = [search_weight(quantizer, row[None]) for row in w]
    assert torch.equal(scale, torch.cat([s for s, _ in alone])) and torch.equal(zero, torch.cat([z for _, z in alone]))
    quantizer.set(scale, zero)
    found = (quantizer(w) - w).square().sum(1)
    quantizer.set(*quantizer.grid(*w.aminmax(dim=1)))
    assert (found <= (quantizer(w) - w).square().sum(1) + 1e-9).all() and torch.isfinite(found).all()
    assert found[4] == 0 and found[5] < 1e-6


def test_every_tensor_of_a_model_is_at_least_as_near_as_with_minmax(model: nn.Module, images: Tensor) -> None:
    for bits in (4, 8):
        small, plain = (s(bits, bits, softmax=True).apply(model, images) for s in (MSE, MinMax))
        seen = histograms(small, images)
        narrower = 0
        for name, histogram in seen.items():
            a, b = small.get_submodule(name), plain.get_submodule(name)
            levels = [(torch.arange(q.low, q.high + 1) - q.zero_point) * q.scale.double() for q in (a, b)]
            nearest, usual = histogram.error(torch.stack(levels)).tolist()
            assert nearest <= usual * (1 + 1e-5), name
            narrower += bool(a.scale < b.scale)
        assert narrower > (0.5 if bits == 4 else 0.2) * len(seen)


def test_four_bits_lose_less_than_with_minmax(model: nn.Module, images: Tensor) -> None:
    others = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = model(others)
        errors = [float((s(4, 4).apply(model, images)(others) - exact).norm() / exact.norm()) for s in (MSE, MinMax)]
    assert errors[0] < 0.95 * errors[1]


def test_halved_ranges_are_not_clipped(model: nn.Module, images: Tensor) -> None:
    small = MSE(reduce_range=True).apply(model, images)
    for layer in quant_layers(small).values():
        q = (layer.weight / layer.quant_w.scale.view(-1, *[1] * (layer.weight.ndim - 1))).abs().flatten(1)
        assert torch.allclose(q.amax(1), torch.tensor(63.0), atol=1e-3)
    for a, b in zip(small.blocks, MinMax(reduce_range=True).apply(model, images).blocks, strict=True):
        assert torch.allclose(a.attn.operands["k"].scale, b.attn.operands["k"].scale, rtol=1e-5)


def test_other_blocks_and_nothing_at_random(images: Tensor) -> None:
    swin = dict(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    model = timm.create_model("swin_tiny_patch4_window7_224", **swin).eval()
    a, b = MSE(4, 4).apply(model, images), MSE(4, 4).apply(model, images)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert all(math.isfinite(float(layer.quant_x.scale)) for layer in quant_layers(a).values())
