"""A model compiled ahead of time by torch's own compiler, for a GPU, or for a processor: AOTInductor."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..files import folder_aside, replaceable
from .export import quiet, trace
from .named import Named
from .parity import Parity, Yardstick

SHAPES = 8
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # eight bits of mantissa through a dozen blocks


class _Lowered(nn.Module):
    """`model` inside in `dtype`, float32 outside."""

    def __init__(self, model: Named, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype, self.called = copy.deepcopy(model).to(dtype), dtype, model.called

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model(images.to(self.dtype))


def ship_inductor(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> Parity:
    """Write `model` as an AOTInductor package `path` (.pt2) that computes in `dtype` on the device of `images` `[N, C, H, W]`.

    It takes any batch size, float32 images in and float32 outputs out, and is checked against the model in float32 on
    these images. Needs a C++ compiler. `load_inductor` runs it; so does torch's C++ library, without Python.

    Raises `VitreousError` for another ending, a file that exists, a model that cannot be compiled, and for outputs that are
    further off than `tolerance` (mean relative error; 1e-3 in float32, 1e-2 in float16, 5e-2 in bfloat16).
    """
    place = replaceable(path)
    if place.suffix != ".pt2":
        raise VitreousError(f"an AOTInductor package ends in .pt2, not {place.name!r}")
    if place.exists() and not overwrite:
        raise VitreousError(f"{path} exists: choose another name, or ask to overwrite it")
    images = images[torch.arange(max(len(images), 2), device=images.device) % len(images)]
    named = Named(model, images).eval()
    yardstick = Yardstick(named, images, len(images))
    lowered = _Lowered(named, dtype).eval()
    with folder_aside(place) as folder:
        aside = folder / place.name
        try:
            with torch.no_grad(), quiet():
                program = trace(lowered, images[:2], dynamic=True)
                torch._inductor.aoti_compile_and_package(program, package_path=str(aside))
        except VitreousError:
            raise
        except Exception as error:  # the compiler's own kinds are many
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise VitreousError(f"{named.called} cannot be compiled by AOTInductor: {reason}") from error
        run = load_inductor(aside)
        answer = lambda x: dict(zip(named.names, outputs if isinstance(outputs := run(x), tuple) else (outputs,), strict=True))
        parity = yardstick.every(answer, len(images))
        limit = TOLERANCE[dtype] if tolerance is None else tolerance
        if not parity.mean <= limit:
            raise VitreousError(
                f"{place.name} does not compute what the model does, so it is not shipped: {parity}, allowed {limit:g}"
            )
        aside.replace(place)
    return parity


def load_inductor(path: str | Path, graphs: bool = True) -> Callable[[Tensor], Any]:
    """The package as a function of images, to a tensor, or a tuple of several. It is compiled code: load what you trust.

    On a GPU what it launches is recorded once for each shape of images (a CUDA graph) and replayed; the memory of the last
    `SHAPES` shapes is held. `graphs=False` launches anew.
    Threads take turns on a GPU, and run side by side on a processor.
    """
    package = cache(lambda alone: torch._inductor.aoti_load_package(str(path), run_single_threaded=alone))
    recorded: OrderedDict[torch.Size, tuple[Tensor, torch.cuda.CUDAGraph, Any]] = OrderedDict()
    turn = Lock()

    def replay(images: Tensor) -> Any:
        if images.shape not in recorded:
            held, graph = images.clone(), torch.cuda.CUDAGraph()
            apart = torch.cuda.Stream(images.device)
            apart.wait_stream(torch.cuda.current_stream(images.device))
            with torch.cuda.stream(apart):  # kernels are loaded when they first run, which cannot be recorded
                package(True)(held)
            torch.cuda.current_stream(images.device).wait_stream(apart)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on
                out = package(True)(held)
            recorded[images.shape] = held, graph, out
            if len(recorded) > SHAPES:
                recorded.popitem(last=False)
        recorded.move_to_end(images.shape)
        held, graph, out = recorded[images.shape]
        held.copy_(images)
        graph.replay()
        return [o.clone() for o in out]

    def run(images: Tensor) -> Any:
        if images.is_cuda and graphs:
            with turn:
                out = replay(images)
        else:
            out = package(False)(images)
        return out[0] if isinstance(out, list | tuple) and len(out) == 1 else out

    return run
