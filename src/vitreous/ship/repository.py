"""A model repository as Triton Inference Server and OpenVINO Model Server read it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import VitreousError
from ..files import folder_aside
from .card import beside
from .named import plain
from .runtime import Runtime
from .shipment import Shipment, ship

BACKENDS = {".onnx": "onnxruntime", ".xml": "openvino"}
MOST = 64  # images that a server may put together


def ship_repository(
    model: nn.Module, folder: str | Path, name: str, *, ending: str = ".onnx", overwrite: bool = False, **how: Any
) -> Shipment:
    """`ship` into `folder/name/1/model.onnx` (or `.xml`), with what servers want beside it.

    `config.pbtxt` is for Triton, `folder/config.json` for OpenVINO Model Server, which reads both formats and is told the
    precision that parity was measured in; `labels.txt`, `preprocess.json` and `recipe.json` where the model knows them. Other
    models of the folder stay in its `config.json`. `how` is passed to `ship`.

    Raises `VitreousError` as `ship` does, and for a name that exists (without `overwrite`) or that is no name.
    """
    root, target = Path(folder), Path(folder) / name
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise VitreousError(f"{name!r} is no name for a model in a repository: use letters, digits, - and _")
    if target.exists() and not overwrite:
        raise VitreousError(f"{target} exists: choose another name, or ask to overwrite it")
    listed = _listed(root / "config.json")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with folder_aside(target) as aside:
            made = ship(model, aside / "1" / f"model{ending}", **how)
            runtime = Runtime(made.path)
            card = runtime.card
            (aside / "config.pbtxt").write_text(_pbtxt(name, runtime, BACKENDS[ending], bool(card.get("classes"))))
            for file, text in beside(plain(model)).items():
                (aside / file).write_text(text)
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
    except OSError as error:
        raise VitreousError(f"{target} cannot be written: {error.strerror or error}") from error
    entry = {"name": name, "base_path": str(target.resolve()), "plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    others = [e for e in listed if e.get("config", {}).get("name") != name]
    (root / "config.json").write_text(json.dumps({"model_config_list": [*others, {"config": entry}]}, indent=1))
    path = target / "1" / made.path.name
    return _moved(made, path)


def _moved(made: Shipment, path: Path) -> Shipment:
    return replace(made, path=path, files=tuple(path.with_name(file.name) for file in made.files))


def _listed(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text())["model_config_list"]) if path.exists() else []
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise VitreousError(f"{path} is no list of models for OpenVINO Model Server: {error}") from None


def _pbtxt(name: str, runtime: Runtime, backend: str, labels: bool) -> str:
    batch, *sides = runtime.shape
    fixed = [] if batch is None else [batch]
    shape = lambda sizes: ", ".join(str(-1 if size is None else size) for size in [*fixed, *sizes])
    kind = "TYPE_UINT8" if runtime.pictures else "TYPE_FP32"
    lines = [
        f'name: "{name}"',
        f'backend: "{backend}"',
        f"max_batch_size: {MOST if batch is None else 0}",
        f'input [ {{ name: "images", data_type: {kind}, dims: [ {shape(sides)} ] }} ]',
    ]
    for output, sizes in runtime.sizes.items():
        told = ', label_filename: "labels.txt"' if labels and output == "logits" else ""
        lines.append(f'output [ {{ name: "{output}", data_type: TYPE_FP32, dims: [ {shape(sizes)} ]{told} }} ]')
    return "\n".join([*lines, *(["dynamic_batching { }"] if batch is None else [])]) + "\n"
