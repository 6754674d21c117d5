"""Pretraining and probing beside a device that is not there: no tensor of the processor meets one of a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from elsewhere import CUDA, There, another_device
from learning import vit
from methods import methods

import vitreous as vt
from vitreous.learn import engine, written


def fabric(*_: Any) -> Any:
    """What the engine asks of Lightning Fabric, on that device."""
    return SimpleNamespace(
        device=CUDA, world_size=1, global_rank=0, is_global_zero=True, _precision=None,
        setup_module=lambda m: m, setup_optimizers=lambda o: o, no_backward_sync=lambda *_, **__: nullcontext(),
        backward=lambda loss: loss.backward(), broadcast=lambda x: x,
        clip_gradients=lambda m, o, max_norm, **_: torch.nn.utils.clip_grad_norm_(list(m.parameters()), max_norm, foreach=False),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(engine, "fabric_for", fabric)
    with another_device():
        yield


@pytest.mark.parametrize("which", range(16))
def test_every_method(which: int, tmp_path: Path) -> None:
    method, model, x, labels = methods(tmp_path)[which]
    teacher = vit(patch_size=4, depth=1) if method.startswith("EVA") else None
    pair = x.to("cuda"), None if labels is None else labels.to("cuda")
    given = dict(epochs=1, batch=len(x), augment="shift" if x.ndim == 4 else None, teacher=teacher, say=str)
    taught = vt.pretrain(model, pair, method, vt.learn.SGD(lr=0.01), **given)
    assert not any(isinstance(v, There) for v in taught.state_dict().values())


@pytest.mark.parametrize("which", [0, 1, 3, 9])
def test_reconstruction(which: int, tmp_path: Path) -> None:
    text, model, x, _ = methods(tmp_path)[which]
    method: Any = written.objectives(text)[0]
    parts = method.parts(model).to("cuda")
    hidden, answer = method.reconstruct(model.to("cuda"), parts, x.to("cuda"))
    assert hidden.device == answer.device == CUDA and answer.shape == x.shape and hidden.shape == (len(x), 1, 16, 16)


def test_probe() -> None:
    x, y = torch.randn(24, 3, 16, 16).to("cuda"), (torch.arange(24) % 3).to("cuda")
    model = vit(patch_size=4, classes=0).to("cuda")
    found = vt.probe(model, (x, y), (x, y), ("knn", "linear", "finetune"), epochs=1, batch=12, augment="shift")
    assert {"knn", "linear", "finetune", "rankme"} <= found.keys()


def test_a_tensor_that_stays_behind_is_noticed() -> None:
    x = torch.randn(2, 3).to("cuda")
    with pytest.raises(RuntimeError, match="lie on cuda:0 and on cpu"):
        x + torch.zeros(2, 3)
    assert isinstance(torch.nn.Linear(3, 1).to("cuda")(x), There)
