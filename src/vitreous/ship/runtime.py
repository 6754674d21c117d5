"""Run a shipped file the way a program without this library would."""

from __future__ import annotations

import json
import math
import os
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import VitreousError
from ..files import check, digest
from ..processor import saturates
from .card import FIELDS
from .openvino_graph import core
from .sizes import BySize, Run, requests

PRECISIONS = ("f32", "bf16", "f16", "default")
LOW = ("i8", "u8", "i4", "u4")  # types of integers, as OpenVINO calls them
SAID = {"f32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "f16": "fp16", "float16": "fp16"}
FLOAT_TOLERANCE = 1e-3
# Two correct integer runtimes do not agree to the last digit: a difference of 1e-7 moves a value across a rounding
# edge now and then, and the next layers multiply that. They part by 3e-3 on the trained bundled model and by 4e-2 on a
# random DeiT-S; kernels that overflow make that 2.5e-2 and 2e-1. A model that noise of 1e-5 in its images moves further
# than that on its own cannot be held to it: with min-max grids DINOv2 ViT-S moves by 5e-2, and its runtimes part by 7e-2.
INT8_TOLERANCE = 5e-2
INTEGER_OPS = {"MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm", "QLinearConv", "ConvInteger"}


class Runtime:
    """A shipped model ready to run: images [B, C, H, W] float32 in, logits [B, K] float32 out; of a file with several outputs
    a dictionary of them by name. A file that prepares its pictures takes them as [B, H, W, C] uint8.

    `.xml` runs in OpenVINO and `.onnx` in ONNX Runtime, both on the CPU. A `.pt2` is not run here: torch unpickles it, so
    whoever trusts one calls `torch.export.load`.

    `threads` is how many cores one call uses, None for as many as torch does. `precision` asks OpenVINO to compute
    what is not integers in "f32", "bf16" or "f16"; None is what the file asks for, "default" what OpenVINO chooses where no one
    asks, as it does for a plain `compile_model`. The attribute `floats` says what the processor really does, which is fp32
    where it lacks the instructions.

    `batch` fixes the batch of a file that takes any, as OpenVINO's `reshape`, and ONNX Runtime's free dimensions, do.

    A file with a dynamic batch takes any batch; one with a fixed batch takes that one. In OpenVINO a batch size that comes again
    is compiled for, which the second call of that size waits for, and taken where that is faster and answers the same.
    Threads may share a runtime: every call has buffers of its own, and what it returns belongs to the caller.
    Raises VitreousError for a file that is missing, truncated or not such a file, and for images that do not fit.

    Attributes:
        path: the file. engine: "OpenVINO" or "ONNX Runtime". threads: as above.
        precision: "int8", "fp32", "bf16" or "fp16", of most of the work. floats: of what is not integers. outputs: their names.
        sizes: of each output, without the batch. pictures: whether it prepares its pictures. card: what the file says about
        itself (`ship.card`). integer_ops: matmuls and convolutions run in
        integers on this machine. packed_ops: matmuls of floats with weights that stay packed in memory. shape: (batch or
        None, C, H, W), or of pictures.
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, precision: str | None = None, batch: int | None = None
    ) -> None:
        self.path = Path(path)
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise VitreousError(f"cannot run on {threads} threads: give at least 1")
        if self.path.suffix not in (".onnx", ".xml"):
            advice = "; torch.export.load runs it, and unpickles it" if self.path.suffix == ".pt2" else ""
            raise VitreousError(f"{path} is not run here: its name has to end in .onnx or .xml{advice}")
        if precision is not None and precision not in PRECISIONS:
            raise VitreousError(f"no precision {precision!r}: use one of {', '.join(PRECISIONS)}")
        missing = [file for file in files(self.path) if not file.is_file()]
        if missing:
            raise VitreousError(f"{missing[0]} does not exist; a shipped .xml needs its .bin beside it")
        for file in files(self.path):
            check(file)
        load = self._load_openvino if self.path.suffix == ".xml" else self._load_onnx
        try:
            self._run = load(precision, batch)
        except VitreousError:
            raise
        except Exception as error:  # each engine has its own kinds; the last line is the plainest
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise VitreousError(f"{path} cannot be run, it may be truncated or not a model: {reason}") from error

    def __call__(self, images: Tensor) -> Any:
        """Logits [B, K] of images [B, C, H, W], or all outputs by name."""
        if images.ndim != 4 or any(have not in (None, got) for have, got in zip(self.shape, images.shape, strict=True)):
            wanted = "x".join("any" if size is None else str(size) for size in self.shape)
            raise VitreousError(f"{self.path.name} takes images of {wanted}, not {'x'.join(map(str, images.shape))}")
        if self.pictures != (images.dtype == torch.uint8):
            wanted = "uint8 pictures" if self.pictures else "prepared images of floats"
            raise VitreousError(f"{self.path.name} takes {wanted}, not {str(images.dtype).removeprefix('torch.')}")
        images = images.detach().cpu()
        given = self._run(np.ascontiguousarray((images if self.pictures else images.float()).numpy()))
        found = {name: torch.from_numpy(array) for name, array in zip(self.outputs, given, strict=True)}
        return found if len(found) > 1 else found[self.outputs[0]]

    @property
    def kind(self) -> str:
        """Who runs it and in what, as "OpenVINO int8"."""
        return f"{self.engine} {self.precision}"

    @property
    def bytes(self) -> int:
        """Size on disk, all files together."""
        return sum(file.stat().st_size for file in files(self.path))

    @cached_property
    def macs(self) -> int | None:
        """Multiply-accumulates for one image in the file's own matmuls and convolutions; None when not countable."""
        model = self._graph()
        if None in self.shape[1:]:
            return None
        if self.shape[0] is None:
            model.reshape([1, *self.shape[1:]])
        try:
            return sum(_macs(op) for op in model.get_ops()) // (self.shape[0] or 1)
        except RuntimeError:  # a shape that is known only while running
            return None

    @cached_property
    def parameters_count(self) -> int:
        """Numbers stored in the file's weights, the quantization scales among them."""
        weights = {"f32", "f16", "bf16", "i8", "u8", "u4"}
        stored = (op for op in self._graph().get_ops() if op.get_type_name() == "Constant")
        return sum(math.prod(op.get_output_shape(0)) for op in stored if op.get_element_type().get_type_name() in weights)

    def _graph(self) -> Any:
        """The file as OpenVINO's graph, which reads ONNX too."""
        return core().read_model(self.path)

    def _load_openvino(self, precision: str | None, batch: int | None) -> Run:
        import openvino

        if not self.path.read_bytes()[:64].lstrip().startswith(b"<"):
            raise VitreousError(f"{self.path} is not an OpenVINO model: it is not XML")  # or every front end tries it
        graph = core().read_model(self.path)
        weights, told = self.path.with_suffix(".bin"), _told(graph, "vitreous", "weights_sha256")
        if told and told != digest(weights):
            raise VitreousError(f"{weights} is not the one that {self.path.name} was written with: ship the model again")
        self.card = {name: json.loads(_told(graph, "vitreous", name)) for name in FIELDS if _told(graph, "vitreous", name)}
        if batch is not None:
            graph.reshape([batch, *list(graph.input(0).get_partial_shape())[1:]])
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.threads}
        if precision != "default":
            hint = "INFERENCE_PRECISION_HINT"
            settings[hint] = precision or _told(graph, "runtime_options", hint) or "f32"
        compiled = core().compile_model(graph, "CPU", settings)
        self.engine = "OpenVINO"
        self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        said = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        info = [(op.get_rt_info(), op) for op in compiled.get_runtime_model().get_ops()]
        heavy = [(i, op) for i, op in info if i["layerType"].astype(str) in ("FullyConnected", "MatMul", "Convolution")]
        # Of a float product with packed weights the plugin reports the type of the weights.
        reads = [op.input_value(0).get_element_type().is_real() for i, op in heavy if i["runtimePrecision"].astype(str) in LOW]
        self.integer_ops, self.packed_ops = reads.count(False), reads.count(True)
        self.floats = str(SAID.get(said, said))
        self.precision = "int8" if self.integer_ops else self.floats
        self.outputs = tuple(out.get_any_name() if out.get_names() else f"output_{i}" for i, out in enumerate(compiled.outputs))
        self.sizes = {name: _sizes(out)[1:] for name, out in zip(self.outputs, compiled.outputs, strict=True)}
        self.pictures = compiled.input(0).get_element_type() == openvino.Type.u8
        self.shape = _sizes(compiled.input(0))
        if self.shape[0] is not None or None in self.shape[1:]:
            return requests(compiled)

        def fixed(size: int) -> Run:
            graph = core().read_model(self.path)
            graph.reshape([size, *self.shape[1:]])
            return requests(core().compile_model(graph, "CPU", settings))

        return BySize(requests(compiled), fixed, INT8_TOLERANCE if self.integer_ops else FLOAT_TOLERANCE)

    def _load_onnx(self, precision: str | None, batch: int | None) -> Run:
        import onnx
        import onnxruntime

        if precision not in (None, "f32", "default"):
            raise VitreousError(f"ONNX Runtime runs on the CPU in f32, not {precision}; ship to .xml for that")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        if saturates():  # the fast kernel adds pairs of products in 16 bits; this one is exact, and slower with VNNI
            options.add_session_config_entry("session.x64quantprecision", "1")
        if batch is not None:
            options.add_free_dimension_override_by_name("batch", batch)
        # Threads that wait for work must not keep a core from whoever is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
            session = onnxruntime.InferenceSession(
                str(self.path),
                options,
                providers=["CPUExecutionProvider"],
                # With a fixed batch it makes a float Gemm of every quantized linear.
                disabled_optimizers=["MatMulAddFusion"],
            )
            optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)  # its operators are counted
        self.engine = "ONNX Runtime"
        self.integer_ops = sum(node.op_type in INTEGER_OPS for node in optimized.graph.node)
        self.packed_ops = sum(node.op_type == "MatMulNBits" for node in optimized.graph.node)
        self.floats = "fp32"
        self.precision = "int8" if self.integer_ops else "fp32"
        given, told = session.get_inputs()[0], session.get_modelmeta().custom_metadata_map
        self.card = {name: json.loads(told[name]) for name in FIELDS if name in told}
        self.outputs = tuple(out.name for out in session.get_outputs())
        self.sizes = {o.name: tuple(n if isinstance(n, int) else None for n in o.shape[1:]) for o in session.get_outputs()}
        self.pictures = given.type == "tensor(uint8)"
        self.shape = tuple(size if isinstance(size, int) else None for size in given.shape)
        return lambda images: [np.asarray(array) for array in session.run(None, {given.name: images})]


def _sizes(port: Any) -> tuple[int | None, ...]:
    return tuple(None if size.is_dynamic else size.get_length() for size in port.get_partial_shape())


def _told(graph: Any, *path: str) -> str:
    """What the file says there, "" for nothing."""
    return str(graph.get_rt_info(list(path)).astype(str)) if graph.has_rt_info(list(path)) else ""


def files(path: Path) -> tuple[Path, ...]:
    """What a shipped model consists of."""
    return (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)


def _macs(op: Any) -> int:
    kind = op.get_type_name()
    if kind not in ("MatMul", "Convolution", "GroupConvolution"):
        return 0
    out = math.prod(op.get_output_shape(0))  # raises RuntimeError when dynamic
    if kind == "MatMul":
        return out * op.get_input_shape(0)[-2 if op.get_attributes().get("transpose_a") else -1]
    kernel = op.get_input_shape(1)  # [out, in, ...] or, in groups, [groups, out, in, ...]
    return out * math.prod(kernel[1 if kind == "Convolution" else 2 :])
