"""What OpenVINO's plugin for processors wants of a graph: what it runs faster so, or wrong otherwise."""

from __future__ import annotations

import os
import re
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import VitreousError
from .packed import reader

if TYPE_CHECKING:
    import openvino

_MAKING = threading.Lock()
HEADS_BACK = [0, 2, 1, 3]  # `[B, heads, N, d]` to `[B, N, heads, d]`


@cache
def _core() -> tuple[openvino.Core, int]:
    import openvino

    made = openvino.Core()
    made.add_extension(reader())
    return made, os.getpid()


def core() -> openvino.Core:
    """The one core of this process, which lives as long as the process does.

    The plugin for processors gives the thread that loads it an alternate stack for signals, and with the last of a core's
    models takes it away. Of two cores that end in the order in which they began, the second puts back the stack of the first,
    which is gone: the next signal, a Ctrl-C or the end of a process that loads pictures, is a segmentation fault.

    Raises `VitreousError` in a fork of a process that has one: its threads are not there, and it would wait for them for ever.
    """
    with _MAKING:
        made, process = _core()
    if process != os.getpid():
        raise VitreousError('OpenVINO ran before this process was forked, and cannot run in the fork: start it by "spawn"')
    return made


@cache
def halves() -> bool:
    """Whether the plugin may compute floats in half precision on this processor when no one asks otherwise."""
    return not {"BF16", "FP16"}.isdisjoint(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def prepare(graph: openvino.Model) -> None:
    """All of it, in place."""
    _balance_by_ranges(graph)
    _turn_squares(graph)


def _turn_squares(graph: openvino.Model) -> None:
    """Take the heads of an attention with as many heads as tokens back by a transpose that the plugin does not fuse.

    Fused with the two products and the softmax before, it is left out where the sizes are fixed (docs/ship.md).
    """
    from openvino import opset13 as ops

    at = np.array([1])
    for turn in [op for op in graph.get_ops() if op.get_type_name() == "Transpose"]:
        product, order = (turn.input_value(i).get_node() for i in (0, 1))
        if product.get_type_name() != "MatMul" or order.get_type_name() != "Constant":
            continue
        shape: Any = turn.input_value(0).get_partial_shape()
        if order.data.tolist() == HEADS_BACK and shape[1].is_static and shape[1] == shape[2]:
            turned = ops.transpose(ops.unsqueeze(product, at), np.array([0, 1, 3, 2, 4]))
            turn.output(0).replace(ops.squeeze(turned, at).output(0))


def number(graph: openvino.Model) -> None:
    """Names that hang on the graph alone: OpenVINO counts what it made since the program started."""
    for i, op in enumerate(graph.get_ordered_ops()):
        kind = op.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", op.get_friendly_name()):
            op.set_friendly_name(f"{kind}.{i}")


def _balance_by_ranges(graph: openvino.Model) -> None:
    """Put a factor and an offset of each channel, between a GELU and its quantization, into the ranges of that.

    OpenVINO then computes all of it at the end of the product before; behind a LayerNorm it would get the ranges wrong.
    """
    from openvino import opset13

    for quantize in [op for op in graph.get_ops() if op.get_type_name() == "FakeQuantize"]:
        ops = [quantize]
        for above in ("Add", "Multiply", "Gelu"):
            ops.append(ops[-1].input_value(0).get_node())
            if ops[-1].get_type_name() != above:
                break
        else:
            _, add, multiply, gelu = ops
            values = (multiply.input_value(1), add.input_value(1), quantize.input_value(1), quantize.input_value(2))
            if any(value.get_node().get_type_name() != "Constant" for value in values):
                continue
            factor, offset, low, high = (value.get_node().data for value in values)
            if factor.ndim == 1 and (factor > 0).all():
                shape = (*[1] * (gelu.output(0).get_partial_shape().rank.get_length() - 1), -1)
                ranges = [((end - offset) / factor).astype("float32").reshape(shape) for end in (low, high)]
                levels, out = quantize.get_attributes()["levels"], quantize.input_values()[3:]
                whole = opset13.fake_quantize(gelu, *map(opset13.constant, ranges), *out, levels)
                quantize.output(0).replace(whole.output(0))
