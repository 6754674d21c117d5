"""From a torch module to a graph other runtimes read.

There is one route: `torch.export` traces the module, every format is written from that one program, and OpenVINO
reads the ONNX graph. A branch on the data or on the batch size therefore fails loudly while tracing instead of being
baked in, and a format cannot differ from another by how it was traced.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .. import operators
from ..errors import VitreousError
from .lowering import Lowering, shapes_known

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20  # the first with Gelu as one operator; read by every runtime since 2024
PROTOBUF_LIMIT = 2**31 - 2**24  # an ONNX file is one protobuf message, which ends at 2 GiB; room is left for the graph
FAKE_QUANTIZE = "fake_quantize_per_"  # how the torch operators that stand for integers are named
# What is computed once here, so that weights are stored as integers.
FOLDED = ("Cast", "Clip", "QuantizeLinear", "Reshape", "Slice")

aten = torch.ops.aten

# torch has no shape rule for a fake quantization whose scale is a tensor, and cannot trace it without one. A torch
# that brings its own refuses ours, and then ours is not needed.
with contextlib.suppress(RuntimeError):

    @torch.library.register_fake("aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams")
    def _shape_of_fake_quantize(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def trace(model: nn.Module, example: Tensor, *, dynamic: bool, sides: tuple[int, int] | None = None) -> ExportedProgram:
    """The program of `model` on images like `example` [B, C, H, W]; with `dynamic`, for every batch size, and for every height
    and width where `sides` says which axes these are.

    Raises VitreousError when torch.export cannot trace the model.
    """
    from torch._dynamo.exc import UserError  # which takes long to import

    axes = {0: Dim("batch")} if dynamic else {}
    axes |= dict(zip(sides or (), (Dim("height"), Dim("width")), strict=False))
    try:
        with torch.no_grad(), quiet():
            try:
                program = torch.export.export(model, (example,), dynamic_shapes=(axes,) if axes else None)
            except UserError:  # `len(x)` and `int(…)` fix a size, except where Python itself is traced
                if not axes:
                    raise
                program = torch.export.export(model, (example,), dynamic_shapes=(axes,), strict=True)
    except Exception as error:  # torch.export raises many unrelated kinds
        advice = "; if it only works for one batch size, give that as batch" if dynamic else ""
        what = f"{getattr(model, 'called', type(model).__name__)} cannot be traced by torch.export"
        raise VitreousError(f"{what}{advice}: {_first(error)}") from error
    return program


def is_quantized(program: ExportedProgram) -> bool:
    """Whether the program holds fake quantization, which ONNX and OpenVINO run in integers, or integers themselves."""
    kinds = (FAKE_QUANTIZE, "vitreous.matmul_integer")
    return any(kind in str(node.target) for node in program.graph.nodes for kind in kinds)


def to_onnx(program: ExportedProgram, outputs: Sequence[str] = ("logits",)) -> onnx.ModelProto:
    """The program as an ONNX model, `images` [batch, C, H, W] in and `outputs` out.

    Every fake quantization becomes QuantizeLinear and DequantizeLinear with the same scale and zero point; of a
    quantized weight only its integers are kept.
    Raises VitreousError for an operator ONNX cannot express, and for a model past ONNX's 2 GiB.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if weights > PROTOBUF_LIMIT:
        raise VitreousError(f"the weights take {weights / 2**30:.1f} GiB and an ONNX graph ends at 2; ship to .pt2")
    try:
        with torch.no_grad(), quiet(), shapes_known():
            exported = torch.onnx.export(
                Lowering(program),
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=_translations(),
                input_names=["images"],
                output_names=list(outputs),
                verbose=False,
                optimize=False,
            )
            assert exported is not None
            _tidy(exported.model)
    except Exception as error:  # as above; our own errors come wrapped too
        raise VitreousError(f"the model cannot be written as ONNX: {_first(error)}") from error
    model = exported.model_proto
    for axis, name in zip(model.graph.input[0].type.tensor_type.shape.dim, ("batch", "height", "width"), strict=False):
        if axis.dim_param:
            _rename(model.graph, axis.dim_param, name)
    return _fold(model)


def _rename(graph: onnx.GraphProto, symbol: str, name: str) -> None:
    """Call a size that torch called `symbol` by what it is."""
    word = re.compile(rf"\b{re.escape(symbol)}\b")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = word.sub(name, axis.dim_param)


def _tidy(graph: onnx_ir.Model) -> None:
    """What `optimize=True` does, but of its rewriting of patterns only what runtimes gain from: shapes written down.

    The rest takes most of an export's time, minutes for large graphs, and runtimes do it themselves.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules.common import materialize_reshape_shape_rule, squeeze_reshape_1d_rule

    common.InlinePass()(graph)
    for _ in range(2):
        fold_constants(graph, onnx_shape_inference=True)
        rewrite(graph, [materialize_reshape_shape_rule, squeeze_reshape_1d_rule])
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(graph)


def _first(error: BaseException) -> str:
    """The innermost cause in one line: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters report every pass and print whole graphs; what matters raises, or fails the parity check."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our ONNX for the operators that the exporter refuses or gets wrong."""
    import onnx_ir
    import onnxscript  # half a second, so only when an export is asked for
    from onnxscript.function_libs.torch_lib.ops import core
    from onnxscript.function_libs.torch_lib.ops import nn as theirs

    op: Any = onnxscript.opset20  # typed by ONNX's own type variables, which do not fit tracing

    def integers(low: int, high: int) -> tuple[int, int, int]:
        """The ONNX type that holds low..high, and that type's own range."""
        if 0 <= low <= high <= 255:
            return onnx.TensorProto.UINT8, 0, 255
        if -128 <= low <= high <= 127:
            return onnx.TensorProto.INT8, -128, 127
        raise VitreousError(f"integers of {low}..{high} fit neither uint8 nor int8; quantize to 8 bits or fewer")

    def per_tensor(x: Any, scale: Any, zero: Any, quant_min: int, quant_max: int) -> Any:
        kind, low, high = integers(quant_min, quant_max)
        if isinstance(scale, float):
            scale = op.Constant(value_float=scale)
        if isinstance(zero, int):
            zero = op.Constant(value_int=zero)
        if (quant_min, quant_max) != (low, high):  # before the rounding, where runtimes still see the pair below
            real = op.Cast(zero, to=onnx.TensorProto.FLOAT)
            x = op.Clip(x, op.Mul(op.Sub(float(quant_min), real), scale), op.Mul(op.Sub(float(quant_max), real), scale))
        zero = op.Cast(zero, to=kind)
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)

    def per_channel(x: Any, scale: Any, zero: Any, axis: int, quant_min: int, quant_max: int) -> Any:
        kind, low, high = integers(quant_min, quant_max)
        zero = op.Cast(zero, to=kind)
        q = op.QuantizeLinear(x, scale, zero, axis=axis)
        if (quant_min, quant_max) != (low, high):
            limits = [op.Cast(op.Constant(value_int=limit), to=kind) for limit in (quant_min, quant_max)]
            q = op.Clip(q, *limits)
        return op.DequantizeLinear(q, scale, zero, axis=axis)

    def scatter_reduce(x: Any, dim: int, index: Any, src: Any, reduce: str, include_self: bool = True) -> Any:
        # onnxscript writes a mean as a plain overwrite, without a word
        names = {"sum": "add", "prod": "mul", "amin": "min", "amax": "max", "mean": "add"}
        if not include_self:
            raise VitreousError("scatter_reduce without include_self has no ONNX form; use include_self=True")
        total = op.ScatterElements(x, index, src, axis=dim, reduction=names[reduce])
        if reduce != "mean":
            return total
        one = op.CastLike(1.0, x)
        ones, counts = op.Expand(one, op.Shape(x)), op.Expand(one, op.Shape(src))
        return op.Div(total, op.ScatterElements(ones, index, counts, axis=dim, reduction="add"))

    def index(x: Any, indices: list[Any]) -> Any:
        # The exporter's own takes two transposes and a GatherND. Of a constant, that is what OpenVINO's CPU plugin computes once
        # and then writes over (docs/ship.md), so that with a fixed batch only the first answer is right.
        given = [(axis, places) for axis, places in enumerate(indices) if places is not None]
        if len(given) != 1 or given[0][1].dtype == onnx_ir.DataType.BOOL:
            return core.aten_index(x, indices)
        ((axis, places),) = given
        return op.Gather(x, places, axis=axis)

    def attention(q: Any, k: Any, v: Any, mask: Any = None, dropout_p: float = 0, is_causal: bool = False, **rest: Any) -> Any:
        # The exporter's own transposes through five operators and scales queries and keys, which runtimes do not undo.
        if is_causal or rest.get("enable_gqa") or (mask is not None and mask.dtype == onnx_ir.DataType.BOOL):
            return theirs.aten_scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **rest)
        *outer, last, width = range(len(k.shape))
        scores, scale = op.MatMul(q, op.Transpose(k, perm=[*outer, width, last])), rest.get("scale")
        scores = op.Mul(scores, op.CastLike(q.shape[-1] ** -0.5 if scale is None else scale, scores))
        return op.MatMul(op.Softmax(scores if mask is None else op.Add(scores, mask), axis=-1), v)

    return {
        aten.scaled_dot_product_attention.default: attention,
        aten.fake_quantize_per_tensor_affine.default: per_tensor,
        aten.fake_quantize_per_tensor_affine.tensor_qparams: per_tensor,
        aten.fake_quantize_per_channel_affine.default: per_channel,
        aten.index.Tensor: index,
        aten.scatter_reduce.two: scatter_reduce,
        **operators.translations(op),
    }


def _fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store quantized weights as integers: compute, once, what depends on stored tensors only."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs = [name for name in node.input if name]
        if node.op_type == "Constant" and "value" in attributes:
            stored[node.output[0]] = _named(numpy_helper.to_array(attributes["value"]), node.output[0])
        elif node.op_type == "Constant" and set(attributes) & {"value_int", "value_float"}:
            kind = np.int64 if "value_int" in attributes else np.float32
            stored[node.output[0]] = _named(np.array(next(iter(attributes.values())), dtype=kind), node.output[0])
        elif node.op_type in FOLDED and all(name in stored for name in inputs):
            alone = ReferenceEvaluator(node, opsets={"": OPSET})
            (result,) = alone.run(None, {name: numpy_helper.to_array(stored[name]) for name in inputs})
            stored[node.output[0]] = _named(result, node.output[0])
        else:
            if node.op_type == "DequantizeLinear" and node.input[0] in stored:
                # A zero point of its own: ONNX Runtime's exact mode rewrites it, and fails on one that is shared.
                name = f"{node.input[0]}_zero"
                stored[name] = _named(numpy_helper.to_array(stored[node.input[2]]), name)
                node.input[2] = name
            kept.append(node)
    used = {name for node in kept for name in node.input} | {output.name for output in graph.output}
    del graph.node[:]
    graph.node.extend(kept)
    # One by one: put in again, all weights would be there twice, for a message keeps what was taken out of it until it ends.
    present = {tensor.name for tensor in graph.initializer}
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in used:
            del graph.initializer[i]
    graph.initializer.extend(tensor for name, tensor in stored.items() if name in used - present)
    # A stored tensor has its own shape; said twice, tools that transpose one (ONNX Runtime's quantizer) stumble over the other.
    told = [value for value in graph.value_info if value.name not in stored]
    del graph.value_info[:]
    graph.value_info.extend(told)
    return model


def _named(array: Any, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)
