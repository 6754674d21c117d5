"""The options by which every command opens a model and data.

A command takes them as one parameter each, and `@grouped` makes an option of every field:

    @grouped
    def heads(model: MODEL = None, *, opening: ModelOptions, source: DataOptions, csv: ... = None) -> None:
        net = opening.open(model)
        data = source.open(net)
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import sys
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from ..data import Data

SETS = "sample, fashion-mnist, cifar10, a folder of class folders, a CSV or Parquet file, or shards-{0000..0009}.tar"
MODEL = Annotated[str | None, typer.Argument(help="timm name, saved model or folder; the bundled model by default")]


def _option(help: str, **kwargs: Any) -> Any:
    return typer.Option(help=help, **kwargs)


def finite(value: float | None) -> float | None:
    """Callback of options that are numbers: `nan` and `inf` are none."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("give a finite number")
    return value


_model = functools.partial(_option, rich_help_panel="Model")
_data = functools.partial(_option, rich_help_panel="Data")


@dataclass(frozen=True)
class ModelOptions:
    """How a model is opened, and what its weights were trained with."""

    checkpoint: Annotated[Path | None, _model("local weights for MODEL")] = None
    pretrained: Annotated[bool, _model("download timm's weights for MODEL")] = False
    num_classes: Annotated[int | None, _model("outputs of MODEL's classifier; 0 for features", min=0, max=2**20)] = None
    img_size: Annotated[int | None, _model("input size to build MODEL for", min=1, max=2**14)] = None
    model_arg: Annotated[list[str] | None, _model("what else to build MODEL with, as depth=4; repeatable")] = None
    classes: Annotated[str | None, _model("class names in the order of the outputs: a file, or with commas between")] = None
    mean: Annotated[str | None, _model("pixel mean of the training, 0 to 1, for each channel: 0.5,0.5,0.5")] = None
    std: Annotated[str | None, _model("pixel standard deviation of the training, as --mean")] = None
    crop_pct: Annotated[float | None, _model("side of the crop as a share of the resized picture", callback=finite)] = None
    interpolation: Annotated[str | None, _model("of the resize: bilinear, bicubic, lanczos …")] = None
    device: Annotated[str | None, _model("cpu, cuda, cuda:1, mps …")] = None
    threads: Annotated[int | None, _model("threads for torch and the runtimes", min=1, max=1024)] = None

    def kwargs(self) -> dict[str, Any]:
        """These options as `vitreous.open` takes them."""
        given: dict[str, Any] = {"pretrained": self.pretrained, "checkpoint": self.checkpoint}
        for name in ("num_classes", "img_size", "classes", "crop_pct", "interpolation", "device"):
            if (value := getattr(self, name)) is not None:
                given[name] = value
        for name in ("mean", "std"):
            if (text := getattr(self, name)) is not None:
                given[name] = _numbers(name, text)
        return given | dict(map(_argument, self.model_arg or ()))

    def beside(self, model: str) -> ModelOptions:
        """For `model` beside MODEL, whose the checkpoint is; how to build it holds for what is built by name, not for a file."""
        how = replace(self, checkpoint=None)
        file = Path(model).exists() or model.endswith((".safetensors", ".onnx", ".xml"))
        return replace(how, pretrained=False, num_classes=None, img_size=None, model_arg=None) if file else how

    def open(self, model: Any) -> nn.Module:
        """The model on its device; how it was opened and what it expects of pictures is told on stderr."""
        import torch

        from ..store import about, open_model

        if self.threads:
            torch.set_num_threads(self.threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the same is told below, in plain lines
            opened = open_model(model, **self.kwargs())
        for line in about(opened):
            print(line, file=sys.stderr)
        return opened


@dataclass(frozen=True)
class DataOptions:
    """Which pictures are looked at."""

    data: Annotated[str, _data(SETS)] = "sample"
    download: Annotated[bool, _data("let torchvision download DATA")] = False
    limit: Annotated[int | None, _data("the first N images only", min=1, max=2**31)] = None
    seed: Annotated[int, _data("for every random choice: order of a folder, calibration, intervals", min=0, max=2**32 - 1)] = 0

    def open(
        self,
        model: nn.Module,
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        labelled: bool = True,
    ) -> Data:
        """The pictures as `model` wants them; `limit` where none was asked for; `labelled`: whether they must be."""
        from ..data import open_data

        opened = open_data(
            self.data,
            model,
            limit=self.limit or limit,
            seed=self.seed,
            download=self.download,
            progress=progress,
            labelled=labelled,
        )
        if opened.note:
            print(opened.note, file=sys.stderr)
        return opened


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are dataclasses are given at the command line field by field."""
    hints = typing.get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters = []
    for p in inspect.signature(command).parameters.values():
        if p.name not in groups:
            parameters.append(p.replace(annotation=hints[p.name]))
            continue
        fields = typing.get_type_hints(groups[p.name], include_extras=True)
        for f in dataclasses.fields(groups[p.name]):
            parameters.append(inspect.Parameter(f.name, p.KEYWORD_ONLY, default=f.default, annotation=fields[f.name]))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{f.name: given.pop(f.name) for f in dataclasses.fields(kind)})
        command(**given)

    del run.__wrapped__  # typer would read the parameters of the command itself
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _numbers(name: str, text: str) -> tuple[float, ...]:
    from ..errors import VitreousError

    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise VitreousError(f"--{name} {text}: give numbers with commas between, as 0.5,0.5,0.5") from None


def _argument(text: str) -> tuple[str, Any]:
    """`depth=4` as ("depth", 4); what is no plain value of Python is text."""
    from ..errors import VitreousError

    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise VitreousError(f"--model-arg {text}: give a name and a value, as depth=4")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return name.strip(), value.strip()
