"""Auto: the combination of the published ideas."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from support import error, small_vit, uneven_vit
from torch import Tensor, nn

import vitreous.quant.auto as auto_module
from vitreous.quant import Auto, MinMax, RepQ, why
from vitreous.quant.auto import Balanced, balance, fit_layers, in_floats, inputs, taker
from vitreous.quant.layers import QuantLinear, quant_layers
from vitreous.quant.reconstruction import chain
from vitreous.steps import slim
from vitreous.tokens import MCTF, EViT


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """As in real ViTs, a few channels are far wider than the rest, of LayerNorms, of values and behind the GELU."""
    model = uneven_vit(wide=20)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[-6:] += 10
            block.mlp.fc1.weight[:3] *= 10
            block.mlp.fc2.weight[:, :3] /= 10
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def others() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_ahead_of_its_parts_where_channels_differ(model: nn.Module, images: Tensor, others: Tensor) -> None:
    for bits, factor in ((8, 0.6), (4, 0.7)):
        ours = error(Auto(bits, bits, reduce_range=False).apply(model, images), model, others)
        for rival in (MinMax, RepQ):
            assert ours < factor * error(rival(bits, bits, reduce_range=False).apply(model, images), model, others)


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_what_a_layer_reads_comes_centred_and_divided_and_nothing_else_changes(
    model: nn.Module, images: Tensor, others: Tensor, name: str
) -> None:
    step = Auto()
    built = copy.deepcopy(model)
    step.build(built, step.plan(built, images))
    floats = in_floats(built)
    block, same = floats.blocks[0], in_floats(built).blocks[0]
    layer = block.get_submodule(name)
    g = torch.Generator().manual_seed(0)
    divisor, centre = torch.rand(layer.in_features, generator=g) + 0.5, torch.randn(layer.in_features, generator=g)
    with torch.no_grad():
        x = floats.norm_pre(floats._pos_embed(floats.patch_embed(others)))
        before, wanted = inputs(same, [name], x)
        take = taker(block, name, [layer])
        assert take is not None
        take(divisor, centre)
        layer.bias.add_(layer.weight @ centre)
        layer.weight.mul_(divisor)
        after, got = inputs(block, [name], x)
        seen = after[name]
        if isinstance(layer.quant_x, Balanced):  # switched off it passes what it is given, so its affine is applied here
            seen = seen * layer.quant_x.factor + layer.quant_x.offset
        else:
            assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-3)
        assert torch.allclose(seen, (before[name] - centre) / divisor, rtol=1e-3, atol=1e-3)


def test_balance_by_hand() -> None:
    low, high = torch.tensor([-1.0, 0.0, 5.0]), torch.tensor([1.0, 8.0, 5.0])
    divisor, centre = balance(low, high, 1.0)
    assert torch.allclose(centre, torch.tensor([0.0, 4.0, 5.0]))
    assert divisor[1] / divisor[0] == 4 and 0 < divisor[2] < 1e-3
    root, _ = balance(low, high, 0.5)
    assert torch.allclose(root, divisor.sqrt())
    plain, none = balance(low, high, 0.0)
    assert plain.eq(1).all() and none.eq(0).all()


def test_the_weight_makes_up_for_what_came_before() -> None:
    """A layer that is given less than it should have been gives what it should have given."""
    g = torch.Generator().manual_seed(0)
    step, model = Auto(4, 8), nn.Sequential(nn.Linear(16, 8))
    step.build(model, {"reduce_range": False, "layers": {"0": ("", "")}, "bits": {}})
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    wanted = torch.randn(4000, 16, generator=g) @ torch.randn(16, 16, generator=g)
    with torch.no_grad():
        target = layer(wanted) * 0 + wanted @ layer.weight.T + layer.bias
        fit_layers([layer], wanted, 0.8 * wanted + 3, None)
        assert (layer(0.8 * wanted + 3) - target).square().mean() < 0.03 * target.var()
        q = (layer.weight / layer.quant_w.scale[:, None]).round() + layer.quant_w.zero_point[:, None]
        assert q.min() >= 0 and q.max() <= 15


def test_channels_that_leave_their_ranges_on_other_images_keep_some_room() -> None:
    """Balanced to the last, every channel would be clipped on other images; on its own images that does not show."""
    g = torch.Generator().manual_seed(0)
    wide = torch.logspace(-1.5, 0, 64)
    x = wide * (2 * torch.rand(4096, 64, generator=g) - 1)
    x[2048:] *= 1 + (torch.rand(2048, 64, generator=g) < 0.05)  # in the second half of the images some leave their range
    chosen = []
    for given in (x, x[:2048].repeat(2, 1)):
        step, model = Auto(4, 8), nn.Sequential(nn.Linear(64, 8))
        step.build(model, {"reduce_range": False, "layers": {"0": ("", "")}, "bits": {}})
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(8, 64, generator=g) / wide)
            chosen.append(fit_layers([model[0]], given, given, lambda divisor, centre: None))
    assert "α = 1:" not in chosen[0] and "α = 1:" in chosen[1]


def test_says_what_it_chose_for_every_layer(model: nn.Module, images: Tensor) -> None:
    small = Auto(4, 4).apply(model, images)
    told = why(small)
    assert set(told) == set(quant_layers(small)) and why(model) == {}
    assert all("off" in text for text in told.values())
    assert "α = 1" in told["blocks.0.attn.qkv"] and "at α = 0" in told["blocks.0.attn.qkv"]
    assert "α = 0" in told["patch_embed.proj"]
    assert "simulated" not in told and "4-bit" in small.simulated


@pytest.mark.parametrize("reduced", [False, True])
def test_eight_bits_lie_on_the_grids_of_runtimes(model: nn.Module, images: Tensor, reduced: bool) -> None:
    small = Auto(reduce_range=reduced).apply(model, images)
    for layer in quant_layers(small).values():
        q = layer.weight.detach().flatten(1) / layer.quant_w.scale[:, None]
        assert torch.allclose(q, q.round(), atol=2e-3) and q.abs().max().round() <= (63 if reduced else 127)
        assert (layer.quant_x.low, layer.quant_x.high) == (0, 255) and layer.quant_x.scale.ndim == 0
    assert all(block.attn.operands is None for block in small.blocks) and not getattr(small, "simulated", "")
    assert Auto(softmax=True).apply(model, images).blocks[0].attn.operands is not None


@pytest.mark.parametrize("reducer", [EViT(keep=0.5, at=(0, 1)), MCTF(r=2)], ids=str)
def test_with_tokens_dropped_or_merged(model: nn.Module, images: Tensor, others: Tensor, reducer: EViT | MCTF) -> None:
    for order in ([reducer, Auto(reduce_range=False)], [Auto(reduce_range=False), reducer]):
        small = slim(model, order, images)
        assert chain(small, images[:1]) == []
        with torch.no_grad():
            off = (small(others) - reducer.apply(model)(others)).norm(dim=1) / small(others).norm(dim=1)
        assert off.median() < 0.06


def test_layers_that_read_one_norm_are_never_fitted_apart(
    images: Tensor, others: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its channels would be divided twice. Here two layers read the second norm, and places are held one at a time."""
    model = small_vit(depth=2, mlp_layer=timm.layers.SwiGLU)
    reduced = EViT(keep=0.5, at=(1,)).apply(model)
    monkeypatch.setattr(auto_module, "PLACES", 1)
    with torch.no_grad():
        off = (Auto(reduce_range=False).apply(reduced, images)(others) - reduced(others)).norm(dim=1) / reduced(others).norm(
            dim=1
        )
    assert off.median() < 0.06


def test_other_blocks_and_missing_biases(images: Tensor) -> None:
    size = dict(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    swin = timm.create_model("swin_tiny_patch4_window7_224", **size).eval()
    for model in (swin, small_vit(depth=1, qkv_bias=False), small_vit(depth=1, init_values=0.5, reg_tokens=2)):
        small = Auto(reduce_range=False).apply(model, images)
        assert error(small, model, images) < 0.03
