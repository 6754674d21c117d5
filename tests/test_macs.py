"""Counted multiplications against formulas by hand, whatever kernel runs them, and no operator passed over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import flop_registry, register_flop_formula

from vitreous.errors import VitreousError
from vitreous.macs import FORMULAS, CountMacs, _multiplies
from vitreous.prove.cost import macs

N, C, DEPTH = 17, 32, 2
BLOCK = N * C * 3 * C + 2 * N * N * C + N * C * C + 2 * N * C * 4 * C
VIT = 16 * (3 * 8 * 8) * C + DEPTH * BLOCK + C * 5


class Calls(nn.Module):
    """A model that is one function of its images."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        self.function(x)
        return x.flatten(1)[:, :2].float()


def counted(function: Callable[[Tensor], Any], x: Tensor | None = None) -> int:
    return macs(Calls(function), torch.randn(1, 3, 32, 32) if x is None else x)


@pytest.fixture
def vit() -> nn.Module:
    shape: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=C, depth=DEPTH, num_heads=2, num_classes=5)
    return timm.create_model("vit_tiny_patch16_224", **shape).eval()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vit(vit: nn.Module, fused: bool, device: str, dtype: torch.dtype) -> None:
    for block in vit.blocks:
        block.attn.fused_attn = fused
    x = torch.zeros(1, 3, 32, 32, dtype=dtype, device=device)
    assert macs(vit.to(device, dtype), x) == VIT
    with torch.inference_mode(), CountMacs() as count:
        vit(x)
    assert count.total == VIT


def test_whole_layers_and_compiled_models(vit: nn.Module) -> None:
    x = torch.zeros(1, 3, 32, 32)
    assert macs(torchvision.models.VisionTransformer(32, 8, DEPTH, 2, C, 4 * C, num_classes=5).eval(), x) == VIT
    assert torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(C, 2, 4 * C, batch_first=True)
    tokens = torch.randn(1, N, C)
    assert counted(lambda x: nn.TransformerEncoder(layer, DEPTH).eval()(tokens)) == DEPTH * BLOCK
    compiled: Any = torch.compile(copy.deepcopy(vit), backend="eager")
    compiled(x)
    assert macs(compiled, x) == VIT


def test_every_kind_of_product() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    attention = 2 * 4 * 5 * 7 * (8 + 6)
    assert counted(lambda x: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)) == attention
    q = torch.randn(2, 4, 7, 8)
    assert counted(lambda x: flex_attention(q, q, q)) == 2 * 4 * 7 * 7 * 16
    a, b = torch.randn(2, 5, 3), torch.randn(2, 3, 4)
    assert counted(lambda x: torch.baddbmm(torch.zeros(2, 5, 4), a, b)) == counted(lambda x: a @ b) == 2 * 5 * 3 * 4
    assert counted(lambda x: torch.addbmm(torch.zeros(5, 4), a, b)) == 2 * 5 * 3 * 4
    assert counted(lambda x: torch.einsum("bnc,bcd->bnd", a, b)) == 2 * 5 * 3 * 4
    assert counted(lambda x: nn.Conv2d(3, 6, 3, groups=3)(x)) == 6 * 30 * 30 * 9
    assert counted(lambda x: nn.ConvTranspose2d(3, 6, 2, stride=2)(x)) == 32 * 32 * 3 * 6 * 4
    assert counted(lambda x: torch._int_mm(torch.ones(32, 64, dtype=torch.int8), torch.ones(64, 8, dtype=torch.int8))) == 16384
    assert counted(lambda x: torch.ops.vitreous.matmul_integer(a.to(torch.int8), b.to(torch.int8))) == 2 * 5 * 3 * 4
    scale, packed = torch.ones(8), torch.ones(8, 64, dtype=torch.int8)
    assert counted(lambda x: torch._weight_int8pack_mm(torch.ones(4, 64).bfloat16(), packed, scale.bfloat16())) == 4 * 64 * 8


def test_backward_passes() -> None:
    """The scores once more and four products, two and a half times the forward pass, for attention; two for a linear layer."""
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with CountMacs() as count:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert count.total == 3.5 * 2 * 5 * 5 * 16
    weight, x = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    with CountMacs() as count:
        F.linear(x, weight).sum().backward()
    assert count.total == 3 * 3 * 4 * 8


@torch.library.custom_op("elsewhere::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x @ x


def test_what_is_not_known_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 1, 8)
    with pytest.raises(VitreousError, match="aten::mkldnn_rnn_layer"):
        counted(lambda _: nn.LSTM(8, 8)(x))
    with pytest.raises(VitreousError, match="aten::_scaled_dot_product"):
        monkeypatch.delitem(FORMULAS, "aten::_scaled_dot_product_flash_attention_for_cpu")
        q = torch.randn(1, 2, 5, 8)
        monkeypatch.delitem(flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, raising=False)
        counted(lambda _: F.scaled_dot_product_attention(q, q, q))


def test_operators_of_others() -> None:
    """One written in Python is looked into; of the rest nothing is known until its formula is."""
    x = torch.randn(4, 4)
    assert counted(lambda _: torch.ops.elsewhere.opaque(x)) == 64
    library = torch.library.Library("elsewhere", "FRAGMENT")
    library.define("secret(Tensor x) -> Tensor")
    library.impl("secret", lambda x: x + 0, "CPU")
    with pytest.raises(VitreousError, match="elsewhere::secret"):
        counted(lambda _: torch.ops.elsewhere.secret(x))
    register_flop_formula(torch.ops.elsewhere.secret)(lambda shape, **_: 2 * shape[0] ** 3)
    try:
        assert counted(lambda _: torch.ops.elsewhere.secret(x)) == 64
    finally:
        del flop_registry[torch.ops.elsewhere.secret]


def test_all_attention_operators_of_this_torch_are_known() -> None:
    """Whatever torch comes next: a new kernel is a formula to write, or made of others."""
    names = {n.split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")}
    kernels = {n for n in names if "dot_product" in n}
    composite = {"aten::scaled_dot_product_attention", "aten::_scaled_dot_product_attention_math"}
    assert kernels - set(FORMULAS) <= composite | {n for n in kernels if "quantized" in n}
    harmless = ("upsample_bilinear2d", "linalg_vector_norm", "convert_element_type", "prod", "_thnn_fused_lstm_cell", "isinf")
    assert not any(_multiplies(f"aten::{n}") for n in harmless)
    assert all(_multiplies(f"aten::{n}") for n in ("mm", "bmm", "mkldnn_rnn_layer", "addmv", "convolution", "sspaddmm", "hspmm"))
