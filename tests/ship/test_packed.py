"""Packed weights: what the file holds, what runtimes keep of it, and that it composes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from onnx import helper, numpy_helper
from support import small_vit
from torch import nn

from vitreous.prune import Heads
from vitreous.quant.minmax import MinMax
from vitreous.quant.weightonly import WeightOnly, WeightOnlyLinear
from vitreous.ship import Runtime, ship
from vitreous.ship.packed import _codes, _nibbles, pack
from vitreous.ship.shipment import ship_all
from vitreous.steps import slim
from vitreous.tokens import EViT

X = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def layers(model: nn.Module) -> dict[str, WeightOnlyLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, WeightOnlyLinear)}


def integers(layer: WeightOnlyLinear) -> np.ndarray:
    """The codes that a file must hold, `[O, I]`."""
    w = layer.quant_w
    q = (w.rows(layer.weight) / w.scale.reshape(-1, 1)).round() + w.zero_point.reshape(-1, 1)
    return q.clamp(w.low, w.high).reshape(layer.weight.shape).int().numpy()


def unpacked(graph: onnx.GraphProto) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each `MatMulNBits` the codes `[N, K]`, as unsigned integers, and the scales."""
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            a = {x.name: helper.get_attribute_value(x) for x in node.attribute}
            codes = stored[node.input[1]].reshape(a["N"], -1)
            found.append(((_codes(codes) if a["bits"] == 4 else codes)[:, : a["K"]], stored[node.input[2]]))
    return found


def test_two_codes_a_byte_by_hand() -> None:
    codes = np.array([[1, 2, 3], [15, 0, 9]], np.uint8)
    assert _nibbles(codes).tolist() == [[0x21, 0x03], [0x0F, 0x09]]
    assert _codes(_nibbles(codes)).tolist() == [[1, 2, 3, 0], [15, 0, 9, 0]]


@pytest.mark.parametrize("bits", [4, 8])
def test_both_formats_hold_our_integers_and_compute_the_same(bits: int, tmp_path: Path) -> None:
    """In one file with fewer heads and fewer tokens, for any batch."""
    original = small_vit(depth=1)
    model = slim(original, [Heads(share=0.34), EViT(keep=0.5, at=(0,)), WeightOnly(bits=bits)], X)
    wanted = layers(model)
    for made in ship_all(model, [tmp_path / "m.onnx", tmp_path / "m.xml"], example=X):
        assert made.parity.worst < 1e-3 and made.parity.batches == (1, 3, 16)
        assert made.precision == f"int{bits} weights" and made.integer_ops == 0 and f"int{bits} weights" in str(made)
        assert made.packed_ops == len(wanted) == 5, "the runtime keeps every weight packed"
        runtime = Runtime(made.path)
        assert runtime.precision == "fp32" and runtime.macs is not None
        assert 0 <= runtime.macs - macs(model) < 1000, "the token step has small products of its own"
        assert runtime.parameters_count > sum(layer.weight.numel() for layer in wanted.values())
    graph = onnx.load(tmp_path / "m.onnx").graph
    for (codes, scale), layer in zip(unpacked(graph), wanted.values()):
        assert np.array_equal(codes, integers(layer) + (128 if bits == 8 else 0))
        assert set(scale.flatten().tolist()) == set(layer.quant_w.scale.flatten().tolist())
    ops = openvino.Core().read_model(tmp_path / "m.xml").get_ops()
    constants = [op for op in ops if op.get_type_name() == "Constant"]
    kind = openvino.Type.u4 if bits == 4 else openvino.Type.i8
    sizes = [int(np.prod(list(op.get_output_shape(0)))) for op in constants if op.get_element_type() == kind]
    assert all(layer.weight.numel() in sizes for layer in wanted.values())
    floats = [tuple(op.get_output_shape(0)) for op in constants if op.get_element_type() == openvino.Type.f32]
    assert not {tuple(layer.weight.shape) for layer in wanted.values()} & set(floats)


def macs(model: nn.Module) -> int:
    """Of one image: 17 tokens, and behind the attention of block 0 the class token, 8 kept ones and one that fuses the rest."""
    total, tokens = 16 * 48 * 3 * 8 * 8 + 48 * 7, 17
    for i, block in enumerate(model.blocks):
        width = block.attn.qkv.out_features // 3
        total += tokens * 48 * 4 * width + 2 * tokens * tokens * width
        tokens = 10 if i == 0 else tokens
        total += tokens * 2 * 48 * 192
    return total


@pytest.mark.parametrize(("bits", "least"), [(4, 6.3), (8, 3.7)])
def test_files_are_as_small_as_their_bits(bits: int, least: float, tmp_path: Path) -> None:
    """One layer without bias, and one whose rows no block divides."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(768, 768, bias=False), nn.GELU(), nn.Linear(768, 25), nn.Linear(25, 10))
    small = WeightOnly(bits=bits).apply(wide)
    for made in ship_all(small, [tmp_path / "m.onnx", tmp_path / "m.xml"], example=torch.randn(4, 3, 16, 16), batch=2):
        assert made.parity.worst < 1e-4 and (made.packed_ops, made.batch) == (3, 2)
        assert 4 * sum(p.numel() for p in wide.parameters()) / made.bytes > least


def test_integer_models_are_left_alone(tmp_path: Path) -> None:
    made = ship(MinMax().apply(small_vit(depth=1), X), tmp_path / "q.onnx", example=X, batch=2)
    assert made.precision == "int8" and made.packed_ops == 0 and made.integer_ops >= 5
    graph = onnx.load(made.path)
    before = graph.SerializeToString()
    assert pack(graph) == 0 and graph.SerializeToString() == before


def test_pt2_keeps_them_simulated(tmp_path: Path) -> None:
    made = ship(WeightOnly().apply(small_vit(depth=1)), tmp_path / "m.pt2", example=X, batch=2)
    assert (made.precision, made.packed_ops) == ("fp32", 0) and made.parity.worst < 1e-5
