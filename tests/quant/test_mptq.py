"""MPTQ-ViT: the two regions, the bias term, and who gets how many bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support import error, small_vit, uneven_vit
from torch import Tensor, nn

from vitreous.quant.layers import FakeQuantizer, Quantizer, QuantLinear, quant_layers
from vitreous.quant.minmax import MinMax
from vitreous.quant.mptq import MPTQ, TwoRegion, before, greedy, only, parts, scouts
from vitreous.quant.mse import MSE
from vitreous.quant.percentile import Histogram
from vitreous.quant.smoothquant import SmoothQuant
from vitreous.steps import history_of


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit(depth=2)


@pytest.fixture(scope="module")
def off_centre() -> nn.Module:
    return uneven_vit(off=20)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def others() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def floats(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, FakeQuantizer):
            m.watcher = lambda x: None
    return model


def counted(x: Tensor) -> Histogram:
    seen = Histogram(x.min(), x.max())
    seen(x)
    return seen


def region(bits: int, scale: float, ratio: int, zero_point: int) -> TwoRegion:
    quantizer = TwoRegion(bits)
    quantizer.scale.fill_(scale)
    quantizer.ratio.fill_(ratio)
    quantizer.zero_point.fill_(zero_point)
    return quantizer


GRIDS = [(4, 1.0, 2, 1), (4, 0.3, 0, 2), (3, 2.0, 5, 0), (6, 0.7, 3, 4), (2, 1.0, 1, 0), (2, 1.0, 1, 1), (5, 0.2, 8, 15)]


def test_two_regions_by_hand() -> None:
    """Fine levels −0.25 … 1.5 in steps of 0.25, coarse ones above them: 2, 3, … 7."""
    x = torch.tensor([-1.0, -0.2, 0.1, 0.13, 1.4, 1.7, 1.8, 2.4, 3.6, 99.0])
    assert region(4, 1.0, 2, 1)(x).tolist() == [-0.25, -0.25, 0.0, 0.25, 1.5, 1.5, 2.0, 2.0, 4.0, 7.0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_two_regions_are_a_quantizer(grid: Any) -> None:
    quantizer, (bits, scale, ratio, zero) = region(*grid), grid
    x = torch.linspace(-1.5 * scale * 2**bits, 1.5 * scale * 2**bits, 20_001)
    y = quantizer(x)
    assert torch.equal(quantizer(y), y), "idempotent"
    assert (y.diff() >= 0).all(), "monotone"
    assert quantizer(torch.zeros(1)) == 0
    levels = quantizer.levels(*(torch.tensor([v], dtype=torch.float64) for v in (scale, ratio, zero)))[0].float()
    assert len(levels) == 2**bits and (levels.diff() >= 0).all()
    nearest = (x[:, None] - levels).abs().amin(1)
    assert torch.allclose((y - x).abs(), nearest, atol=1e-5 * scale * 2**bits), "nearest of its levels"
    fine = scale * 2.0**-ratio
    inside = (x >= -fine * zero) & (x <= fine * (quantizer.last - zero))
    assert ((y - x).abs()[inside] <= fine / 2 + 1e-5).all()
    within = (x >= -fine * zero) & (x <= scale * quantizer.last)
    assert ((y - x).abs()[within] <= scale / 2 + 1e-5).all()


def test_gradient_passes_what_is_not_clipped() -> None:
    x = torch.tensor([-3.0, -0.1, 0.4, 5.2, 7.5], requires_grad=True)
    region(4, 1.0, 2, 1)(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_the_ratio_is_the_best_there_is(bits: int) -> None:
    """OPT-m on GELU outputs with a long tail, and on softmax outputs."""
    g = torch.Generator().manual_seed(0)
    gelu = F.gelu(torch.cat((torch.randn(40_000, generator=g), 8 * torch.rand(200, generator=g))))
    softmax = (3 * torch.randn(400, 100, generator=g)).softmax(-1).flatten()
    for x in (gelu, softmax):
        quantizer = TwoRegion(bits)
        quantizer.search(counted(x))
        found, ratio = float((quantizer(x) - x).square().mean()), int(quantizer.ratio)
        for m in range(9):
            fine = quantizer.scale * 2.0**-m
            zero = int((-x.min() / fine).round().clamp(0, quantizer.last))
            assert found <= 1.02 * float((region(bits, float(quantizer.scale), m, zero)(x) - x).square().mean())
        assert ratio > 0 and bool(quantizer.zero_point > 0) <= bool(x.min() < 0)
        uniform = Quantizer(bits)
        uniform.set(*uniform.grid(x.min(), x.max()))
        assert found < (0.95 if bits == 2 else 0.8) * float((uniform(x) - x).square().mean())


def test_regions_of_what_is_constant_or_negative() -> None:
    for value in (0.0, 2.5):
        quantizer = TwoRegion(4)
        quantizer.search(counted(torch.full((9,), value)))
        assert torch.allclose(quantizer(torch.tensor([value])), torch.tensor([value]), rtol=1e-3)
    x = torch.linspace(-1, 1, 1001)
    quantizer = TwoRegion(4)
    quantizer.search(counted(x))
    assert float((quantizer(x) - x).abs().max()) < 0.2, "a function that is not GELU"


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bias_term_centres_each_channel_and_keeps_the_function(
    off_centre: nn.Module, images: Tensor, others: Tensor, bits: int
) -> None:
    small = MPTQ(bits, bits, reduce_range=False).apply(off_centre, images)
    assert error(floats(small), off_centre, others) < 1e-5
    seen: list[Tensor] = []
    unquantized = floats(small)
    unquantized.blocks[1].norm1.register_forward_hook(lambda m, i, out: seen.append(out.detach().flatten(0, 1)))
    with torch.no_grad():
        unquantized(images)
    low, high = seen[0].aminmax(dim=0)
    assert ((low + high).abs() <= 1e-3 * (high - low)).all()
    s = off_centre.blocks[1].norm1.weight / unquantized.blocks[1].norm1.weight
    reach, most = s * (high - low) / 2, off_centre.blocks[1].attn.qkv.weight.abs().amax(0)
    assert torch.allclose(s, (reach / most).sqrt(), rtol=1e-3), "SmoothQuant's equation 4 on what is left"


def test_centring_pays_where_channels_lie_on_both_sides(images: Tensor, others: Tensor) -> None:
    """Only the bias term takes away what all tokens of a channel share."""
    model = small_vit(depth=2)
    with torch.no_grad():
        for block in model.blocks:
            for norm in (block.norm1, block.norm2):
                norm.bias[:8] += 60
                norm.bias[8:16] -= 60
    errors = []
    for step in (MPTQ, SmoothQuant):
        small = step(reduce_range=False).apply(model, images)
        layer, seen = small.blocks[0].attn.qkv, []
        layer.register_forward_pre_hook(lambda m, x, seen=seen: seen.append(x[0]))
        with torch.no_grad():
            small(others)
            errors.append(float(F.linear(layer.quant_x(seen[0]) - seen[0], layer.weight).norm()))
    assert errors[0] < 0.7 * errors[1]


def test_at_eight_bits_everything_is_uniform_and_deployable(model: nn.Module, images: Tensor) -> None:
    plain = MinMax().apply(model, images)
    for step in (MPTQ(), MPTQ(softmax=True), MPTQ(mixed=True)):
        small = step.apply(model, images)
        assert not any(isinstance(m, TwoRegion) for m in small.modules()) and not getattr(small, "simulated", "")
        assert history_of(small).done[0][1]["bits"] == {}
        assert torch.equal(small.head.quant_w.scale, plain.head.quant_w.scale), "whole ranges"
        assert torch.allclose(small.blocks[0].attn.proj.quant_x.scale, plain.blocks[0].attn.proj.quant_x.scale, rtol=1e-4)


def test_regions_are_where_they_belong(model: nn.Module, images: Tensor, others: Tensor) -> None:
    small = MPTQ(4, 4).apply(model, images)
    assert "4-bit" in small.simulated
    where = {n for n, m in small.named_modules() if isinstance(m, TwoRegion)}
    assert where == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.operands.probs", "mlp.fc2.quant_x")}
    rival = MSE(4, 4).apply(model, images)
    assert error(small, model, others) < error(rival, model, others)
    assert torch.equal(small.head.quant_w.scale, rival.head.quant_w.scale), "ranges of the least squared error"
    assert torch.allclose(small.blocks[0].attn.proj.quant_x.scale, rival.blocks[0].attn.proj.quant_x.scale, rtol=1e-3)


def test_greedy_by_hand() -> None:
    """Of 100 + 10 values at 4 bits, three are to be left on average: b is small and sensitive, a costs little."""
    errors = {"a": {4: 0.0, 3: 0.1, 2: 0.5}, "b": {4: 0.0, 3: 0.4, 2: 0.9}}
    assert greedy(errors, {"a": 100, "b": 10}, 4) == {"a": 4, "b": 4}
    assert greedy(errors, {"a": 100, "b": 10}, 3) == {"a": 2, "b": 4}  # a: 0.1/100, then 0.4/100 against 0.4/10
    assert greedy(errors, {"a": 10, "b": 100}, 3) == {"a": 4, "b": 2}  # b: 0.4/100, then 0.5/100; a: 0.1/10
    assert greedy(errors, {"a": 100, "b": 10}, 2) == {"a": 2, "b": 2}
    errors["a"] = {bits: 10 + error for bits, error in errors["a"].items()}  # what it lost before counts for nothing
    assert greedy(errors, {"a": 100, "b": 10}, 3) == {"a": 2, "b": 4}


def average(small: nn.Module) -> tuple[float, float]:
    layers = quant_layers(small).values()
    sizes = [layer.weight.numel() for layer in layers]
    weights = sum(layer.quant_w.bits * n for layer, n in zip(layers, sizes, strict=True)) / sum(sizes)
    bits = values = 0
    for m in small.modules():
        if isinstance(m, FakeQuantizer) and not any(m is layer.quant_w for layer in layers):
            if m is small.patch_embed.proj.quant_x:
                continue

            def add(x: Tensor, m: FakeQuantizer = m) -> None:
                nonlocal bits, values
                bits, values = bits + m.bits * x.numel(), values + x.numel()

            m.watcher = add
    with torch.no_grad():
        small(torch.zeros(1, 3, 32, 32))
    return weights, bits / values


@pytest.mark.parametrize("wanted", [(3, 5), (8, 4)], ids=str)
def test_mixed_bits_keep_their_averages_and_come_back_from_a_file(
    model: nn.Module, images: Tensor, others: Tensor, wanted: tuple[int, int]
) -> None:
    step = MPTQ(*wanted, mixed=True)
    small = step.apply(model, images)
    assert "mixed by layer" in small.simulated
    again = copy.deepcopy(model).eval()
    step.build(again, history_of(small).done[-1][1])
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(others), small(others))
    bits = {m.bits for m in small.modules() if isinstance(m, FakeQuantizer)}
    assert len(bits) > 2 and min(bits) >= min(wanted) - 1
    weights, activations = average(small)
    assert wanted[0] - 0.9 < weights <= wanted[0] and wanted[1] - 0.9 < activations <= wanted[1]


@torch.no_grad()
def test_blocks_before_what_is_tried_out_run_once(images: Tensor) -> None:
    small = MPTQ(4, 4).apply(small_vit(), images)
    known, exact, runs = before(small, images[:2]), only(small, [], images[:2], {}), []
    for block in small.blocks:
        block.norm1.register_forward_hook(lambda *_: runs.append(1))
    for kind, name, ran in (
        ("weights", "blocks.2.attn.proj", 2),
        ("activations", "blocks.1.attn.qk", 3),
        ("weights", "patch_embed.proj", 4),
    ):
        wanted = parts(small)[kind][name]
        whole = only(small, wanted, images[:2], {})
        assert not torch.equal(whole, exact)
        runs.clear()
        assert torch.equal(only(small, wanted, images[:2], known), whole) and len(runs) == ran
    assert torch.equal(small(images[:2]), MPTQ(4, 4).apply(small_vit(), images)(images[:2]))  # nothing is left behind


@pytest.mark.parametrize(("side", "few"), ((448, 1), (224, 1), (98, 5), (28, 8)))
def test_bits_are_tried_out_on_as_much_of_small_images(side: int, few: int) -> None:
    assert len(scouts(torch.zeros(10, 1, side, side))) == few


def test_what_hurts_keeps_more_bits(images: Tensor, others: Tensor) -> None:
    """One MLP hardly counts, since its LayerScale is tiny; the other is most of the model."""
    model = small_vit(depth=2, init_values=1.0)
    with torch.no_grad():
        model.blocks[0].ls2.gamma.fill_(1e-3)
    small = MPTQ(4, 4, mixed=True).apply(model, images)
    dull, lively = ([block.mlp.fc1, block.mlp.fc2] for block in small.blocks)
    for which in ("quant_w", "quant_x"):
        assert sum(getattr(a, which).bits for a in dull) < sum(getattr(b, which).bits for b in lively)
    assert error(small, model, others) < error(MPTQ(4, 4).apply(model, images), model, others)


def test_other_blocks_and_nothing_at_random(images: Tensor) -> None:
    swin = dict(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    model = timm.create_model("swin_tiny_patch4_window7_224", **swin).eval()
    small = MPTQ(4, 8, mixed=True).apply(model, images)
    assert len({layer.quant_w.bits for layer in quant_layers(small).values()}) > 1
    a, b = (MPTQ(4, 4).apply(model, images) for _ in range(2))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    found = [layer.quant_x for layer in quant_layers(a).values() if isinstance(layer, QuantLinear)]
    assert any(isinstance(q, TwoRegion) for q in found)
