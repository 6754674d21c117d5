"""Percentile ranges, and the histograms that they and others are read from."""

from __future__ import annotations

import pytest
import torch
from support import small_vit
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.quant.layers import Quantizer, quant_layers
from vitreous.quant.minmax import MinMax
from vitreous.quant.percentile import BINS, Histogram, Percentile, histograms


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit(depth=2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def counted(x: Tensor) -> Histogram:
    seen = Histogram(x.min(), x.max())
    for part in x.split(1000):
        seen(part)
    return seen


def test_the_ends_leave_the_share_on_either_side() -> None:
    x = torch.arange(10_001.0) - 3000  # one value in 10 000 is one step
    seen = counted(x[torch.randperm(10_001, generator=torch.Generator().manual_seed(0))])
    for share in (0.6, 0.9, 0.99, 0.999):
        low, high = seen.ends(share)
        width = 10_000 / BINS
        assert abs(float(high) - float(x.quantile(share))) <= 1 + width
        assert abs(float(low) - float(x.quantile(1 - share))) <= 1 + width
        assert (x > high).float().mean() <= 1 - share + 1e-3 and (x < low).float().mean() <= 1 - share + 1e-3
    assert [float(e) for e in seen.ends(1.0)] == [-3000.0, 7000.0]


def test_a_rare_giant_is_given_up() -> None:
    x = torch.cat((torch.linspace(-1, 1, 99_999), torch.tensor([500.0])))
    low, high = counted(x).ends(0.9999)
    assert high == pytest.approx(1, abs=0.02) and low == pytest.approx(-1, abs=0.02)


def test_the_error_is_that_of_the_nearest_level() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 2 + 1
    levels = torch.tensor([[-1.0, 0.0, 0.5, 4.0], [0.0, 1.0, 2.0, 2.0], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    nearest = (x.double()[None, :, None] - levels[:, None]).abs().amin(2).square().mean(1)
    assert torch.allclose(counted(x).error(levels), nearest, rtol=1e-4)


def test_what_is_constant_or_zero_is_counted_where_it_is() -> None:
    for value in (0.0, 3.0, -2e4):
        seen = counted(torch.full((7,), value))
        assert seen.counts.sum() == 7 and [float(e) for e in seen.ends(0.99)] == [value, value]
        assert float(seen.error(torch.tensor([[value - 9, value]], dtype=torch.float64))) == pytest.approx(0, abs=1e-3)


def test_counts_do_not_depend_on_batches(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    built = MinMax().apply(model, images)
    before = {n: h.counts for n, h in histograms(built, images).items()}
    assert all(c.sum() % len(images) == 0 and len(c) == BINS for c in before.values())
    monkeypatch.setattr("vitreous.quant.percentile.BATCH", 7)
    monkeypatch.setattr("vitreous.quant.calibration.BATCH", 7)
    for name, seen in histograms(built, images).items():
        assert (seen.counts.cumsum(0) - before[name].cumsum(0)).abs().max() <= 0.01 * seen.counts.sum(), name
    assert all(m.watcher is None for m in built.modules() if isinstance(m, Quantizer))


def test_the_whole_share_is_minmax_and_less_is_narrower(model: nn.Module, images: Tensor) -> None:
    step = {"reduce_range": False}
    whole, plain = Percentile(share=1.0, **step).apply(model, images), MinMax(**step).apply(model, images)
    a, b = whole.state_dict(), plain.state_dict()
    assert all(torch.allclose(a[k].double(), b[k].double(), rtol=1e-6) for k in a)
    some = Percentile(share=0.999, **step).apply(model, images)
    for (name, x), y in zip(quant_layers(some).items(), quant_layers(plain).values(), strict=True):
        assert x.quant_x.scale < y.quant_x.scale, name
        assert torch.equal(x.quant_w.scale, y.quant_w.scale), "weights keep their range"


def test_wins_where_a_few_values_are_wild(images: Tensor) -> None:
    """A single token of a thousand is far out, as with the registers that ViTs make for themselves."""
    model = small_vit(depth=2)
    x = torch.randn(4000, 48, generator=torch.Generator().manual_seed(0))
    x[::2000] *= 200
    layer = quant_layers(MinMax(4, 4).apply(model, images))["blocks.0.mlp.fc1"]
    errors = {}
    for share in (1.0, 0.999):
        layer.quant_x.set(*layer.quant_x.grid(*counted(x.flatten()).ends(share)))
        errors[share] = float((layer.quant_x(x) - x)[1:2000].square().mean())
    assert errors[0.999] < 0.1 * errors[1.0]


def test_halved_ranges_are_not_clipped(model: nn.Module, images: Tensor) -> None:
    """A key beyond 63 would overflow the kernels for which the range was halved."""
    clipped = Percentile(share=0.99, reduce_range=True).apply(model, images)
    whole = MinMax(reduce_range=True).apply(model, images)
    for a, b in zip(clipped.blocks, whole.blocks, strict=True):
        assert torch.allclose(a.attn.operands["k"].scale, b.attn.operands["k"].scale)
        assert a.attn.operands["q"].scale < b.attn.operands["q"].scale


def test_refuses_a_share_that_is_none() -> None:
    for share in (0.5, 1.01, 99.9):
        with pytest.raises(VitreousError, match="share must be"):
            Percentile(share=share)
