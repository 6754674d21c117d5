"""Pictures as a pretraining run answers them: what is hidden, and what it makes of the rest."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import VitreousError
from ...store import load
from .. import written


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
    model = load(folder / "model.safetensors" if (folder / "model.safetensors").exists() else folder / "last.safetensors")
    parts = method.parts(model)
    if parts is not None:
        parts.load_state_dict({k.removeprefix("parts.0."): v for k, v in state.items() if k.startswith("parts.0.")})
        parts.eval()
    return model, method, parts
