"""What moves from activations into weights, and what must not change by it."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from support import error, small_vit
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.quant.layers import FakeQuantizer, Quantizer, QuantLinear, quant_layers
from vitreous.quant.minmax import MinMax
from vitreous.quant.smoothquant import SmoothQuant, migration, smooth


@pytest.fixture(scope="module")
def uneven() -> nn.Module:
    """A few channels of the LayerNorms are far wider than the rest."""
    model = small_vit(depth=2)
    with torch.no_grad():
        for block in model.blocks:
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[:4] *= 25
                layer.weight[:, :4] /= 25
    return model


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


def reader(weight: list[list[float]]) -> QuantLinear:
    linear = nn.Linear(2, len(weight))
    linear.weight.data = torch.tensor(weight)
    return QuantLinear(linear, Quantizer(8), Quantizer(8, symmetric=True, channels=len(weight)), "norm")


def test_the_scale_of_equation_4_by_hand() -> None:
    q, k = reader([[1.0, 0.5], [-4.0, 0.25]]), reader([[2.0, -0.125]])
    reach = torch.tensor([16.0, 8.0])
    # Over both readers max|W| is 4 and 0.5: s = √(16/4), √(8/0.5).
    assert torch.allclose(migration(reach, [q, k], 0.5), torch.tensor([2.0, 4.0], dtype=torch.float64))
    assert torch.allclose(migration(reach, [q, k], 1.0), reach.double())
    assert torch.allclose(migration(reach, [q, k], 0.0), torch.tensor([0.25, 2.0], dtype=torch.float64))
    assert torch.isfinite(migration(torch.zeros(2), [reader([[0.0, 0.0]])], 0.5)).all()


def test_smoothing_by_hand() -> None:
    norm, layer = nn.LayerNorm(2), reader([[1.0, 2.0]])
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([6.0, 1.0]))
        norm.bias.copy_(torch.tensor([3.0, -1.0]))
        layer.bias.fill_(0.5)
        smooth(norm, [layer], torch.tensor([3.0, 0.5], dtype=torch.float64), torch.tensor([0.0, -2.0]))
    assert norm.weight.tolist() == [2.0, 2.0] and norm.bias.tolist() == [1.0, 2.0]
    assert layer.weight.tolist() == [[3.0, 1.0]] and layer.bias.tolist() == [0.5 - 4.0]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_the_function_stays_and_the_channels_meet(uneven: nn.Module, images: Tensor, others: Tensor, alpha: float) -> None:
    small = SmoothQuant(alpha=alpha, reduce_range=False).apply(uneven, images)
    assert error(floats(small), uneven, others) < 1e-5
    if alpha == 0.5:
        norm, layer = small.blocks[0].norm1, small.blocks[0].attn.qkv
        before, w = uneven.blocks[0].norm1, uneven.blocks[0].attn.qkv.weight
        ratio = before.weight / norm.weight
        assert not torch.allclose(ratio, torch.ones(48)) and torch.allclose(layer.weight, w * ratio, rtol=1e-4)
        assert ratio[:4].mean() > 5 * ratio[4:].mean()
    if alpha == 1.0:  # every channel reaches exactly 1
        assert small.blocks[1].attn.qkv.quant_x.scale * 255 <= 2.0001


def test_ranges_are_those_of_the_smoothed_model(uneven: nn.Module, images: Tensor) -> None:
    small = SmoothQuant(reduce_range=False).apply(uneven, images)
    again = MinMax(reduce_range=False).fit
    copied = copy.deepcopy(small)
    again(copied, images)
    a, b = small.state_dict(), copied.state_dict()
    assert all(torch.allclose(a[k].double(), b[k].double(), rtol=1e-4, atol=1.01) for k in a if k.endswith("zero_point"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-4) for k in a if k.endswith("scale"))


def test_beats_minmax_where_channels_differ(uneven: nn.Module, images: Tensor, others: Tensor) -> None:
    for bits, factor in ((6, 0.6), (8, 0.8)):
        smoothed, plain = (s(bits, bits, reduce_range=False).apply(uneven, images) for s in (SmoothQuant, MinMax))
        assert error(smoothed, uneven, others) < factor * error(plain, uneven, others)


def test_all_readers_of_one_norm_move_together(images: Tensor, others: Tensor) -> None:
    """EVA-02 keeps queries, keys and values apart, and without a bias for the keys."""
    small_eva = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7, use_rot_pos_emb=False)
    model = timm.create_model("eva02_base_patch14_224", **small_eva).eval()
    small = SmoothQuant(reduce_range=False).apply(model, images)
    assert error(floats(small), model, others) < 1e-5
    shared: dict[str, set[float]] = {}
    for layer in quant_layers(small).values():
        if isinstance(layer, QuantLinear) and layer.after:
            shared.setdefault(layer.after, set()).add(float(layer.quant_x.scale))
    assert all(len(scales) == 1 for scales in shared.values())


@pytest.mark.parametrize("bits", [8, 4])
def test_dead_channels_are_no_trouble(images: Tensor, bits: int) -> None:
    model = small_vit(depth=2, qkv_bias=False)
    with torch.no_grad():
        model.blocks[0].norm1.weight[:3] = 0
        model.blocks[0].norm1.bias[:3] = torch.tensor([0.0, 5.0, -300.0])
        model.blocks[1].mlp.fc1.weight[:, 2] = 0
        model.blocks[1].mlp.fc1.weight[3] = 0
    small = SmoothQuant(bits, bits, reduce_range=False).apply(model, images)
    assert all(torch.isfinite(v).all() for v in small.state_dict().values())
    assert error(floats(small), model, images) < 1e-4


def test_refuses_an_alpha_that_is_none() -> None:
    for alpha in (-0.1, 1.5):
        with pytest.raises(VitreousError, match="alpha must be 0 to 1"):
            SmoothQuant(alpha=alpha)
