"""Integrated gradients and occlusion: complete, on the grid of every kind of model, and what is missed is told."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import timm
import torch
from captum.attr import IntegratedGradients
from support import small_vit
from torch import Tensor, nn

from vitreous import see
from vitreous.errors import VitreousError
from vitreous.see import pixels


class Step(nn.Module):
    """A score that changes all at once, halfway to the picture: hard on quadrature."""

    num_classes = 1

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(120 * (x.mean((1, 2, 3)) - 0.26))[:, None]


def test_what_a_linear_model_adds_up() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Linear(3 * 64 * 64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1))

    model, x = Flat(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    added = x * model.head.weight[3].view(3, 64, 64)
    expected = added.unflatten(3, (2, 32)).unflatten(2, (2, 32)).sum((1, 3, 5)).relu().detach()
    torch.testing.assert_close(see.integrated_gradients(model, x, 3), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(see.occlusion(model, x, 3), expected, rtol=1e-3, atol=1e-4)


def test_steps_are_taken_where_the_score_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 60 steps over the whole way much is missed, and it is said; with fewer where they count nothing is."""
    model, x = Step(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    whole = (model(x) - model(torch.zeros_like(x)))[:, 0]
    with pytest.warns(UserWarning, match="60 steps miss completeness"):
        rough = see.integrated_gradients(model, x, 0, steps=60)
    assert ((rough.sum((1, 2)) - whole).abs() > 0.02 * whole).any()
    taken, attribute = [], IntegratedGradients.attribute

    def counted(self: Any, pictures: Tensor, *rest: Any, **how: Any) -> Tensor:
        taken.append(len(pictures) * how["n_steps"])
        return attribute(self, pictures, *rest, **how)

    monkeypatch.setattr(IntegratedGradients, "attribute", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = see.integrated_gradients(model, x, 0)
    assert ((fine.sum((1, 2)) - whole).abs() <= 0.021 * whole).all() and sum(taken) <= 2 * 60
    together = see.integrated_gradients(model, x.repeat(20, 1, 1, 1), 0)  # more than run at a time
    torch.testing.assert_close(together, fine.repeat(20, 1, 1))


def test_there_is_an_end_to_halving() -> None:
    """A jump has no gradient, so no number of steps is enough."""

    class Jump(Step):
        def forward(self, x: Tensor) -> Tensor:
            return ((x.mean((1, 2, 3)) > 0.26) + 0 * x.sum((1, 2, 3)))[:, None]

    with pytest.warns(UserWarning, match="516 steps miss completeness by up to 100%"):
        found = see.integrated_gradients(Jump(), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), 0)
    assert found.shape == (1, 1, 1) and not found.any()


def test_occlusion_blanks_one_patch_at_a_time(vit: nn.Module, images: Tensor) -> None:
    found = see.occlusion(vit, images[:2], torch.tensor([1, 4]))
    with torch.no_grad():
        for row, column in ((0, 0), (1, 3), (3, 2)):
            x = images[:2].clone()
            x[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
            fall = (vit(images[:2]) - vit(x))[[0, 1], [1, 4]]
            torch.testing.assert_close(found[:, row, column], fall.relu(), rtol=1e-3, atol=1e-4)


def test_grids() -> None:
    """Patches where they stay; else the last stage's places, as in class activation maps."""
    resnet, swin = timm.create_model("resnet18", num_classes=5), timm.create_model("swin_tiny_patch4_window7_224")
    x = torch.zeros(1, 3, 224, 192)
    assert pixels.grid(small_vit(), torch.zeros(1, 3, 32, 32)) == (4, 4)
    assert pixels.grid(swin, x) == (7, 6) and pixels.grid(resnet, x) == (7, 6)
    assert see.grad_cam(resnet, torch.randn(1, 3, 64, 96)).shape[1:] == pixels.grid(resnet, torch.zeros(1, 3, 64, 96))


def test_without_captum(monkeypatch: pytest.MonkeyPatch, vit: nn.Module, images: Tensor) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    for method in (see.integrated_gradients, see.occlusion):
        with pytest.raises(VitreousError, match=r"pip install vitreous\[see\]"):
            method(vit, images)
