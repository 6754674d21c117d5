"""Weights that stay packed in the file: `MatMulNBits` of ONNX Runtime, low-bit constants of OpenVINO."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

DOMAIN = "com.microsoft"
BLOCKS = (256, 128, 64, 32, 16)  # inputs that share a scale, as the kernels take them
DEFAULT_ZERO = {4: 8, 8: 128}  # what MatMulNBits takes for a zero point when it is given none
FLOAT32 = 1  # MatMulNBits: how exact its arithmetic is. Its fast mode would round the activations to 8 bits


def pack(model: onnx.ModelProto) -> int:
    """Turn products of floats with stored integers into `MatMulNBits`, in place; how many bits they have, 0 if there are none.

    Where activations are quantized too nothing changes, since runtimes make integer products of those. Codes of 0 to 15
    take four bits, others eight.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    nodes, bits = [], 0
    for node in graph.node:
        found = _weight(node, maker, stored) if node.op_type in ("MatMul", "Gemm") else None
        if found is None:
            nodes.append(node)
            continue
        tensors, attributes = _packed(f"{node.output[0]}_packed", *found)
        graph.initializer.extend(tensors)
        bits = max(bits, attributes["bits"])
        bias = node.input[2] if len(node.input) > 2 else ""
        out = f"{node.output[0]}_product" if bias else node.output[0]
        inputs = [node.input[0], *(tensor.name for tensor in tensors)]
        nodes.append(helper.make_node("MatMulNBits", inputs, [out], domain=DOMAIN, **attributes))
        if bias:
            nodes.append(helper.make_node("Add", [out, bias], [node.output[0]]))
    if bits:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        _replace(graph, nodes)
    return bits


Weight = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes [O, I], scales and zero points [O, groups]


def _weight(node: onnx.NodeProto, maker: dict[str, onnx.NodeProto], stored: dict[str, onnx.TensorProto]) -> Weight | None:
    """The stored weight `[O, I]` of a product with floats; None where there is none."""
    if _made(node.input[0], maker).op_type == "DequantizeLinear":
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    turned, shape, name = bool(attributes.get("transB")), None, node.input[1]
    while (by := maker.get(name)) is not None and by.op_type in ("Transpose", "Reshape"):
        if by.op_type == "Transpose":
            turned = not turned
        elif shape is None and by.input[1] in stored:
            shape = numpy_helper.to_array(stored[by.input[1]])
        name = by.input[0]
    if by is None or by.op_type != "DequantizeLinear" or by.input[0] not in stored or not turned:
        return None
    codes, scale, zero = (numpy_helper.to_array(stored[name]) for name in by.input)
    if codes.dtype == np.int8:
        codes, zero = codes.astype(np.int16) + 128, zero.astype(np.int16) + 128
    outputs = len(codes) if shape is None else int(shape[0])
    return (
        codes.reshape(outputs, -1).astype(np.uint8),
        scale.reshape(outputs, -1).astype(np.float32),
        zero.reshape(outputs, -1).astype(np.uint8),
    )


def _made(name: str, maker: dict[str, onnx.NodeProto]) -> onnx.NodeProto:
    """The node that made a tensor, before it was only given another shape."""
    node = maker.get(name, onnx.NodeProto())
    while node.op_type in ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"):
        node = maker.get(node.input[0], onnx.NodeProto())
    return node


def _packed(name: str, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> tuple[list[onnx.TensorProto], dict[str, Any]]:
    """The inputs of a `MatMulNBits` behind the activations, and its attributes."""
    outputs, inputs = codes.shape
    bits = 4 if codes.max(initial=0) <= 15 and zero.max(initial=0) <= 15 else 8
    groups = scale.shape[1]
    size = inputs // groups if groups > 1 else next((b for b in BLOCKS if inputs % b == 0), BLOCKS[-1])
    blocks = -(-inputs // size)
    if groups == 1:  # the kernels know no whole rows: blocks that share one scale are the same
        scale, zero = scale.repeat(blocks, 1), zero.repeat(blocks, 1)
    codes = np.pad(codes, ((0, 0), (0, blocks * size - inputs)))
    codes = _nibbles(codes) if bits == 4 else codes
    tensors = [
        numpy_helper.from_array(codes.reshape(outputs, blocks, -1), name),
        numpy_helper.from_array(scale, f"{name}_scale"),
    ]
    if (zero != DEFAULT_ZERO[bits]).any():
        tensors.append(numpy_helper.from_array(_nibbles(zero) if bits == 4 else zero, f"{name}_zero"))
    return tensors, {"K": inputs, "N": outputs, "bits": bits, "block_size": size, "accuracy_level": FLOAT32}


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes of 4 bits a byte along the rows, the first in its lower half."""
    codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return codes[:, ::2] | codes[:, 1::2] << 4


def _codes(nibbles: np.ndarray) -> np.ndarray:
    """The inverse of `_nibbles`."""
    return np.stack((nibbles & 15, nibbles >> 4), axis=-1).reshape(len(nibbles), -1)


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Make `nodes` those of the graph, without what nobody reads any more."""
    kept, used = [], {output.name for output in graph.output}
    for node in reversed(nodes):
        if used.intersection(node.output):
            kept.append(node)
            used.update(node.input)
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    told = [value for value in graph.value_info if value.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(tensors)
    graph.value_info.extend(told)


def reader() -> Any:
    """How OpenVINO reads `MatMulNBits`, to be added to a `Core`: as constants of its own low-bit types.

    Its own reader differs between versions: of 8 bits most know nothing, and of the bias some add it to the weight.
    """
    from openvino.frontend.onnx import ConversionExtension

    return ConversionExtension("MatMulNBits", DOMAIN, _read)


def _read(node: Any) -> Any:
    import openvino
    from openvino import opset13 as ops

    inputs, outputs = node.get_attribute("K"), node.get_attribute("N")
    bits, size = node.get_attribute("bits"), node.get_attribute("block_size")
    blocks = -(-inputs // size)
    codes, scale, *zeros = (np.asarray(node.get_input(i).get_node().data) for i in range(1, node.get_input_size()))
    codes = codes.reshape(outputs, -1)
    zero = zeros[0] if zeros else np.full((outputs, blocks), DEFAULT_ZERO[bits], np.uint8)
    if bits == 4:
        codes, zero = _codes(codes), _codes(zero)[:, :blocks] if zeros else zero
    codes, scale, zero = codes[:, :inputs], scale.reshape(outputs, blocks), zero.reshape(outputs, blocks)
    rows = (scale == scale[:, :1]).all() and (zero == zero[:, :1]).all()
    shape = (outputs, inputs) if rows else (outputs, blocks, size)
    scale, zero = (t[:, :1] if rows else t[..., None] for t in (scale, zero))

    def constant(values: np.ndarray) -> Any:
        if bits == 4:
            packed, kind = _nibbles(values.reshape(1, -1)), openvino.Type.u4
        else:
            packed, kind = (values ^ 128).view(np.int8), openvino.Type.i8
        tensor = openvino.Tensor(np.ascontiguousarray(packed), openvino.Shape(values.shape), kind)
        stored = openvino.op.Constant(tensor, shared_memory=False)  # or it would point to what numpy frees
        return ops.convert(stored, "f32")

    weight = constant(codes.reshape(shape))
    if bits == 4 or zeros:
        weight = ops.subtract(weight, constant(zero))
    weight = ops.multiply(weight, ops.constant(np.ascontiguousarray(scale)))
    if not rows:
        weight = ops.reshape(weight, ops.constant(np.array([outputs, inputs], np.int64)), False)
    return ops.matmul(node.get_input(0), weight, False, True).outputs()
