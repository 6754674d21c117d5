"""AdaLog: its grid, its search, and both on models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from support import error, small_vit, uneven_vit
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.quant import MinMax, RepQ
from vitreous.quant import adalog as adalog_module
from vitreous.quant import fpcs as fpcs_module
from vitreous.quant.adalog import (
    AdaLog,
    AdaLogQuantizer,
    HeadQuantizer,
    fit_input,
    fit_layer,
    fit_operand,
    fit_product,
    fit_weight,
    observe,
    share_scale,
)
from vitreous.quant.calibration import Watch
from vitreous.quant.fpcs import fpcs, uniform, uniform_pairs
from vitreous.quant.layers import LogSqrt2, Quantizer, QuantLinear, quant_layers
from vitreous.quant.posttraining import norm_readers
from vitreous.quant.reparameterization import channel_grids
from vitreous.steps import history_of
from vitreous.work import Work, working


@pytest.fixture(scope="module")
def uneven() -> nn.Module:
    return uneven_vit()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def others() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def four(uneven: nn.Module, images: Tensor) -> nn.Module:
    return AdaLog(4, 4).apply(uneven, images)


class TestGrid:
    def test_by_hand(self) -> None:
        """Base 2^(20/37), 3 bits, so mantissas in steps of 1/14: k = 0 … 3 give 1, 10/14, 13/28 and 9/28."""
        quantizer = AdaLogQuantizer(3)
        quantizer.q.fill_(20)
        levels = quantizer.levels(quantizer.q)
        assert torch.allclose(levels[:4], torch.tensor([1, 10 / 14, 13 / 28, 9 / 28])) and levels[8] == 0
        # −log2(0.6)·37/20 = 1.36, −log2(0.4)·37/20 = 2.45, −log2(0.05)·37/20 = 7.996: k = 1, 2 and 8, which is beyond 7.
        assert torch.allclose(quantizer(torch.tensor([0.6, 0.4, 0.05, 7.0])), torch.tensor([10 / 14, 13 / 28, 0.0, 1.0]))

    @pytest.mark.parametrize("bits", [2, 3, 4, 6])
    def test_base_two_is_a_shift(self, bits: int) -> None:
        x, quantizer = torch.rand(500), AdaLogQuantizer(bits)
        k = (-x.log2()).round()
        assert torch.equal(quantizer(x), torch.where(k < 2**bits, torch.exp2(-k), 0.0))

    @pytest.mark.parametrize("bits", [3, 4, 6])
    @pytest.mark.parametrize("q", [10, 19, 37, 80, 137])
    def test_monotone_idempotent_bounded(self, bits: int, q: int) -> None:
        quantizer = AdaLogQuantizer(bits)
        quantizer.q.fill_(q)
        quantizer.scale.fill_(2.5)
        x = torch.linspace(0, 3, 20001)
        y = quantizer(x)
        assert (y.diff() >= 0).all() and y[0] < 1e-13 and y[-1] == 2.5
        assert torch.allclose(quantizer(y), y) and y.unique().numel() <= 2**bits + 1
        inside = (x > 0) & (x <= 2.5) & (y > 0)
        half, table = 2 ** (q / 37 / 2), 1 / (2 ** (bits + 1) - 2)
        assert (y / x)[inside].max() <= half * (1 + table) and (y / x)[inside].min() >= (1 - table) / half

    def test_shift_gives_negative_values_a_place(self) -> None:
        quantizer = AdaLogQuantizer(6)
        quantizer.q.fill_(10)
        quantizer.shift.fill_(0.17)
        quantizer.scale.fill_(1.17)
        x = torch.linspace(-0.17, 1, 200)
        y = quantizer(x) - 0.17
        assert torch.corrcoef(torch.stack([x, y]))[0, 1] > 0.99 and y[0] == pytest.approx(-0.17)

    def test_gradient_passes(self) -> None:
        x = torch.rand(20, requires_grad=True)
        AdaLogQuantizer(4)(x).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, torch.ones(20))

    def test_each_head_has_its_scale(self) -> None:
        x = torch.randn(2, 3, 5, 4) * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1)
        heads = HeadQuantizer(4, channels=3)
        heads.set(*heads.grid(x.amin((0, 2, 3)), x.amax((0, 2, 3))))
        for i in range(3):
            alone = Quantizer(4)
            alone.set(heads.scale[i], heads.zero_point[i])
            assert torch.equal(heads(x)[:, i], alone(x[:, i]))
        assert (heads(x) - x).abs().amax((0, 2, 3)).div(x.abs().amax((0, 2, 3))).max() < 0.2


class TestSearch:
    def test_finds_the_least_of_each_group(self) -> None:
        wanted, zeros = torch.tensor([0.31, 0.77]), torch.tensor([3.0, 5.0])
        first = torch.linspace(0, 1, 16).repeat(8)[:, None].expand(-1, 2)
        second = torch.arange(8.0).repeat_interleave(16)[:, None].expand(-1, 2)
        found = fpcs(first, second, torch.full((2,), 1 / 15), lambda a, b: (a - wanted).abs() + (b - zeros).abs())
        assert torch.equal(found[1], zeros)
        assert (found[0] - wanted).abs().max() <= 1 / 15 / 4**2, "two refinements, each to a quarter of the spacing"

    def test_what_is_second_at_first_may_win(self) -> None:
        found, _ = fpcs(
            torch.arange(8.0),
            torch.zeros(8),
            torch.tensor(1.0),
            lambda a, b: torch.minimum(0.2 + (a - 2).abs(), (a - 5.25).abs()),
        )
        assert found == 5.25

    def test_no_coarse_pair_is_better(self) -> None:
        g = torch.Generator().manual_seed(0)
        for _ in range(20):
            table = torch.rand(128, generator=g)
            first, second = torch.arange(128.0), torch.zeros(128)
            found = fpcs(first, second, torch.tensor(1.0), lambda a, b, t=table: t[a.round().long().clamp(0, 127)])
            assert table[int(found[0].round())] <= table.min()

    def test_scales_stay_positive(self) -> None:
        """A third of the values is 0, so the inner range is nothing: refining must not step below the least coarse scale."""
        inner, outer = (torch.zeros(()), torch.zeros(())), (torch.tensor(0.0), torch.tensor(15.0))
        first, second, spacing = uniform_pairs(inner, outer, 4)
        scale, _ = fpcs(first, second, spacing, lambda s, z: s)
        assert 0 < scale <= first.min()

    def test_pairs_span_the_ranges_and_centre_them(self) -> None:
        inner, outer = (torch.tensor(-1.0), torch.tensor(1.0)), (torch.tensor(-3.0), torch.tensor(3.0))
        scale, zero_point, spacing = uniform_pairs(inner, outer, 4)
        assert len(scale) == 128 and scale.min() == pytest.approx(2 / 15) and scale.max() == pytest.approx(6 / 15)
        assert sorted(zero_point.unique().tolist()) == list(range(4, 12)), "around the middle of the integers"
        assert spacing == pytest.approx(4 / 15 / 15) and scale.unique().diff()[0] == pytest.approx(float(spacing), rel=1e-4)
        far = uniform_pairs((torch.tensor(5.0), torch.tensor(6.0)), (torch.tensor(5.0), torch.tensor(6.5)), 4)
        assert (far[1] < -40).all(), "values far from zero have their zero point far outside"

    def test_uniform_is_the_fake_quantizer(self) -> None:
        x = torch.randn(100)
        assert torch.allclose(
            uniform(x, torch.tensor(0.13), torch.tensor(6.0), 4), torch.fake_quantize_per_tensor_affine(x, 0.13, 6, 0, 15)
        )

    def test_base_with_the_least_error_of_the_product(self) -> None:
        g = torch.Generator().manual_seed(3)
        probs, values = torch.softmax(4 * torch.randn(2, 3, 20, 30, generator=g), -1), torch.randn(2, 3, 30, 8, generator=g)

        def loss(x: Tensor) -> Tensor:
            return (x @ values - probs @ values).square().mean((0, 2, 3))

        quantizer, seen = AdaLogQuantizer(3), adalog_module.WatchHeads(None)
        seen(probs)
        fit_operand(quantizer, probs, seen, loss)
        every = {q: float(loss(quantizer.on_grid(probs, torch.ones(()), torch.tensor(q))).mean()) for q in range(10, 138)}
        assert every[int(quantizer.q)] == pytest.approx(min(every.values()))
        assert every[int(quantizer.q)] < every[37] and loss(LogSqrt2(3)(probs)).mean() > every[int(quantizer.q)]

    def test_base_with_the_least_error_of_what_an_activation_gives(self) -> None:
        x = nn.functional.gelu(torch.randn(400, 8, generator=torch.Generator().manual_seed(3)))
        quantizer = AdaLogQuantizer(3)
        quantizer.shift.fill_(0.17)
        quantizer.scale.copy_(x.max() + 0.17)
        fit_input(quantizer, x, x.aminmax(), lambda y: (y - x).square().mean())

        def loss(scale: Tensor, q: Tensor) -> float:
            return float((quantizer.on_grid(x + 0.17, scale, q) - 0.17 - x).square().mean())

        two = min(loss(s, torch.tensor(37)) for s in torch.linspace(0.5, 1.2, 50) * (x.max() + 0.17))
        assert loss(quantizer.scale, quantizer.q) < 0.8 * two

    def test_by_turns_each_factor_meets_the_other_as_it_is_quantized(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        layer = QuantLinear(nn.Linear(8, 6), Quantizer(3), Quantizer(3, channels=6))
        x, w, seen, alone, met = torch.randn(50, 8), layer.weight.detach(), Watch("", True, 10**6), [], []
        seen(x)

        def input_spy(quantizer: Quantizer, x: Tensor, span: Any, error: Any) -> None:
            alone.append((float(error(x)), float((x @ (layer.quant_w.quantized(w) - w).T).square().mean())))
            fit_input(quantizer, x, span, error)

        def weight_spy(quantizer: Quantizer, w: Tensor, given: Tensor, exact: Tensor) -> None:
            met.append(torch.equal(given, layer.quant_x.quantized(x)) and torch.allclose(exact, x @ w.T, atol=1e-5))
            fit_weight(quantizer, w, given, exact)

        monkeypatch.setattr(adalog_module, "fit_input", input_spy)
        monkeypatch.setattr(adalog_module, "fit_weight", weight_spy)
        with torch.no_grad():
            fit_layer(layer, seen)
        (first, _), (second, by_weight) = alone
        assert first < 1e-9 and second == pytest.approx(by_weight, rel=1e-4) and second > 1e-4 and met == [True, True]

    def test_by_turns_for_products_head_by_head(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        factors = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 4, 9)
        quantizers, errors = (HeadQuantizer(3, channels=3), HeadQuantizer(3, channels=3)), []
        seen = adalog_module.WatchHeads(None), adalog_module.WatchHeads(None)
        for watch, x in zip(seen, factors, strict=True):
            watch(x)

        def spy(quantizer: HeadQuantizer, x: Tensor, seen: Any, error: Any) -> None:
            errors.append(error(x))
            fit_operand(quantizer, x, seen, error)

        monkeypatch.setattr(adalog_module, "fit_operand", spy)
        fit_product(quantizers, seen, factors)
        one, two, three, _ = errors
        assert torch.equal(one, torch.zeros(3)) and (two > 1e-4).all() and len(two.unique()) == 3
        assert (three > 1e-4).all(), "keys are quantized by then"

    def test_channels_of_a_norm_are_searched(self) -> None:
        torch.manual_seed(0)
        layer = QuantLinear(nn.Linear(8, 4), Quantizer(4), Quantizer(4, channels=4), "norm")
        norm, seen, x = nn.LayerNorm(8), Watch("", True, 10**6), torch.randn(3000, 8) ** 3
        seen(x)
        scale, zero = channel_grids(seen, 4)
        with torch.no_grad():
            share_scale(norm, [layer], [seen])
            off = (layer.quant_x(seen.samples) - seen.samples) / norm.weight
        assert off.square().mean() < 0.95 * (uniform(x, scale, zero, 4) - x).square().mean()

    def test_weights_follow_what_they_are_multiplied_with(self) -> None:
        """Large weights of inputs that are zero do not matter: the grid should serve the others."""
        g = torch.Generator().manual_seed(4)
        w, x = torch.randn(6, 40, generator=g), torch.randn(64, 40, generator=g)
        w[:, :3] *= 10
        x[:, :3] = 0
        found, alone = Quantizer(4, channels=6), Quantizer(4, channels=6)
        fit_weight(found, w, x, x @ w.T)
        fit_weight(alone, w, torch.eye(40), w.T.clone())
        assert (x @ (found(w) - w).T).norm() < 0.8 * (x @ (alone(w) - w).T).norm()

    def test_a_sketch_keeps_squared_lengths(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(500, 200)
        lengths = (adalog_module._sketch(500, x) @ x).square().sum(0) / x.square().sum(0)
        assert lengths.mean() == pytest.approx(1, abs=0.05) and lengths.std() < 0.3
        few = torch.randn(7, 3)
        assert torch.equal(adalog_module._sketch(7, few) @ few, few)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coarse search, for what does not depend on its quality."""
    monkeypatch.setattr(adalog_module, "ROUNDS", 1)
    monkeypatch.setattr(fpcs_module, "STEPS", 1)
    monkeypatch.setattr(fpcs_module, "COARSE", 64)


class TestModels:
    def test_grids_are_where_the_paper_has_them(self, uneven: nn.Module, four: nn.Module) -> None:
        layers = quant_layers(four)
        assert set(layers) == {n for n, m in uneven.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        for name, layer in layers.items():
            assert isinstance(layer.quant_x, AdaLogQuantizer) == name.endswith("fc2")
        for block in four.blocks:
            o = block.attn.operands
            assert {n: type(m) for n, m in o.items()} == {
                "q": HeadQuantizer, "k": HeadQuantizer, "v": HeadQuantizer, "probs": AdaLogQuantizer,
            }  # fmt: skip
            assert o["probs"].scale == 1 and o["probs"].shift == 0 and len(o["q"].scale.unique()) == 3
        assert len({int(b.attn.operands["probs"].q) for b in four.blocks} | {int(b.mlp.fc2.quant_x.q) for b in four.blocks}) > 1

    def test_better_than_repq_and_minmax(self, uneven: nn.Module, four: nn.Module, images: Tensor, others: Tensor) -> None:
        found = error(four, uneven, others)
        assert found < 0.9 * error(RepQ(4, 4).apply(uneven, images), uneven, others)
        assert found < 0.9 * error(MinMax(4, 4).apply(uneven, images), uneven, others)
        assert "4-bit" in four.simulated

    def test_the_bias_takes_the_shift(self, uneven: nn.Module, four: nn.Module) -> None:
        """What GELU's minimum becomes on the grid is 0, so the layer must give what the float layer would for −0.17."""
        old, new = uneven.blocks[0].mlp.fc2, four.blocks[0].mlp.fc2
        w_hat = new.quant_w(new.weight)
        assert torch.allclose(new.bias, old.bias - new.quant_x.shift * w_hat.sum(1), atol=1e-5)
        lowest = torch.full((1, new.in_features), -float(new.quant_x.shift))
        assert torch.allclose(new(lowest), old.bias + lowest @ w_hat.T, atol=1e-4)

    @pytest.mark.usefixtures("quick")
    def test_the_shift_follows_the_activation_function(self, images: Tensor) -> None:
        """SiLU goes down to −0.278."""
        model = small_vit(depth=1, act_layer=nn.SiLU)
        small = AdaLog(6, 6).apply(model, images)
        assert 0.2 < small.blocks[0].mlp.fc2.quant_x.shift < 0.279
        assert error(small, model, images) < 0.3

    @pytest.mark.usefixtures("quick")
    def test_sharing_a_scale_changes_no_output(self, uneven: nn.Module, images: Tensor) -> None:
        model, step = copy.deepcopy(uneven), AdaLog(4, 4)
        step.build(model, step.plan(model, images))
        with torch.no_grad():
            inputs, _ = observe(model, images)
            before = {
                n: watch.samples @ model.get_submodule(n).weight.T for n, watch in inputs.items() if "qkv" in n or "fc1" in n
            }
            for norm, readers in norm_readers(model).items():
                seen = [inputs[name.removesuffix(".quant_x")] for name in readers]
                share_scale(model.get_submodule(norm), list(readers.values()), seen)
            for name, out in before.items():
                layer, old = model.get_submodule(name), uneven.get_submodule(name)
                assert torch.allclose(inputs[name].samples @ layer.weight.T + layer.bias, out + old.bias, atol=2e-3)
                low, high = inputs[name].low, inputs[name].high
                assert ((inputs[name].samples >= low - 1e-3) & (inputs[name].samples <= high + 1e-3)).all()
                assert (high - low).max() < 3 * (high - low).median(), "channels are even now"

    def test_eight_bits_run_as_integers(self, uneven: nn.Module, images: Tensor, others: Tensor) -> None:
        for softmax in (None, True):
            small, same = (step(softmax=softmax).apply(uneven, images) for step in (AdaLog, RepQ))
            assert not getattr(small, "simulated", "")
            with torch.no_grad():
                assert torch.allclose(small(others), same(others), atol=1e-4)
            for module in small.modules():
                assert not isinstance(module, (AdaLogQuantizer, HeadQuantizer))

    @pytest.mark.parametrize("bits", [(4, 8), (8, 4)])
    @pytest.mark.usefixtures("quick")
    def test_eight_bits_of_one_kind(self, images: Tensor, others: Tensor, bits: tuple[int, int]) -> None:
        model = small_vit(depth=1)
        small = AdaLog(*bits).apply(model, images)
        assert error(small, model, others) < 0.6 and "bit" in small.simulated
        o = small.blocks[0].attn.operands
        if bits[1] == 8:
            assert o["q"].symmetric and o["probs"].scale == torch.tensor(1 / 255)
        else:
            assert small.blocks[0].mlp.fc1.quant_w.symmetric

    def test_builds_again(self, uneven: nn.Module, four: nn.Module, others: Tensor) -> None:
        again = copy.deepcopy(uneven).eval()
        AdaLog(4, 4).build(again, history_of(four).done[-1][1])
        again.load_state_dict(four.state_dict())
        with torch.no_grad():
            assert torch.equal(again(others), four(others))

    @pytest.mark.usefixtures("quick")
    def test_repeats(self, images: Tensor) -> None:
        states = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            states.append(AdaLog(4, 4).apply(small_vit(depth=1), images).state_dict())
        assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("vit_tiny_patch16_224", {"qkv_bias": False, "init_values": 0.1, "reg_tokens": 2, "proj_bias": False}),
            ("deit_tiny_distilled_patch16_224", {}),
            ("eva02_tiny_patch14_224", {"patch_size": 16, "use_rot_pos_emb": False}),
            ("swin_tiny_patch4_window7_224", {"window_size": 2, "depths": (1, 1), "num_heads": (2, 4), "patch_size": 4}),
        ],
    )
    @pytest.mark.usefixtures("quick")
    def test_other_models(self, name: str, arguments: dict[str, Any], images: Tensor) -> None:
        size = {} if "swin" in name else {"depth": 1, "num_heads": 2}
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=32, embed_dim=32, num_classes=5, **size, **arguments).eval()
        small = AdaLog(5, 5).apply(model, images)
        assert error(small, model, images) < 0.6
        if "swin" in name:
            assert not any(isinstance(m, HeadQuantizer) for m in small.modules())

    @pytest.mark.usefixtures("quick")
    def test_layers_without_bias_get_one(self, images: Tensor, others: Tensor) -> None:
        model = small_vit(depth=1)
        model.blocks[0].mlp.fc2.bias = None
        small = AdaLog(6, 6).apply(model, images)
        assert isinstance(small.blocks[0].mlp.fc2, QuantLinear) and small.blocks[0].mlp.fc2.bias is not None
        assert error(small, model, others) < 0.2

    @pytest.mark.usefixtures("quick")
    def test_constant_images_and_a_single_one(self, images: Tensor) -> None:
        for given in (torch.nn.functional.pad(torch.ones(2, 3, 1, 1), (0, 31, 0, 31)), images[:1]):
            small = AdaLog(4, 4).apply(small_vit(depth=1), given)
            with torch.no_grad():
                assert torch.isfinite(small(images)).all()
            assert all(torch.isfinite(v).all() for v in small.state_dict().values())

    @pytest.mark.usefixtures("quick")
    def test_dead_channels_and_activations(self, images: Tensor) -> None:
        model = small_vit(depth=1)
        with torch.no_grad():
            model.blocks[0].mlp.fc1.weight.zero_()
            model.blocks[0].mlp.fc1.bias.fill_(-9.0)
            model.blocks[0].norm1.weight[:5] = 0
            model.blocks[0].norm1.bias[0] = 3
            model.head.weight[0] = 0
        assert error(AdaLog(6, 6).apply(model, images), model, images) < 0.2

    @pytest.mark.usefixtures("quick")
    def test_refuses(self, uneven: nn.Module, four: nn.Module, images: Tensor) -> None:
        with pytest.raises(VitreousError, match="no calibration images"):
            AdaLog(4, 4).apply(uneven, images[:0])
        with pytest.raises(VitreousError, match="quantized already"):
            AdaLog(4, 4).apply(four, images)
        with pytest.raises(VitreousError, match="2 to 8 bits"):
            AdaLog(1, 4)
        broken = copy.deepcopy(uneven)
        with torch.no_grad():
            broken.blocks[0].mlp.fc2.weight.fill_(3e38)
        with pytest.raises(VitreousError, match="NaN or infinity on the calibration images"):
            AdaLog(4, 4).apply(broken, images)

    @pytest.mark.usefixtures("quick")
    def test_tells_its_progress(self, images: Tensor) -> None:
        told: list[float] = []
        with working(Work(told.append)):
            AdaLog(5, 5).apply(small_vit(depth=1), images)
        assert told == sorted(told) and len(told) > 5 and told[-1] < 1
