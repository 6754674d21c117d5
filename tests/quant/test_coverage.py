"""Shares of multiplications in few bits are those that the shapes give, and what is left is named with its reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support import error, small_vit
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import vitreous as vt
from vitreous.quant import coverage

# A small_vit of 2 blocks: 17 tokens of 48 values, 3 heads, patches of 3·8·8, 7 classes, one image.
N, C, D = 17, 48, 2
PATCHES, HEAD, LINEAR, PRODUCT = 16 * 192 * C, 7 * C, D * N * 12 * C * C, D * N * N * C  # one of the two products of attention
TOTAL = PATCHES + HEAD + LINEAR + 2 * PRODUCT


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit(depth=D)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_floats_are_nothing_and_named(model: nn.Module) -> None:
    found = coverage(model)
    assert found.quantized == 0 and found.shares == {"floats": pytest.approx(1)}
    assert sum(one.share for one in found.left) == pytest.approx(1)


SHARES = {
    "MinMax()": {"W8A8": PATCHES + HEAD + LINEAR, "A8A8": PRODUCT, "floats": PRODUCT},
    "MinMax(softmax=True)": {"W8A8": PATCHES + HEAD + LINEAR, "A8A8": 2 * PRODUCT},
    "RepQ(weights=4, activations=4)": {"W4A4": HEAD + LINEAR, "W4A8": PATCHES, "A4A4": 2 * PRODUCT},
    "Auto()": {"W8A8": PATCHES + HEAD + LINEAR, "floats": 2 * PRODUCT},
    "WeightOnly(bits=4)": {"W4": HEAD + LINEAR, "floats": PATCHES + 2 * PRODUCT},
    "IViT()": {"W8A8": PATCHES + HEAD + LINEAR, "A8A8": 3 * PRODUCT},  # softmax in two halves
}


@pytest.mark.parametrize("recipe", SHARES)
def test_shares_are_those_of_the_shapes(recipe: str, model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    small = vt.slim(model, vt.Recipe.parse(recipe), x)
    expected = SHARES[recipe]
    found = coverage(small, x)
    assert found.shares == pytest.approx({k: v / sum(expected.values()) for k, v in expected.items()})
    if recipe != "IViT()":
        assert sum(expected.values()) == TOTAL
    assert sum(one.share for one in found.left) == pytest.approx(expected.get("floats", 0) / sum(expected.values()))
    # People see it where they look at the model, again after loading.
    assert str(found) in repr(small) and str(found) in repr(copy.deepcopy(small))
    again = vt.load(vt.save(small, tmp_path / "small.safetensors"), base=model)
    assert str(found) in repr(again)


def test_what_is_left_says_why(x: Tensor) -> None:
    said = str(coverage(vt.slim(small_vit(depth=2), vt.quant.MinMax(), x)))
    share = 100 * PRODUCT / TOTAL
    assert f"{share:.1f} % blocks.0.attn, blocks.1.attn (softmax times values)" in said
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 1), num_heads=(1, 2)).eval()
    swin = vt.slim(swin, vt.quant.MinMax(), torch.rand(2, 3, 56, 56) - 0.5)
    assert "attention of a block that is not plain" in repr(swin)


def test_heads_say_how_many_are_gone(model: nn.Module, x: Tensor) -> None:
    assert "prune.Heads(share=0.34): 2 of 6 heads removed" in repr(vt.slim(model, vt.prune.Heads(share=0.34), x))


class Conv1D(nn.Module):
    """As Hugging Face's: a linear layer whose weight is `[inputs, outputs]`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.nf = linear.out_features
        self.weight, self.bias = nn.Parameter(linear.weight.detach().T.clone()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Own(nn.Linear):
    """Somebody's subclass, which computes the same."""


def _conv1d() -> nn.Module:
    model = small_vit(depth=D)
    for block in model.blocks:
        block.mlp.fc1 = Conv1D(block.mlp.fc1)
    return model


def _own() -> nn.Module:
    model = small_vit(depth=D)
    for block in model.blocks:
        block.attn.qkv.__class__ = Own
    return model


def _torchvision() -> nn.Module:
    torch.manual_seed(0)
    shape = dict(image_size=32, patch_size=8, num_layers=D, num_heads=3, hidden_dim=C, mlp_dim=4 * C, num_classes=7)
    model = VisionTransformer(**shape).eval()  # type: ignore[arg-type]
    nn.init.normal_(model.heads.head.weight, std=0.2)
    return model


@pytest.mark.parametrize("step", ["RepQ()", "WeightOnly()"])
@pytest.mark.parametrize("make", [_conv1d, _own, _torchvision])
def test_linear_layers_under_other_names_are_quantized_too(make: Any, step: str, x: Tensor, tmp_path: Path) -> None:
    model = make()
    small = vt.slim(model, vt.Recipe.parse(step), x)
    bits, expected = ("W8A8", PATCHES + HEAD + LINEAR) if step == "RepQ()" else ("W8", HEAD + LINEAR)
    assert coverage(small, x).shares[bits] == pytest.approx(expected / TOTAL)
    assert error(small, model, x) < 0.1
    again = vt.load(vt.save(small, tmp_path / "small.safetensors"), base=model)
    assert error(again, small, x) == 0


class Pixels(nn.Module):
    """An MLP written as convolutions of single pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.up, self.down = nn.Conv2d(16, 64, 1), nn.Conv2d(64, 16, 1, bias=False)
        self.pretrained_cfg = dict(input_size=(3, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.stem(x)).relu()).mean((2, 3)))


@pytest.mark.parametrize("recipe", ["RepQ()", "Auto()", "AdaLog(weights=4, activations=4)"])
def test_convolutions_of_single_pixels_are_linear_layers(recipe: str, x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pixels().eval()
    small = vt.slim(model, vt.Recipe.parse(recipe), x)
    assert coverage(small, x).quantized == pytest.approx(1)
    with torch.no_grad():
        assert error(small, model, x) < 0.1 and torch.equal(small(x), small(x.contiguous(memory_format=torch.channels_last)))
    if recipe == "RepQ()":
        vt.ship(small, tmp_path / "m.onnx", example=x)
        assert vt.Runtime(tmp_path / "m.onnx").integer_ops == 3, "both of them, and the head"


def test_modules_named_stay_in_floats(x: Tensor, tmp_path: Path) -> None:
    model = small_vit(depth=2)
    whole, one = ("blocks.1", "patch_embed"), ("blocks.0.attn.qkv",)
    for step in (vt.quant.Auto(floats=whole), vt.quant.RepQ(floats=whole), vt.quant.RepQ(floats=one)):
        small = vt.slim(model, step, x)
        left = {part.name for part in coverage(small, x).left}
        assert left >= ({"blocks.1.mlp.fc1", "patch_embed.proj"} if step.floats is whole else {"blocks.0.attn.qkv"})
        assert error(small, model, x) < 0.1, "what a layer of floats reads is what it read before"
        assert error(vt.load(vt.save(small, tmp_path / "s.safetensors"), base=model), small, x) == 0
    with pytest.raises(vt.VitreousError, match=r"'blocks\.7', in which there is no layer to quantize"):
        vt.slim(model, vt.quant.Auto(floats=("blocks.7",)), x)
