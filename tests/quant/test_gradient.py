"""Gradient-based post-training quantization."""

from __future__ import annotations

import copy

import pytest
import torch
from support import error, small_vit
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.quant.gradient import GradientPTQ, fit_bias, importance, spend
from vitreous.quant.isvit import fit_weight
from vitreous.quant.layers import LogSqrt2, Quantizer, QuantLinear, quant_layers
from vitreous.quant.posttraining import survey
from vitreous.steps import history_of


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit(depth=2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def others() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_bits_are_spent_where_they_save_most() -> None:
    """Three layers of 10, 10 and 20 values, 4 bits each: 160 bits in all, 80 of them at the least number of bits, 2."""
    a, b, c = (64.0, 16.0, 4.0, 1.0), (6.0, 2.0, 1.0, 0.5), (8.0, 2.0, 0.4, 0.3)
    costs = {name: dict(enumerate(cost, start=2)) for name, cost in (("a", a), ("b", b), ("c", c))}
    # Savings per value: a 4.8, 1.2, 0.3; b 0.4, 0.1, 0.05; c 0.3, 0.08, 0.005. In that order until 80 more are spent.
    assert spend(costs, {"a": 10, "b": 10, "c": 20}, 4) == {"a": 5, "b": 5, "c": 3}
    assert spend(costs, {"a": 10, "b": 10, "c": 20}, 2) == {"a": 2, "b": 2, "c": 2}
    assert spend(costs, {"a": 10, "b": 10, "c": 20}, 5) == {"a": 5, "b": 5, "c": 5}
    assert spend({}, {}, 4) == {}
    bumpy = {"a": {2: 8.0, 3: 9.0, 4: 1.0}, "b": {2: 2.0, 3: 1.0, 4: 0.9}}  # two bits at once save 3.5 each
    assert spend(bumpy, {"a": 1, "b": 1}, 3) == {"a": 4, "b": 2}


def test_importance_is_the_change_of_the_output() -> None:
    """Of a linear model it is exact but for the draw: Σ over outputs of the squared change by independent errors."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    torch.manual_seed(0)
    model, x = Two(), torch.randn(300, 6)
    model.second.weight.data.abs_()
    weights, inputs, sizes = importance(model, x, {"first": ("", ""), "second": ("", "")}, 4, 4)
    assert sizes == {"first": (30, 6), "second": (20, 5)}
    for cost in (*weights.values(), *inputs.values()):
        assert [*cost] == [2, 3, 4, 5, 6] and cost[2] > cost[4] > cost[6] > 0
    q = Quantizer(4, channels=4)
    with torch.no_grad():
        fit_weight(q, model.second.weight)
        delta = q(model.second.weight) - model.second.weight
        expected = float((model.first(x).square() @ delta.square().T).sum())
        fit_weight(q := Quantizer(4, channels=5), model.first.weight)
        delta = q(model.first.weight) - model.first.weight
        through = float((x.square() @ delta.square().T @ model.second.weight.square().T).sum())
    assert weights["second"][4] == pytest.approx(expected, rel=0.25)
    assert weights["first"][4] == pytest.approx(through, rel=0.25), "each output counts, not their sum"
    assert all(p.requires_grad for p in model.parameters())


def test_what_matters_more_gets_more_bits_within_the_budget(model: nn.Module, images: Tensor) -> None:
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.blocks[0].mlp.fc2.weight *= 8
        loud.blocks[1].mlp.fc2.weight /= 8
    step = GradientPTQ(4, 4)
    layers = survey(loud, images[:1])
    bits = step.allot(loud, images, layers)
    assert set(bits) == set(layers)
    assert bits["blocks.0.mlp.fc2"][0] > bits["blocks.1.mlp.fc2"][0]
    assert bits["blocks.0.mlp.fc2"][1] > bits["blocks.1.mlp.fc2"][1]
    _, inputs, sizes = importance(loud, images[:1], layers, 4, 4)
    for i, names in ((0, [*layers]), (1, [*inputs])):
        average = sum(bits[n][i] * sizes[n][i] for n in names) / sum(sizes[n][i] for n in names)
        assert 3.5 < average <= 4
    small = GradientPTQ(4, 4, iterations=2).apply(loud, images)
    layer = quant_layers(small)["blocks.0.mlp.fc2"]
    planned = history_of(small).done[0][1]["bits"]["blocks.0.mlp.fc2"]
    assert [layer.quant_w.bits, layer.quant_x.bits] == planned
    assert GradientPTQ(4, 4, mixed=False).allot(loud, images, layers) == GradientPTQ().allot(loud, images, layers) == {}


def test_learned_rounding_and_mixed_bits_pay(model: nn.Module, images: Tensor, others: Tensor) -> None:
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.blocks[0].mlp.fc2.weight *= 4
        loud.blocks[1].mlp.fc2.weight /= 4
    seen, unseen = (nn.functional.interpolate(x[..., :3, :3], 32, mode="bilinear") for x in (images, others))
    errors = [
        error(GradientPTQ(3, 8, softmax=True, mixed=mixed, iterations=n).apply(loud, seen), loud, unseen)
        for mixed, n in ((False, 1), (False, 60), (True, 60))
    ]
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.95 * errors[1], errors


def test_the_bias_takes_the_mean_of_the_error() -> None:
    torch.manual_seed(0)
    w = Quantizer(4, channels=3)
    w.set(torch.full((3,), 0.1), torch.full((3,), 8))
    layer = QuantLinear(nn.Linear(5, 3), Quantizer(8), w)
    layer.quant_x.set(torch.tensor(0.05), torch.tensor(128))
    x, y = torch.randn(4, 7, 5), torch.randn(4, 7, 3) + 2
    fit_bias(layer, x, y)
    with torch.no_grad():
        assert torch.allclose((layer(x) - y).mean((0, 1)), torch.zeros(3), atol=1e-5)


def test_rounding_leaves_to_the_bias_what_a_bias_can_do_and_learns_on_what_is_read() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(12, 3)
    w = Quantizer(3, channels=3)
    fit_weight(w, plain.weight)
    layer = QuantLinear(plain, Quantizer(2), w)
    layer.quant_x.set(torch.tensor(0.8), torch.tensor(1))
    x = torch.randn(60, 12) + 0.5
    y = plain(x).detach()

    def learned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        own = copy.deepcopy(layer)
        GradientPTQ(iterations=40)._learn(own, x, y)
        assert torch.allclose((own(x) - y).mean(0), torch.zeros(3), atol=1e-5), "the bias that goes with the rounded weight"
        return own.weight.detach(), own.bias.detach()

    (weight, bias), (moved_weight, moved_bias) = learned(x, y), learned(x, y + 5)
    assert torch.equal(moved_weight, weight) and torch.allclose(moved_bias, bias + 5, atol=1e-5)
    assert torch.equal(learned(layer.quant_x(x), y)[0], weight)
    assert not torch.equal(layer.quant_w(layer.weight), weight)


def test_eight_bits_stay_deployable(model: nn.Module, images: Tensor, others: Tensor) -> None:
    for reduced, limit in ((True, 63), (False, 127)):
        small = GradientPTQ(iterations=8, reduce_range=reduced).apply(model, images)
        assert not getattr(small, "simulated", None) and error(small, model, others) < 0.1
        for layer in quant_layers(small).values():
            q = layer.weight / layer.quant_w.scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
            assert torch.allclose(q, q.round(), atol=1e-3) and q.abs().max() < limit + 0.1
            assert torch.equal(layer.quant_w(layer.weight), layer.weight) or torch.allclose(
                layer.quant_w(layer.weight), layer.weight, atol=1e-6
            )
    assert isinstance(GradientPTQ(4, 4, iterations=1).apply(model, images).blocks[0].attn.operands["probs"], LogSqrt2)
    with pytest.raises(VitreousError, match="iterations"):
        GradientPTQ(iterations=0)
