"""Images in every form that people hold them, and what is not prepared for the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import small_vit
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from vitreous import see
from vitreous.calibrate import batches, count
from vitreous.errors import VitreousError

X = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
Y = torch.arange(6) % 7
FORMS: dict[str, Callable[[], Any]] = {
    "an array": lambda: X.numpy(),
    "a list of images": lambda: list(X),
    "a generator of batches": lambda: (X[i : i + 4] for i in (0, 4)),
}
LABELLED: dict[str, Callable[[], Any]] = {
    "a loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=5),
    "a data set": lambda: TensorDataset(X, Y),
    "a pair": lambda: (X, Y),
    "pairs": lambda: [(X[:1], Y[:1]), (X[1:], Y[1:])],
    "mappings": lambda: [{"pixel_values": X[:4], "labels": Y[:4]}, {"pixel_values": X[4:], "labels": Y[4:]}],
}


@pytest.mark.parametrize("form", [*FORMS, *LABELLED])
def test_all_forms_come_in_batches(form: str) -> None:
    found = list(batches((FORMS | LABELLED)[form](), 4))
    assert [len(x) for x, _ in found] == [4, 2]
    assert torch.equal(torch.cat([x for x, _ in found]), X)
    labels = [y for _, y in found]
    assert (labels == [None, None]) if form in FORMS else torch.equal(torch.cat([y for y in labels if y is not None]), Y)


def test_how_many_there_are() -> None:
    known = {form: count(make()) for form, make in (FORMS | LABELLED).items()}
    assert known == dict.fromkeys(known, 6) | {"a generator of batches": 0, "pairs": 0, "mappings": 0}


def test_every_analysis_takes_them() -> None:
    model = small_vit(depth=2)
    right = see.head_importance(model, X, Y, ["loss"]).values
    np.testing.assert_allclose(see.head_importance(model, LABELLED["a loader"](), metrics=["loss"]).values, right, atol=1e-6)
    np.testing.assert_allclose(see.distance(model, list(X)).measures, see.distance(model, X).measures, atol=1e-6)
    assert see.patterns(model, FORMS["a generator of batches"]()).images == 6
    assert see.artifacts(model, FORMS["a generator of batches"]()).images == 6


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ((X * 100).to(torch.uint8), "uint8.*prepared"),
        ((X.abs() * 255).round(), "not prepared for VisionTransformer"),
        (X * torch.nan, "NaN"),
        ([], "no images"),
        ("photos", "cannot be a str"),
        ([X[:2], X[2:, :, :16]], "one size"),
        ([(X, Y[:3])], "6 images have 3 labels"),
        ([(X[:3], Y[:3]), X[3:]], "some have none"),
        (torch.zeros(2, 3, 40, 40), "does not run on images"),
    ],
)
def test_what_is_wrong_is_told(wrong: Any, match: str) -> None:
    with pytest.raises(VitreousError, match=match):
        see.distance(small_vit(depth=1), wrong)


def test_what_is_odd_is_told() -> None:
    with pytest.warns(UserWarning, match="not normalised"):
        see.distance(small_vit(depth=1), X.abs())


def test_what_brings_labels_takes_no_others() -> None:
    with pytest.raises(VitreousError, match="has its own labels"):
        see.head_importance(small_vit(depth=1), LABELLED["a loader"](), Y)


@pytest.mark.parametrize("labels", [Y + 2, Y - 1, Y + 0.5, torch.ones(6, 3), torch.full((6, 7), 2)])
def test_labels_that_do_not_fit(labels: Tensor) -> None:
    for analyse in (see.head_importance, see.paths):
        with pytest.raises(VitreousError, match="labels must be class"):
            analyse(small_vit(depth=1), X, labels)
