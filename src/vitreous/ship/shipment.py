"""Export a model to a file, and hand it over only when the file computes what the model computes."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import VitreousError
from ..files import digest, folder_aside, forget, replaceable
from .card import card, preprocess, texts
from .export import is_quantized, quiet, to_onnx, trace
from .named import Named, plain
from .openvino_graph import core, halves, number, prepare
from .packed import pack
from .parity import IMAGES, RESHAPED, Parity, Run, Yardstick, worst
from .pictures import WithPreprocessing
from .runtime import FLOAT_TOLERANCE, INT8_TOLERANCE, Runtime, files

FORMATS = {".onnx": "onnx", ".xml": "openvino", ".pt2": "pt2"}
WORST = 10  # the worst image may be this much further off than the mean
MEASURED = "f32"  # what is not integers is computed in, when parity is measured; OpenVINO takes bf16 by itself where it can
UNHASHED = "0" * 64  # stands in the .xml until its .bin is written, and can be hashed
EXPORTING = threading.Lock()  # torch's exporter, and the logging that it is kept from, belong to the process


@dataclass(frozen=True)
class Shipment:
    """A file that was written and found to compute what its model computes.

    format: "onnx", "openvino" or "pt2". bytes: all files together. batch: the fixed batch, None for any.
    outputs: their names. plain: the precision that a plain `compile_model` of OpenVINO takes on this machine, and how far it is
    off; None where that is what was measured.
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
    outputs: tuple[str, ...] = ()
    plain: tuple[str, Parity] | None = None
    caution: str = ""

    def __str__(self) -> str:
        integers = f", {self.integer_ops} operators in integers" if self.precision == "int8" else ""
        also = f"; a plain compile_model computes in {self.plain[0]} here: {self.plain[1]}" if self.plain else ""
        also += f"; {self.caution}" if self.caution else ""
        return f"{self.path} ({self.format} {self.precision}{integers}, {self.bytes / 1e6:.1f} MB): {self.parity}{also}"


def ship(
    model: nn.Module,
    path: str | Path,
    *,
    example: Tensor | None = None,
    batch: int | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    with_preprocessing: bool = False,
) -> Shipment:
    """Write `model` to `path` and check the file against it; `ship_all` writes several files from one trace.

    The ending decides the format: `.onnx`, `.xml` (OpenVINO, with a `.bin` beside it) or `.pt2` (torch.export).
    Fake-quantized linears become real integers with the model's own scales in the first two, and weights read by floats are
    packed; `.pt2` keeps both simulated.

    Args:
        model: an `nn.Module` on the CPU, images [B, C, H, W] to a tensor, tuple, dictionary or object of tensors [B, …], which
            become outputs of the file under their names: `logits` or `features` where they have none. Half precision is written
            as float32, weight for weight. The model is run in eval mode, and left in the mode it was in.
        example: images [B, C, H, W] to check with; None for seeded noise of `model.pretrained_cfg["input_size"]`. Noise
            tells nothing about a trained model's worst case: give real images where there are some.
        batch: the only batch size the file is to take; None for any.
        tolerance: largest mean relative error (the worst may be ten times that); None for 1e-3, or for integers 5e-2 or
            twice what noise of 1e-5 in the images changes in the model's own logits, whichever is larger.
        overwrite: replace files that exist.
        with_preprocessing: take pictures [B, H, W, C] uint8, of any one size, and resize, cut and normalise them in the file,
            as `model.pretrained_cfg` says.

    What the file says about itself (`preprocess`, `classes`, `model`, `recipe`, `versions`) lies in ONNX's metadata and in
    OpenVINO's `rt_info` under `vitreous`; docs/ship.md shows how to serve it.

    Raises VitreousError, with nothing left behind, for an unknown ending, a file that exists, a model that cannot be
    exported, a file that cannot be written, and a file whose logits differ by more than the tolerance.
    """
    return ship_all(
        model,
        [path],
        example=example,
        batch=batch,
        tolerance=tolerance,
        overwrite=overwrite,
        with_preprocessing=with_preprocessing,
    )[0]


def ship_all(
    model: nn.Module,
    paths: Iterable[str | Path],
    *,
    example: Tensor | None = None,
    batch: int | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    with_preprocessing: bool = False,
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
    if any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model).cpu()  # files are written and checked where they mostly run
    images = _images(model, example, -(-IMAGES // (batch or 1)) * (batch or 1))
    with EXPORTING, _evaluating(model):
        inner, sides = plain(model), None
        about = card(inner)
        if with_preprocessing:
            inner, sides = WithPreprocessing(inner, preprocess(inner)).eval(), (1, 2)
            images = _pictures(len(images), about["preprocess"]["input_size"])
        named = Named(inner, images)
        # traced with two images: torch takes a batch of one for a constant
        program = trace(named, images[: batch or 2], dynamic=batch is None, sides=sides)
        graph = to_onnx(program, named.names) if any(path.suffix != ".pt2" for path in places) else None
        about["precision"] = _packed(graph) if graph and is_quantized(program) else "fp32"
        if graph:
            for name, text in texts(about).items():
                graph.metadata_props.add(key=name, value=text)
        yardstick = Yardstick(named, images, batch or IMAGES)
        return [_ship(program, graph, path, yardstick, batch, about["precision"], tolerance) for path in places]


def _packed(graph: ModelProto) -> str:
    """The precision of a quantized graph, in which weights that floats read are packed, in place."""
    bits = pack(graph)
    if any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        return "int8"
    return f"int{bits} weights" if bits else "fp32"


def _ship(
    program: ExportedProgram,
    graph: ModelProto | None,
    path: Path,
    yardstick: Yardstick,
    batch: int | None,
    precision: str,
    tolerance: float | None,
) -> Shipment:
    names, other, caution = yardstick.model.names, None, ""
    with _written_aside(path) as aside:
        if graph is None or path.suffix == ".pt2":
            _write_program(program, aside)
        else:
            (_write_onnx if path.suffix == ".onnx" else _write_openvino)(graph, aside)
        runtime = None if path.suffix == ".pt2" else Runtime(aside, precision=MEASURED)
        run = runtime or _reloaded(aside, names)
        parity = yardstick.every(run, batch) if batch else yardstick.first(run)
        integers = precision == "int8" and runtime is not None
        limit = tolerance if tolerance is not None else INT8_TOLERANCE if integers else FLOAT_TOLERANCE
        if integers and tolerance is None and parity.mean > limit:
            limit = max(limit, 2 * yardstick.restlessness())
        if not (parity.mean <= limit and parity.worst <= WORST * limit):  # so that NaN is refused
            advice = "; on a processor without VNNI int8 kernels overflow: 7-bit weights do not" if integers else ""
            kind = runtime.kind if runtime else "torch"
            what = f"{path.name} does not compute in {kind} what the model does, so it is not shipped"
            raise VitreousError(f"{what}: {parity}, allowed {limit:g}{advice}")
        if path.suffix == ".xml" and batch is None:
            fixed = [yardstick.every(Runtime(aside, precision=MEASURED, batch=size), size) for size in RESHAPED]
            reshaped = worst([parity, *fixed], parity.batches, RESHAPED)
            if reshaped.mean <= limit and reshaped.worst <= WORST * limit:
                parity = reshaped
            else:
                sizes = " or ".join(map(str, RESHAPED))
                caution = (
                    f"reshaped to a batch of {sizes} OpenVINO computes something else (mean error {reshaped.mean:.1e}): "
                    "run the file as it is, for any batch"
                )
                warnings.warn(f"{path.name}: {caution}", stacklevel=2)
        if runtime and path.suffix == ".xml" and halves():
            by_itself = Runtime(aside, precision="default")
            if by_itself.floats != runtime.floats:
                other = by_itself.floats, yardstick.every(by_itself, batch or IMAGES)
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
        outputs=tuple(names),
        plain=other,
        caution=caution,
    )


def _images(model: nn.Module, example: Tensor | None, count: int) -> Tensor:
    """`count` images to trace and check with."""
    if example is not None:
        if example.ndim != 4 or len(example) == 0:
            raise VitreousError(f"example has shape {tuple(example.shape)}: give images [B, C, H, W]")
        return example.detach().cpu().float()[torch.arange(count) % len(example)]
    try:
        size = preprocess(plain(model))["input_size"]
    except VitreousError as error:
        raise VitreousError(f"{error}: give example images") from error
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def _pictures(count: int, input_size: list[int]) -> Tensor:
    """Seeded pictures [N, H, W, C] uint8, smooth as pictures are, and neither square nor of the model's size."""
    channels, height, width = input_size
    coarse = torch.rand(count, channels, 9, 9, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, (height + height // 3, 2 * width), mode="bilinear")
    return (255 * smooth).permute(0, 2, 3, 1).contiguous().to(torch.uint8)


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
        graph = core().read_model(model.SerializeToString())
        prepare(graph)
        # Where there is VNNI it would round the activations that meet packed weights to 8 bits.
        graph.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        graph.set_rt_info(MEASURED, ["runtime_options", "INFERENCE_PRECISION_HINT"])
        for entry in model.metadata_props:
            graph.set_rt_info(entry.value, ["vitreous", entry.key])
        graph.set_rt_info(UNHASHED, ["vitreous", "weights_sha256"])
        number(graph)
        openvino.save_model(graph, path, compress_to_fp16=False)
        path.write_bytes(path.read_bytes().replace(UNHASHED.encode(), digest(path.with_suffix(".bin")).encode()))
    except RuntimeError as error:  # also how it reports a full disk, without saying so
        free = shutil.disk_usage(path.parent).free / 1e6
        reason = str(error).strip().splitlines()[-1]
        raise VitreousError(f"{path.name} cannot be written with {free:.1f} MB free on the disk: {reason}") from error


def _reloaded(path: Path, names: list[str]) -> Run:
    """The .pt2 we wrote ourselves: loading one unpickles it, which is no way to open a stranger's."""
    with quiet():
        program = torch.export.load(path).module()
    return lambda images: dict(zip(names, program(images), strict=True))


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
