"""Pretraining and probing on a GPU, which is pretended where there is none: no tensor of the processor meets one of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import vit
from methods import methods
from pretended import pretended

import vitreous as vt
from vitreous.learn import written


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with nullcontext() if torch.cuda.is_available() else pretended():
        yield


@pytest.mark.parametrize("which", range(16))
def test_every_method(which: int, tmp_path: Path) -> None:
    method, model, x, labels = methods(tmp_path)[which]
    teacher = vit(patch_size=4, depth=1) if method.startswith("EVA") else None
    pair = x.to("cuda"), None if labels is None else labels.to("cuda")
    given = dict(epochs=1, batch=len(x), augment="shift" if x.ndim == 4 else None, teacher=teacher, say=str, accelerator="cuda")
    taught = vt.pretrain(model, pair, method, vt.learn.SGD(lr=0.01), **given)
    assert {v.device.type for v in taught.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("which", [0, 1, 3, 9])
def test_reconstruction(which: int, tmp_path: Path) -> None:
    text, model, x, _ = methods(tmp_path)[which]
    method: Any = written.objectives(text)[0]
    parts = method.parts(model).to("cuda")
    hidden, answer = method.reconstruct(model.to("cuda"), parts, x.to("cuda"))
    assert hidden.device.type == answer.device.type == "cuda" and answer.shape == x.shape and hidden.shape == (len(x), 1, 16, 16)


def test_probe() -> None:
    x, y = torch.randn(24, 3, 16, 16).to("cuda"), (torch.arange(24) % 3).to("cuda")
    model = vit(patch_size=4, classes=0).to("cuda")
    found = vt.probe(model, (x, y), (x, y), ("knn", "linear", "finetune"), epochs=1, batch=12, augment="shift")
    assert {"knn", "linear", "finetune", "rankme"} <= found.keys()


def test_a_tensor_that_stays_behind_is_noticed() -> None:
    x = torch.randn(2, 3).to("cuda")
    with pytest.raises(RuntimeError, match="on the same device, but found"):
        x + torch.zeros(2, 3)
    assert torch.nn.Linear(3, 1).to("cuda")(x).is_cuda
