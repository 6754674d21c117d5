"""Training runs as the models view reads them: what is there is shown, what is broken is left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

import vitreous as vt
from vitreous.data.transform import preparation
from vitreous.studio.opened import Source
from vitreous.studio.run_view import run_of, shown_by
from vitreous.studio.runs_view import curves, find_runs

NOW = 1e9


def run(folder: Path, log: str, about: str = '{"settings": {"epochs": 4}}') -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(about)
    (folder / "log.csv").write_text(log)
    return folder


def test_what_a_run_has_written_is_told(tmp_path: Path) -> None:
    run(tmp_path / "a", "epoch,loss,lr,accuracy\n1,2.5,0.1,0.75\n2,nan,0.05,0.5\n3,1.25,0.01,0.5\n")
    whole = run(tmp_path / "deep" / "b", "epoch,loss\n1,0.5\n")
    (whole / "model.safetensors").touch()
    first, second = find_runs(tmp_path)
    assert first.row(first.changed + 150) == {
        "run": "a", "epoch": "3 of 4", "loss": "1.25", "best accuracy": "75.0 %", "state": "written 2 min ago",
    }  # fmt: skip
    assert first.weights is None and second.weights == whole / "model.safetensors"
    assert second.row(NOW) == {"run": "deep/b", "epoch": "1 of 4", "loss": "0.5", "state": "finished"}
    lines = curves([first, second]).data
    assert list(lines[0].y) == [0.75, 0.5, 0.5] and list(lines[0].x) == [1, 2, 3] and not lines[1].y


def test_what_is_broken_is_left_out(tmp_path: Path) -> None:
    run(tmp_path / "log", "epoch,loss\n1,\nx,y\n\0\n", "[" * 100_000)
    run(tmp_path / "about", "", '{"settings": {"epochs": [1]}}')
    (tmp_path / "no run").mkdir()
    about, log = find_runs(tmp_path)
    assert (about.name, about.epochs, about.rows) == ("about", None, []) and log.epochs is None
    assert about.row(NOW)["epoch"] == "0" and curves([about, log]).data


def test_a_run_of_the_engine_is_found_and_opens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = vt.open("vit_tiny_patch16_224", img_size=16, embed_dim=16, depth=1, num_heads=1, num_classes=2)
    data = torch.randn(8, 3, 16, 16), torch.arange(8) % 2
    vt.train(net, data, vt.learn.CrossEntropy(), epochs=2, batch=4, check=data, out=tmp_path / "a")
    (found,) = find_runs(tmp_path)
    assert found.done and found.epochs == 2 and [r["epoch"] for r in found.rows] == [1, 2]
    assert found.weights is not None and found.weights.name == "best.safetensors"
    vt.load(found.weights)


def test_a_pretraining_run_shows_what_it_made_of_its_encoder(tmp_path: Path) -> None:
    model = vt.open("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    x = torch.randn(8, 3, 16, 16)
    given: dict[str, Any] = dict(epochs=1, batch=8, augment=None, out=tmp_path / "run")
    taught = vt.pretrain(model, (x, None), "MAE(width=16, depth=1, heads=2)", **given)
    (found,) = find_runs(tmp_path)
    assert found.weights == tmp_path / "run" / "model.safetensors"
    opened: Any = SimpleNamespace(source=Source(str(found.weights)))
    run, config = run_of(opened), preparation(taught).config
    assert run == tmp_path / "run"
    picture = Image.new("RGB", (16, 16))
    first, again, other = (shown_by(taught, run, picture, x[:1], config, seed) for seed in (0, 0, 1))
    assert list(first.pictures) == ["picture", "hidden", "answered", "attention before", "attention after"] and not first.said
    hidden = [np.asarray(shown.pictures["hidden"][0]) for shown in (first, again, other)]
    assert (hidden[0] == hidden[1]).all() and (hidden[0] != hidden[2]).any()
    maps = [shown for _, shown in first.pictures.values() if shown is not None]
    assert [m.shape for m in maps] == [(4, 4)] * 2 and first.top == max(m.max() for m in maps)
