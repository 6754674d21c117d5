"""The folder of a training run: checkpoints that are whole or not there, the log, the curves, the result."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Data
from ..errors import VitreousError
from ..files import write_whole
from ..files.folders import locked
from ..steps import history_of
from ..store import save_model
from ..work import fingerprint


class Run:
    """One run in a folder. Raises `VitreousError` when the folder holds another one, or cannot be written."""

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        data: Any,
        objectives: Sequence[Any],
        settings: dict[str, Any],
        tensorboard: bool = False,
    ) -> None:
        if tensorboard:
            _need_tensorboard()
        self.tensorboard = tensorboard
        self.writer: Any = None
        self.folder = Path(folder)
        self.held = locked(self.folder)
        self.key = _key(model, data, objectives, settings)
        self.rows: list[dict[str, Any]] = []
        self.best = -1.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VitreousError(f"cannot write in {folder}: {error.strerror or error}; give another folder") from error
        about = self.folder / "run.json"
        if about.exists():
            try:
                before = json.loads(about.read_text())
            except ValueError as error:
                raise VitreousError(f"{about} cannot be read ({error}): give another folder") from None
            if before.get("key") != self.key:
                said = before.get("settings", {})
                other = [k for k in settings if said.get(k) != settings[k]]
                why = f"other {', '.join(other)}" if other else "another model, other weights, or other data"
                raise VitreousError(f"{folder} holds a run with {why}: give another folder, or the same settings to go on")
        elif any(self.folder.iterdir()):
            raise VitreousError(f"{folder} is not empty and holds no run: give another folder")
        self.about = json.dumps({"key": self.key, "settings": settings}, indent=1)

    def __enter__(self) -> Run:
        self.held.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.writer is not None:
            self.writer.close()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
        self.held.__exit__(*exc)

    def last(self) -> dict[str, Any] | None:
        """The last checkpoint, or None. Raises `VitreousError` when it is broken."""
        path = self.folder / "last.pt"
        for left in self.folder.glob(".last.pt.*.part"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise VitreousError(f"cannot go on from {path}: it is damaged ({type(error).__name__}); delete it") from None
        self.rows, self.best = state["rows"], state["best"]
        return state

    def _begin(self) -> None:
        """What is refused before its first step leaves nothing behind."""
        if not (self.folder / "run.json").exists():
            write_whole(self.folder / "run.json", self.about)

    def save(self, state: dict[str, Any]) -> None:
        self._begin()
        aside = self.folder / f".last.pt.{os.getpid()}.part"
        try:
            torch.save({**state, "rows": self.rows, "best": self.best}, aside)
            os.replace(aside, self.folder / "last.pt")
        except (OSError, RuntimeError) as error:
            aside.unlink(missing_ok=True)
            raise VitreousError(
                f"cannot write {self.folder / 'last.pt'}: {error}; the one before it is whole: free some room and start again"
            ) from error

    def note(self, epoch: float, meter: Any, accuracy: float | None, rate: float, model: nn.Module) -> None:
        """A row of the log, the curves anew, and the weights when they are the best so far."""
        self._begin()
        n = max(meter.images, 1)
        row = {"epoch": round(epoch, 4), "loss": meter.loss / n, "lr": rate, **{k: v / n for k, v in meter.terms.items()}}
        row |= {} if meter.accuracy is None else {"train_accuracy": meter.accuracy}
        row |= {} if accuracy is None else {"accuracy": accuracy}
        if self.tensorboard:
            self._show(row)
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(k for r in self.rows for k in r)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.folder / "log.csv", text.getvalue())
        write_whole(self.folder / "report.html", _curves(self.rows))
        if accuracy is not None and accuracy > self.best:
            self.best = accuracy
            save_model(model, self.folder / "best.safetensors")

    def _show(self, row: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:  # what an earlier process told of epochs that are now run again is forgotten
            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=len(self.rows))
        for key, value in row.items():
            self.writer.add_scalar(key, value, len(self.rows))
        self.writer.flush()

    def finish(self, model: nn.Module) -> None:
        save_model(model, self.folder / "model.safetensors")


def _need_tensorboard() -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise VitreousError("these curves need TensorBoard: python -m pip install 'vitreous[tensorboard]'") from None


def _key(model: nn.Module, data: Any, objectives: Sequence[Any], settings: dict[str, Any]) -> str:
    taught = [m for o in objectives for m in vars(o).values() if isinstance(m, nn.Module)]
    tensors = [t for m in (model, *taught) for item in m.state_dict().items() for t in item]
    if isinstance(data, Data):
        what: list[object] = [data.name, len(data), None if data.labels is None else torch.as_tensor(data.labels)]
    else:
        what = [t if t is None else (tuple(t.shape), t.double().sum().item()) for t in data]
    return fingerprint(type(model), history_of(model).base, str(settings), *what, *tensors)


def _curves(rows: list[dict[str, Any]]) -> str:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.5, 0.5])
    for key in dict.fromkeys(k for r in rows for k in r if k not in ("epoch", "lr")):
        at = [(r["epoch"], r[key]) for r in rows if key in r]
        x, y = zip(*at, strict=True)
        figure.add_trace(go.Scatter(x=x, y=y, name=key, mode="lines+markers"), row=2 if "accuracy" in key else 1, col=1)
    figure.update_layout(title="Training", template="plotly_white", height=640, legend_orientation="h")
    figure.update_yaxes(title="loss", row=1).update_yaxes(title="accuracy", row=2).update_xaxes(title="epoch", row=2)
    return figure.to_html(include_plotlyjs=True, full_html=True)
