"""Export a model to a file, and hand it over only when the file computes what the model computes."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import VitreousError
from ..files import folder_aside, forget, replaceable
from .export import is_quantized, quiet, to_onnx, trace
from .packed import pack, reader
from .runtime import Runtime, files

if TYPE_CHECKING:
    import openvino

FORMATS = {".onnx": "onnx", ".xml": "openvino", ".pt2": "pt2"}
FLOAT_TOLERANCE = 1e-3
# Two correct integer runtimes do not agree to the last digit: a difference of 1e-7 moves a value across a rounding
# edge now and then, and the next layers multiply that. They part by 3e-3 on the trained bundled model and by 4e-2 on a
# random DeiT-S; kernels that overflow make that 2.5e-2 and 2e-1. A model that noise of NUDGE in its images moves further
# than that on its own cannot be held to it: with min-max grids DINOv2 ViT-S moves by 5e-2, and its runtimes part by 7e-2.
INT8_TOLERANCE = 5e-2
NUDGE = 1e-5
WORST = 10  # the worst image may be this much further off than the mean
BATCHES = (1, 3, 16)
RESHAPED = (1, 4)  # an OpenVINO file for any batch is also tried as programs deploy it, reshaped to a fixed one
IMAGES = 16  # at least so many are compared, whatever the batch


@dataclass(frozen=True)
class Parity:
    """How far the file's logits are from the model's, on the same images.

    An image's error is ‖a − b‖₂ / ‖b‖₂ over its logits; mean and worst are over the images. agreement = share of images with
    the same first class, batches = the batch sizes tried. reshaped = those to which an OpenVINO file was reshaped; of these
    the worst counts.
    """

    mean: float
    worst: float
    agreement: float
    batches: tuple[int, ...]
    reshaped: tuple[int, ...] = ()

    def __str__(self) -> str:
        batches = ", ".join(map(str, self.batches))
        batches += f"; reshaped to {', '.join(map(str, self.reshaped))}" if self.reshaped else ""
        return f"mean error {self.mean:.1e}, worst {self.worst:.1e}, same top-1 {self.agreement:.0%} (batch {batches})"


@dataclass(frozen=True)
class Shipment:
    """A file that was written and found to compute what its model computes.

    format: "onnx", "openvino" or "pt2". bytes: all files together. batch: the fixed batch, None for any.
    precision: "fp32"; "int8" where weights and activations are integers; "int8 weights" or "int4 weights" where only the
    weights are, stored packed. integer_ops: how many matmuls and convolutions run in integers on this machine.
    packed_ops: how many matmuls read packed weights on this machine.
    """

    path: Path
    files: tuple[Path, ...]
    format: str
    bytes: int
    batch: int | None
    parity: Parity
    precision: str
    integer_ops: int
    packed_ops: int

    def __str__(self) -> str:
        integers = f", {self.integer_ops} operators in integers" if self.precision == "int8" else ""
        return f"{self.path} ({self.format} {self.precision}{integers}, {self.bytes / 1e6:.1f} MB): {self.parity}"


def ship(
    model: nn.Module,
    path: str | Path,
    *,
    example: Tensor | None = None,
    batch: int | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> Shipment:
    """Write `model` to `path` and check the file against it; `ship_all` writes several files from one trace.

    The ending decides the format: `.onnx`, `.xml` (OpenVINO, with a `.bin` beside it) or `.pt2` (torch.export).
    Fake-quantized linears become real integers with the model's own scales in the first two, and weights read by floats are
    packed; `.pt2` keeps both simulated.

    Args:
        model: an `nn.Module` on the CPU, images [B, C, H, W] float32 to one tensor of logits. It is run in eval mode,
            and left in the mode it was in.
        example: images [B, C, H, W] to check with; None for seeded noise of `model.pretrained_cfg["input_size"]`. Noise
            tells nothing about a trained model's worst case: give real images where there are some.
        batch: the only batch size the file is to take; None for any.
        tolerance: largest mean relative error (the worst may be ten times that); None for 1e-3, or for integers 5e-2 or
            twice what noise of 1e-5 in the images changes in the model's own logits, whichever is larger.
        overwrite: replace files that exist.

    Raises VitreousError, with nothing left behind, for an unknown ending, a file that exists, a model that cannot be
    exported, a file that cannot be written, and a file whose logits differ by more than the tolerance.
    """
    return ship_all(model, [path], example=example, batch=batch, tolerance=tolerance, overwrite=overwrite)[0]


def ship_all(
    model: nn.Module,
    paths: Iterable[str | Path],
    *,
    example: Tensor | None = None,
    batch: int | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> list[Shipment]:
    """`ship` to each of `paths`, of any formats, for the time of one: the model is traced and converted once."""
    places = [Path(path) for path in paths]
    if batch is not None and batch < 1:
        raise VitreousError(f"batch is {batch}: give a size of at least 1, or None for any")
    for path in places:
        if path.suffix not in FORMATS:
            raise VitreousError(f"cannot tell a format from {path.name!r}: use an ending of {', '.join(FORMATS)}")
        if reason := getattr(model, "simulated", None):
            raise VitreousError(f"{path.name} is not written: {reason}. Quantize to 8 bits to ship the model")
        present = [file for file in files(path) if replaceable(file).exists()]
        if present and not overwrite:
            raise VitreousError(f"{present[0]} exists: choose another name, or ask to overwrite it")
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise VitreousError("the model is not on the CPU: call model.cpu() before shipping it")
    images = _images(model, example, -(-IMAGES // (batch or 1)) * (batch or 1))
    with _evaluating(model):
        # traced with two images: torch takes a batch of one for a constant
        program = trace(model, images[: batch or 2], dynamic=batch is None)
        graph = to_onnx(program) if any(path.suffix != ".pt2" for path in places) else None
        precision = _packed(graph) if graph and is_quantized(program) else "fp32"
        return [_ship(model, program, graph, path, images, batch, precision, tolerance) for path in places]


def _packed(graph: ModelProto) -> str:
    """The precision of a quantized graph, in which weights that floats read are packed, in place."""
    bits = pack(graph)
    if any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        return "int8"
    return f"int{bits} weights" if bits else "fp32"


def _ship(
    model: nn.Module,
    program: ExportedProgram,
    graph: ModelProto | None,
    path: Path,
    images: Tensor,
    batch: int | None,
    precision: str,
    tolerance: float | None,
) -> Shipment:
    with _written_aside(path) as aside:
        if graph is None or path.suffix == ".pt2":
            _write_program(program, aside)
        else:
            (_write_onnx if path.suffix == ".onnx" else _write_openvino)(graph, aside)
        runtime = None if path.suffix == ".pt2" else Runtime(aside)
        examples = list(images.split(batch)) if batch else [images[:size] for size in BATCHES]
        parity = _compare(model, runtime or _reloaded(aside), examples)
        if path.suffix == ".xml" and batch is None:
            for size in RESHAPED:
                fixed = _compare(model, Runtime(aside, batch=size), list(images.split(size)))
                worse = max(parity, fixed, key=lambda p: (p.mean != p.mean, p.mean))  # NaN is the worst
                parity = replace(worse, batches=parity.batches, reshaped=(*parity.reshaped, size))
        integers = precision == "int8" and runtime is not None
        limit = tolerance if tolerance is not None else INT8_TOLERANCE if integers else FLOAT_TOLERANCE
        if integers and tolerance is None and parity.mean > limit:
            limit = max(limit, 2 * _restlessness(model, examples))
        if not (parity.mean <= limit and parity.worst <= WORST * limit):  # so that NaN is refused
            advice = "; on a processor without VNNI int8 kernels overflow: 7-bit weights do not" if integers else ""
            kind = runtime.kind if runtime else "torch"
            what = f"{path.name} does not compute in {kind} what the model does, so it is not shipped"
            raise VitreousError(f"{what}: {parity}, allowed {limit:g}{advice}")
        size = sum(file.stat().st_size for file in files(aside))
    return Shipment(
        path=path,
        files=files(path),
        format=FORMATS[path.suffix],
        bytes=size,
        batch=batch,
        parity=parity,
        precision=precision if runtime else "fp32",
        integer_ops=runtime.integer_ops if runtime else 0,
        packed_ops=runtime.packed_ops if runtime else 0,
    )


def _images(model: nn.Module, example: Tensor | None, count: int) -> Tensor:
    """`count` images to trace and check with."""
    if example is not None:
        if example.ndim != 4 or len(example) == 0:
            raise VitreousError(f"example has shape {tuple(example.shape)}: give images [B, C, H, W]")
        return example.detach().cpu().float()[torch.arange(count) % len(example)]
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    if not size:
        raise VitreousError(f"{type(model).__name__} has no pretrained_cfg with an input_size: give example images")
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _write_program(program: ExportedProgram, path: Path) -> None:
    buffer = io.BytesIO()  # torch's own file writer ends the process on a full disk
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def _write_onnx(model: ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString())


def _write_openvino(model: ModelProto, path: Path) -> None:
    import openvino

    try:
        core = openvino.Core()
        core.add_extension(reader())
        graph = core.read_model(model.SerializeToString())
        _balance_by_ranges(graph)
        # Where there is VNNI it would round the activations that meet packed weights to 8 bits.
        graph.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        openvino.save_model(graph, path, compress_to_fp16=False)
    except RuntimeError as error:  # also how it reports a full disk, without saying so
        free = shutil.disk_usage(path.parent).free / 1e6
        reason = str(error).strip().splitlines()[-1]
        raise VitreousError(f"{path.name} cannot be written with {free:.1f} MB free on the disk: {reason}") from error


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


def _reloaded(path: Path) -> nn.Module:
    """The .pt2 we wrote ourselves: loading one unpickles it, which is no way to open a stranger's."""
    with quiet():
        return torch.export.load(path).module()


def _compare(model: nn.Module, run: Callable[[Tensor], Tensor], batches: list[Tensor]) -> Parity:
    with torch.no_grad():
        expected = [model(images) for images in batches]
    if any(not isinstance(logits, Tensor) or logits.ndim != 2 for logits in expected):
        raise VitreousError(f"{type(model).__name__} does not return one tensor [B, K]: wrap it in a module that does")
    wanted, got = torch.cat(expected).float(), torch.cat([run(images) for images in batches])
    if not wanted.isfinite().all():
        raise VitreousError(f"{type(model).__name__} itself returns NaN or infinity on the example images")
    off = (got - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-12)
    return Parity(
        mean=off.mean().item(),
        worst=off.max().item(),
        agreement=(got.argmax(1) == wanted.argmax(1)).float().mean().item(),
        batches=tuple(dict.fromkeys(len(images) for images in batches)),
    )


def _restlessness(model: nn.Module, batches: list[Tensor]) -> float:
    """How far noise in its images that no one could see moves the logits of a model that rounds: its own `Parity.mean`."""
    generator = torch.Generator().manual_seed(0)
    nudged = (images + NUDGE * torch.randn(images.shape, generator=generator) for images in batches)
    with torch.no_grad():
        moved = iter([model(images) for images in nudged])
    return _compare(model, lambda _: next(moved), batches).mean


@contextlib.contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what was written there takes `path`'s place once the body is through."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with folder_aside(path) as folder:
            aside = folder / path.name
            yield aside
            _put_in_place(files(aside), files(path), folder)
            for place in files(path):
                forget(place)
    except OSError as error:
        raise VitreousError(f"{path} cannot be written: {error.strerror or error}") from error


def _put_in_place(made: tuple[Path, ...], places: tuple[Path, ...], folder: Path) -> None:
    """All files or none. An .xml goes first and comes last: what stands there always fits its .bin."""
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, to: Path) -> None:
        os.replace(source, to)
        moved.append((source, to))

    try:
        for place in places:
            if place.exists():
                move(place, folder / f"old-{place.name}")
        for source, place in reversed(list(zip(made, places, strict=True))):
            move(source, place)
    except BaseException:
        for source, to in reversed(moved):
            os.replace(to, source)
        raise
