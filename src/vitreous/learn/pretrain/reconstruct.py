"""Pictures as a pretraining run answers them: what is hidden, what it makes of the rest, and the encoder before and after."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import VitreousError
from ...store import load
from .. import written
from .run import FIRST


def reconstruct(run: str | Path, images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What the run in the folder `run` hides of `images [B, C, H, W]`, `[B, 1, H, W]`, and the pictures as it answers them.

    Raises `VitreousError` for a folder that holds no run of `vt.pretrain`, and for a method that answers with no pixels.
    """
    model, method, parts = opened(run)
    torch.manual_seed(seed)
    with torch.no_grad():
        return method.reconstruct(model, parts, images)


def opened(run: str | Path) -> tuple[nn.Module, Any, nn.Module | None]:
    """The encoder of a run, its method, and the decoder that was trained beside it."""
    folder = Path(run)
    try:
        text = json.loads((folder / "run.json").read_text())["settings"]["objectives"][0]
        state = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)["lesson"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise VitreousError(f"{folder} holds no run of vitreous pretrain that can be read ({type(error).__name__})") from None
    if "<" in text:
        raise VitreousError(f"{text.partition('(')[0]} learns features, not pixels: there is nothing to reconstruct")
    method: Any = written.objectives(text)[0]
    if not hasattr(method, "reconstruct"):
        raise VitreousError(f"{type(method).__name__} answers with no picture: there is nothing to reconstruct")
    model = after(folder)
    parts = method.parts(model)
    if parts is not None:
        parts.load_state_dict({k.removeprefix("parts.0."): v for k, v in state.items() if k.startswith("parts.0.")})
        parts.eval()
    return model, method, parts


def after(run: str | Path) -> nn.Module:
    """The encoder of a run: the finished one, else that of its last epoch."""
    whole = Path(run) / "model.safetensors"
    return load(whole if whole.exists() else whole.with_name("last.safetensors"))


def before(run: str | Path) -> nn.Module | None:
    """The encoder as it was before the run; None where the run has not kept it."""
    path = Path(run) / FIRST
    return load(path) if path.exists() else None


def pixels(answer: Tensor, config: Any) -> np.ndarray:
    """`[H, W, 3]` of 0 to 255, of a picture `[C, H, W]` as a model of this `Preparation.config` takes it."""
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ("mean", "std"))
    shown = ((answer.cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return shown if shown.shape[2] == 3 else shown.repeat(3, 2)
