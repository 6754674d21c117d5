"""Q-HyViT on models of convolution and attention, and the folding of batch normalization that it needs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support import error, small_vit
from timm.models.byobnet import ByobNet
from timm.models.mobilevit import model_cfgs
from torch import Tensor, nn

import vitreous as vt
from vitreous.errors import VitreousError
from vitreous.quant import qhyvit
from vitreous.quant.bridges import Bridge, bridges, floats
from vitreous.quant.calibration import watch
from vitreous.quant.folding import fold, foldable
from vitreous.quant.layers import QuantConv2d, Quantizer, QuantLinear, quant_layers
from vitreous.quant.qhyvit import ImageQuantizer, LayerFit, QHyViT, choices, observe, running_order
from vitreous.ship.shipment import ship_all
from vitreous.steps import history_of


def hybrid() -> nn.Module:
    """A MobileViT of two stages: random weights and statistics, and channels of very different ranges."""
    torch.manual_seed(0)
    blocks = model_cfgs["mobilevit_xxs"].blocks
    model = ByobNet(replace(model_cfgs["mobilevit_xxs"], blocks=(blocks[0], blocks[2])), num_classes=7).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(m.weight, std=(2 / m.weight[0].numel()) ** 0.5)
            elif isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(std=0.2)
                m.running_var.uniform_(0.5, 2)
                m.weight.copy_(torch.exp(torch.randn_like(m.weight) * 0.8))
                m.bias.normal_(std=0.3)
        for m in model.modules():
            if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1:  # what a depthwise convolution evens out again
                m.weight.mul_(torch.exp(torch.randn(len(m.weight), 1, 1, 1)))
            elif isinstance(m, nn.LayerNorm):
                m.weight.mul_(torch.exp(torch.randn_like(m.weight) * 0.7))
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return hybrid()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def others() -> Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def eight(model: nn.Module, images: Tensor) -> nn.Module:
    return QHyViT().apply(model, images)


@pytest.fixture(scope="module")
def six(model: nn.Module, images: Tensor) -> nn.Module:
    return QHyViT(6, 6).apply(model, images)


def structure(step: QHyViT, model: nn.Module, images: Tensor) -> nn.Module:
    """Folded and quantized, with grids by min-max: weights for each channel, inputs for the whole tensor."""
    new = copy.deepcopy(model).eval()
    with torch.no_grad():
        step.build(new, step.plan(new, images))
        for name, seen in watch(new, images).items():
            q = new.get_submodule(name)
            assert isinstance(q, Quantizer)
            q.set(*(t.expand_as(q.scale) if q.channels else t for t in q.grid(seen.low, seen.high)))
        for layer in quant_layers(new).values():
            layer.quant_w.set(*layer.quant_w.grid(*layer.weight.flatten(1).aminmax(dim=1)))
    return new


# ---- folding


def test_folding_changes_nothing_and_leaves_no_batch_norm(model: nn.Module, others: Tensor) -> None:
    folded = copy.deepcopy(model)
    pairs = foldable(folded, others[:1])
    norms = [n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) >= 10 and sorted(n for _, n in pairs) == sorted(norms)
    fold(folded, pairs)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert error(folded, model, others) < 1e-5


@pytest.mark.parametrize(("bias", "expected"), [(None, [-2.5, 7.0]), ([1.0, 2.0], [0.5, 11.0])])
def test_folding_by_hand(bias: list[float] | None, expected: list[float]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=bias is not None), nn.BatchNorm2d(2, eps=0.75)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, -1.0]).reshape(2, 1, 1, 1))
        if bias is not None:
            model[0].bias.copy_(torch.tensor(bias))
        model[1].running_mean.copy_(torch.tensor([1.0, 0.0]))
        model[1].running_var.copy_(torch.tensor([3.25, 0.25]))  # with ε 4 and 1
        model[1].weight.copy_(torch.tensor([6.0, 2.0]))
        model[1].bias.copy_(torch.tensor([0.5, 7.0]))
    assert foldable(model, torch.ones(1, 1, 2, 2)) == [("0", "1")]
    fold(model, [("0", "1")])
    assert model[0].weight.flatten().tolist() == [9.0, -2.0] and model[0].bias.tolist() == expected


def test_what_others_read_too_is_not_folded() -> None:
    class Odd(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.bn = nn.BatchNorm2d(3, track_running_stats=kind != "no statistics")

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.kind == "read twice":
                return self.bn(y) + y
            if self.kind == "normalized twice":
                return self.bn(self.bn(y))
            if self.kind == "run twice":
                return self.bn(self.a(y))
            return self.bn(F.relu(y)) if self.kind == "not its output" else self.bn(y)

    for kind in ("read twice", "normalized twice", "run twice", "not its output", "no statistics"):
        assert foldable(Odd(kind).eval(), torch.randn(1, 3, 4, 4)) == [], kind
    assert foldable(Odd("plain").eval(), torch.randn(1, 3, 4, 4)) == [("a", "bn")]


# ---- bridge blocks


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # the same pairs as in the official code
        ("mobilevit_xxs", [[f"stages.{i}.1.conv_1x1", f"stages.{i}.1.transformer.0.attn.qkv"] for i in (2, 3, 4)]),
        ("mobilevitv2_050", [[f"stages.{i}.1.conv_1x1", f"stages.{i}.1.transformer.0.attn.qkv_proj"] for i in (2, 3, 4)]),
        ("efficientformer_l1", [["stages.3.blocks.2.mlp.fc2", "stages.3.blocks.4.token_mixer.qkv"]]),
        (
            "efficientformerv2_s0",
            [
                ["stages.2.blocks.3.mlp.fc2.conv", "stages.2.blocks.4.token_mixer.stride_conv.conv"],
                ["stages.3.blocks.1.mlp.fc2.conv", *(f"stages.3.blocks.2.token_mixer.{x}.conv" for x in "qkv")],
            ],
        ),
        ("resnet18", []),
    ],
)
def test_bridges_of_other_families(name: str, expected: list[list[str]]) -> None:
    """As many as the paper's table of bridge blocks has: 3, 1 and 2; none where there is no attention."""
    size = 224 if name.startswith("efficient") else 64
    assert bridges(timm.create_model(name).eval(), torch.randn(1, 3, size, size)) == expected


def test_a_plain_vit_has_its_patch_embedding_as_bridge() -> None:
    assert bridges(small_vit(), torch.randn(1, 3, 32, 32)) == [["patch_embed.proj", "blocks.0.attn.qkv"]]


def test_a_bridge_runs_alone(eight: nn.Module, images: Tensor) -> None:
    names = bridges(eight, images[:1])[0]
    end = eight.get_submodule(names[-1])
    seen: list[Tensor] = []
    handle = end.register_forward_hook(lambda _, given, out: seen.append(out.clone()))
    with torch.no_grad(), floats(eight):
        eight(images[:4])
    handle.remove()
    bridge = Bridge(eight, names, images[:4], {names[-1]: [torch.ones_like(seen[0])]})
    (_, before, expected, _) = bridge.runs[0]
    assert torch.equal(expected[0], seen[0])
    assert {"stem", "stages.0", "stages.1.0", "stages.1.1.conv_kxk"} == {n for n, m in eight.named_modules() if m in before}
    with floats(eight):
        assert bridge.error() == 0
    with floats(eight, but=names):
        assert bridge.error() > 0
    assert not any("forward" in vars(m) for m in eight.modules()) and not any(m._forward_hooks for m in eight.modules())


def test_reconstruction_serves_the_output_of_the_bridge(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, each layer of the bridge suits its own output only, and the block's is further off."""
    step = QHyViT(4, 4)
    names = bridges(model, images[:1])

    def off(small: nn.Module) -> list[float]:
        layers = quant_layers(small)
        _, slopes = observe(start, {n: start.get_submodule(n) for n in layers}, images, {n[-1] for n in names})
        found = []
        for n in names:
            bridge = Bridge(small, n, images, slopes)
            with floats(small, but=n):
                found.append(bridge.error())
        return found

    start = structure(step, model, images)
    torch.manual_seed(0)
    together = off(step.apply(model, images))
    monkeypatch.setattr(qhyvit, "_reconstruct", lambda *_: None)
    alone = off(step.apply(model, images))
    assert all(a < b for a, b in zip(together, alone, strict=True)) and sum(together) < 0.95 * sum(alone)


# ---- one layer


def layer_fit(w: Tensor, x: Tensor, bits: int = 4, slopes: Tensor | None = None) -> LayerFit:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data.copy_(w)
    layer = QuantLinear(linear, Quantizer(bits), Quantizer(bits, channels=len(w)))
    low, high = x.aminmax()
    layer.quant_x.set(*layer.quant_x.grid(low, high))
    layer.quant_w.set(*layer.quant_w.grid(*w.aminmax(dim=1)))
    return LayerFit(layer, x[None], torch.ones(1, len(x), len(w)) if slopes is None else slopes, low, high)


def test_error_by_hand() -> None:
    """4 bits: 3.4 becomes 3 on steps of 1, the weight 2 stays; the output is 0.8 off, its slope counts 5 times."""
    fit = layer_fit(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.4, 0.0]]), slopes=torch.full((1, 1, 1), 5.0))
    fit.layer.quant_w.set(torch.tensor([0.5]), torch.tensor([8]))
    found = fit.errors("x", torch.tensor([[1.0], [0.5]]), torch.tensor([[0.0], [0.0]]))
    slope = float(fit.slopes)
    assert torch.allclose(found, slope * torch.tensor([[0.8**2], [0.2**2]])) and slope == pytest.approx(
        10.0
    )  # damped by their mean


def test_the_symmetric_grid_is_the_signed_one() -> None:
    """Scale max/(2^(b−1) − 0.5) and integers −2^(b−1) … 2^(b−1) − 1, as in the official code, here with zero point 2^(b−1)."""
    for bits in (2, 4, 6, 8):
        q = Quantizer(bits)
        q.set(*qhyvit._grid(q, torch.tensor(-1.0), torch.tensor(3.0), True))
        scale = 3 / (2 ** (bits - 1) - 0.5)
        x = torch.linspace(-5.013, 5, 101)  # no ties
        expected = (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
        assert torch.allclose(q(x), expected, atol=1e-5)


def test_each_granularity_and_scheme_is_chosen_where_it_serves() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(300, 12, generator=g), torch.randn(10, 12, generator=g)

    def kinds(w: Tensor, x: Tensor) -> tuple[str, str]:
        fit = layer_fit(w, x)
        fit.run()
        weights, inputs = choices(nn.ModuleDict({"a": fit.layer}))["a"].split(", ")
        return weights, inputs

    assert kinds(w * torch.logspace(-2, 1, 10)[:, None], x)[0].startswith("channel")
    assert kinds(w[:1].expand(10, -1), x)[0].startswith("layer"), "ranges for each channel would be the same"
    assert kinds(w.abs(), x)[0].endswith("asymmetric") and kinds(w, x.abs())[1] == "layer asymmetric"
    signed = torch.randint(-8, 8, (300, 12), generator=g) * 1.0
    signed[0, 0] = 7.5
    assert kinds(w, signed)[1] == "layer symmetric"


def test_zero_points_never_overflow() -> None:
    """Values far from zero: the zero point that the plain formula asks for lies outside of the integers."""
    x = torch.rand(200, 6, generator=torch.Generator().manual_seed(0)) * 10 + 200
    fit = layer_fit(torch.randn(5, 6), x, bits=8)
    fit.run()
    assert 0 <= int(fit.layer.quant_x.zero_point) <= 255
    assert (fit.layer.quant_x(x) - x).abs().max() < 0.6 * 210 / 255


def test_search_never_ends_worse_than_it_began_and_is_weighted() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(300, 12, generator=g) ** 3, torch.randn(10, 12, generator=g) ** 3
    for bits in (3, 4, 8):
        fit = layer_fit(w, x, bits)

        def loss(fit: LayerFit = fit) -> float:
            q = fit.layer.quant_w
            return float(fit.errors("w", q.scale[None], q.zero_point.float()[None]).sum())

        before = loss()
        fit.run()
        after = loss()
        assert after < (0.8 if bits < 8 else 1.0) * before
        fit.run()
        assert loss() <= after * (1 + 1e-5)
    slopes = torch.rand(1, 300, 10, generator=g)
    fit = layer_fit(w, x, slopes=slopes)
    q = fit.layer.quant_w
    off = fit.layer.quant_x(x) @ q(w).T - x @ w.T
    expected = (off.square() * (slopes[0] + slopes.mean())).sum(0)
    assert torch.allclose(fit.errors("w", q.scale[None], q.zero_point.float()[None])[0], expected, rtol=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_drawn_products_are_those_of_the_convolution(groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(1, 2), groups=groups, bias=False)
    layer = QuantConv2d(conv, Quantizer(8), Quantizer(8, channels=16))
    x = torch.randn(2, 8, 9, 11)
    y = conv(x).movedim(1, -1).reshape(-1, 16)
    pick = torch.tensor([0, 5, len(y) - 1, 17])
    rows = qhyvit._rows(layer, x, pick)
    out = rows @ conv.weight.reshape(groups, 16 // groups, -1).mT
    assert torch.allclose(out.transpose(0, 1).flatten(1), y[pick], atol=1e-5)
    if groups == 1:
        every = qhyvit._rows(layer, x, torch.arange(len(y)))
        assert torch.allclose(qhyvit._energy(layer, x), every.square().sum(2)[0], rtol=1e-4)


def test_a_scale_for_each_channel_of_feature_maps() -> None:
    q = ImageQuantizer(4, channels=3)
    x = torch.randn(2, 3, 5, 5) * torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1, 1)
    seen: list[Tensor] = []
    q.watcher = seen.append
    assert torch.equal(q(x), x) and seen[0].shape == (2, 5, 5, 3)
    q.watcher = None
    q.set(*q.grid(*seen[0].flatten(0, 2).aminmax(dim=0)))
    off = (q(x) - x).abs().amax((0, 2, 3))
    assert (off <= 1.01 * q.scale).all() and torch.equal(q(q(x)), q(x))
    x.requires_grad_()
    q(x).sum().backward()
    assert x.grad is not None and x.grad.eq(1).all()


# ---- whole models


def test_every_convolution_and_linear_layer_is_quantized(model: nn.Module, eight: nn.Module, six: nn.Module) -> None:
    expected = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(quant_layers(eight)) == set(quant_layers(six)) == expected and len(expected) > 20
    assert any(isinstance(m, nn.LayerNorm) for m in eight.modules())
    inputs = {n: layer.quant_x for n, layer in quant_layers(six).items()}
    assert inputs["stem.conv"].bits == 8 and sum(q.bits == 6 for q in inputs.values()) == len(inputs) - 1
    depthwise = {n for n, layer in quant_layers(six).items() if isinstance(layer, QuantConv2d) and layer.groups > 1}
    assert depthwise == {n for n, q in inputs.items() if isinstance(q, ImageQuantizer)} and len(depthwise) == 2
    assert not getattr(eight, "simulated", None) and "6-bit" in six.simulated


def test_eight_bits_lie_on_grids_that_runtimes_run(eight: nn.Module) -> None:
    for layer in quant_layers(eight).values():
        assert isinstance(layer.quant_x, Quantizer) and layer.quant_x.scale.ndim == 0
        assert (layer.quant_x.low, layer.quant_x.high) == (0, 255)
        assert layer.quant_w.symmetric and not layer.quant_w.zero_point.any()
        steps = layer.weight.flatten(1) / layer.quant_w.scale[:, None]
        assert steps.abs().max() <= layer.quant_w.limit + 1e-3


def test_narrowed_weights_stay_within_the_reduced_range(model: nn.Module, images: Tensor) -> None:
    vit = small_vit(depth=1)
    small = QHyViT(reduce_range=True).apply(vit, torch.randn(4, 3, 32, 32))
    for layer in quant_layers(small).values():
        assert (layer.weight.flatten(1) / layer.quant_w.scale[:, None]).abs().max() <= 63 + 1e-3


def test_beats_min_max_on_the_same_layers(
    model: nn.Module, images: Tensor, others: Tensor, eight: nn.Module, six: nn.Module
) -> None:
    plain = structure(QHyViT(6, 6), model, images)
    assert error(six, model, others) < 0.9 * error(plain, model, others)
    assert error(eight, model, others) < 1.0 * error(structure(QHyViT(), model, images), model, others)
    kinds = set(choices(six).values())
    assert any("channel" in k.split(", ")[1] for k in kinds) and any("asymmetric" in k for k in kinds)
    assert any(k.endswith(" symmetric") for k in kinds)


def test_the_choice_of_granularity_and_scheme_matters(
    model: nn.Module, images: Tensor, others: Tensor, six: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's ablation: scales alone, with one range a tensor and one scheme, leave most of the error."""
    every, init = LayerFit.options, LayerFit.__init__

    def begun(self: LayerFit, *given: Any) -> None:
        init(self, *given)
        for what in ("w", "x"):
            self.side(what).set(*every(self, what)[0][0])

    monkeypatch.setattr(LayerFit, "__init__", begun)
    monkeypatch.setattr(LayerFit, "options", lambda self, what: every(self, what)[:1])  # layer, symmetric
    assert error(six, model, others) < 0.8 * error(QHyViT(6, 6).apply(model, images), model, others)


def test_the_plan_alone_builds_it_again(
    model: nn.Module, eight: nn.Module, six: nn.Module, others: Tensor, tmp_path: Path
) -> None:
    for small in (eight, six):
        vt.save(small, tmp_path / "m.safetensors")
        again = vt.load(tmp_path / "m.safetensors", base=model)
        with torch.no_grad():
            assert torch.equal(again(others), small(others))
        step, plan = history_of(small).done[-1]
        rebuilt = copy.deepcopy(model)
        step.build(rebuilt, plan)
        rebuilt.load_state_dict(small.state_dict())
        with torch.no_grad():
            assert torch.equal(rebuilt(others), small(others))


def test_integers_run_in_both_runtimes(eight: nn.Module, others: Tensor, tmp_path: Path) -> None:
    layers = quant_layers(eight)
    # ONNX Runtime runs a convolution in integers only when its output is quantized before anything else reads it.
    linear = sum(isinstance(layer, QuantLinear) for layer in layers.values())
    shipped = ship_all(eight, [tmp_path / "m.onnx", tmp_path / "m.xml"], example=others)
    for shipment in shipped:
        assert shipment.precision == "int8" and shipment.integer_ops >= (
            len(layers) if shipment.format == "openvino" else linear
        ), str(shipment)
        assert shipment.parity.mean < 0.02 and shipment.parity.agreement == 1.0, str(shipment)


def test_same_images_same_result_and_the_model_is_untouched(images: Tensor) -> None:
    vit = small_vit(depth=1, qkv_bias=False)
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    x = torch.randn(6, 3, 32, 32)
    a, b = QHyViT(5, 5).apply(vit, x).state_dict(), QHyViT(5, 5).apply(vit, x).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items())


def test_works_on_one_image_and_on_constant_ones() -> None:
    vit = small_vit(depth=1)
    for x in (torch.randn(1, 3, 32, 32), torch.nn.functional.pad(torch.ones(2, 3, 1, 1), (0, 31, 0, 31))):
        small = QHyViT(reduce_range=False).apply(vit, x)
        assert all(torch.isfinite(t).all() for t in small.state_dict().values() if t.is_floating_point())
        assert error(small, vit, x) < 0.05


def test_refuses_what_makes_no_sense(eight: nn.Module, model: nn.Module, images: Tensor) -> None:
    with pytest.raises(VitreousError, match="quantized already"):
        QHyViT().apply(eight, images)
    with pytest.raises(VitreousError, match="no calibration images"):
        QHyViT().apply(model, images[:0])
    with pytest.raises(VitreousError, match="2 to 8 bits"):
        QHyViT(weights=9)


def test_layers_that_cannot_be_replaced_are_left_alone() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (0, 1, 0, 1)))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Same(4, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    x = torch.randn(4, 3, 8, 8)
    small = QHyViT(reduce_range=False).apply(model.eval(), x)
    assert set(quant_layers(small)) == {"0", "5"} and error(small, model, x) < 0.05
    assert [n for n, _ in running_order(small, x[:1])] == ["0", "2", "5"]


def test_one_logit_is_weighed_as_two_classes() -> None:
    """A softmax over it alone has no slopes, by which every error would be alike."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 1)).eval()
    two = nn.Sequential(*one[:3], nn.Linear(8, 2)).eval()
    with torch.no_grad():
        two[3].weight.copy_(torch.cat([torch.zeros(1, 8), one[3].weight]))
        two[3].bias.copy_(torch.cat([torch.zeros(1), one[3].bias]))
    x, step = torch.randn(4, 3, 2, 2) * torch.tensor([1.0, 3.0, 9.0, 27.0]).reshape(4, 1, 1, 1) / 9, QHyViT(4, 4)
    found = []
    for net in (one, two):
        start = structure(step, net, x)
        with torch.no_grad():
            for layer in quant_layers(start).values():
                layer.quant_x.set(torch.tensor(1.0), torch.tensor(8))  # so that what is quantized is off
        drawn, slopes = observe(start, {"1": start.get_submodule("1")}, x, {"1"})
        found.append(slopes["1"][0])
        rows, weighted = drawn["1"]
        assert weighted.sum() == pytest.approx(float(found[-1].sum()), rel=0.3), "a few rows, weighted, stand for all"
        assert rows.square().sum(2).mean() > 1.3 * x.flatten(1).square().sum(1).mean(), "loud ones are drawn more often"
        assert len(rows[0].unique(dim=0)) == 4, "and quiet ones too"
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)
