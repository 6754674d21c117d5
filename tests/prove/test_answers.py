"""What answers mean: classes, one logit, several classes an image, features, several outputs; and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.prove.answers import Answers, compare
from vitreous.prove.batches import batches
from vitreous.prove.cautions import caution
from vitreous.prove.distances import neighbours_kept
from vitreous.prove.subject import named

N = 60


class Head(nn.Module):
    """A linear model of the pixels, `[B, 3, 4, 4]` to `[B, outputs]`, in whatever form `wrap` gives it."""

    def __init__(self, outputs: int, seed: int = 0, wrap: Any = lambda y, h: y, **kept: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(48, 16), nn.Linear(16, outputs)
        self.wrap = wrap
        vars(self).update(kept)

    def forward(self, x: Tensor) -> Any:
        h = self.body(x.flatten(1)).tanh()
        return self.wrap(self.head(h), h)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def answers(models: dict[str, Any], data: Any, **kwargs: Any) -> tuple[Answers, list[str]]:
    found, cautions, _, _ = compare(models, batches(data), **kwargs)
    return list(found.values())[-1], cautions


def noise(outputs: int) -> Any:
    generator = torch.Generator().manual_seed(9)
    return lambda x: torch.randn(len(x), outputs, generator=generator)


def test_one_logit_with_labels_is_a_question_of_yes_or_no(x: Tensor) -> None:
    model = Head(1)
    y = (model(x)[:, 0] > 0.05).long()
    found, _ = answers({"a": model, "noise": noise(1)}, (x, y), classes=("cat", "dog"))
    assert found.accuracy and found.agreement and 0.3 < found.agreement.value < 0.7
    assert 0.3 < found.accuracy.value < 0.7 and {c.name for c in found.classes} == {"cat", "dog"}
    same, _ = answers({"a": model, "b": Head(1)}, (x, y))
    assert same.agreement and same.agreement.value == 1 and same.lost == same.gained == 0
    by_hand = ((model(x)[:, 0] > 0).long() == y).float().mean()
    alone, _ = answers({"a": model}, (x, y))
    assert alone.accuracy and alone.accuracy.value == pytest.approx(float(by_hand))


def test_one_number_without_labels_is_compared_by_its_spread(x: Tensor) -> None:
    model = Head(1)
    far, _ = answers({"a": model, "noise": noise(1)}, (x, None))
    assert far.agreement is None and far.features and far.features.mean > 0.5 and abs(far.features.correlation or 0) < 0.4
    shifted = 100 + model(x)  # an age, say: far from zero, so a share of the number itself would hide any error
    near, _ = answers({"a": lambda x: 100 + model(x), "b": lambda x: 100 + 1.1 * model(x)}, (x, None))
    expected = float((0.1 * model(x)).abs().mean() / shifted.std())
    assert near.features and near.features.mean == pytest.approx(expected, rel=1e-3)
    assert near.features.correlation == pytest.approx(1) and near.features.mean_cosine is None


def test_marks_of_several_classes(x: Tensor) -> None:
    model = Head(4)
    y = (model(x) > 0.1).long()
    found, _ = answers({"a": model, "b": Head(4, seed=1)}, (x, y))
    other = (Head(4, seed=1)(x) > 0).long()
    assert found.accuracy and found.accuracy.value == pytest.approx(float((other == y).float().mean()))
    assert found.agreement and found.agreement.value == pytest.approx(float((other == (model(x) > 0)).float().mean()))
    assert len(found.classes) == 4 and found.changed == []
    random, _ = answers({"a": model, "noise": noise(4)}, (x, y))
    assert random.agreement and random.agreement.value < 0.7
    with pytest.raises(VitreousError, match="mark 3 classes and 'a' has 4 outputs"):
        answers({"a": model}, (x, y[:, :3]))


def test_neighbours_by_hand() -> None:
    r = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert neighbours_kept(r * 3, r).value == 1  # type: ignore[union-attr]
    swapped = r[[0, 2, 1, 3]]  # now the nearest of 0 is 2, of 1 is 3 …
    assert neighbours_kept(swapped, r).value == 0  # type: ignore[union-attr]
    assert neighbours_kept(torch.ones(4, 2), torch.ones(4, 2)) is None, "all equally near: nothing to keep"
    assert neighbours_kept(r[:2], r[:2]) is None
    twins = r[[0, 0, 0, 2, 3]]
    assert neighbours_kept(twins + torch.tensor([[0.0, 1e-4], [0, 0], [0, 0], [0, 0], [0, 0]]), twins).value == 1  # type: ignore[union-attr]


def test_outputs_of_every_form(x: Tensor) -> None:
    y = torch.zeros(N, dtype=torch.long)
    as_dict = Head(5, wrap=lambda y, h: {"logits": y, "hidden": h[:, None].expand(-1, 3, -1), "loss": y.sum()})
    found, _ = answers({"a": as_dict, "b": Head(5, seed=1, wrap=as_dict.wrap)}, (x, y))
    assert found.agreement and set(found.outputs) == {"hidden"}
    ours, theirs = Head(5, seed=1, wrap=as_dict.wrap)(x)["hidden"], as_dict(x)["hidden"]
    expected = ((ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)).mean()
    assert found.outputs["hidden"].mean == pytest.approx(float(expected), rel=1e-5)
    for wrap in (lambda y, h: (y, h), lambda y, h: [y], lambda y, h: SimpleNamespace(logits=y, hidden_states=(h, h))):
        same, _ = answers({"a": Head(5), "b": Head(5, wrap=wrap)}, (x, y))
        assert same.agreement and same.agreement.value == 1
    dense, _ = answers({"a": Head(5, wrap=lambda y, h: h[:, None]), "b": Head(5, wrap=lambda y, h: 1.1 * h[:, None])}, (x, y))
    assert dense.accuracy is None and dense.features and dense.features.mean == pytest.approx(0.1, rel=1e-4)
    assert dense.features.neighbours is None
    pyramid = Head(5, wrap=lambda y, h: [h[:, :, None, None], h[:, :8, None, None]])
    found, _ = answers({"a": pyramid, "b": pyramid}, x)
    assert found.features and found.features.worst == 0 and found.outputs["1"].worst == 0


@pytest.mark.parametrize("kind", [torch.half, torch.bfloat16])
def test_models_in_half_and_compiled(x: Tensor, kind: torch.dtype) -> None:
    narrow: Any = torch.compile(Head(5).to(kind), backend="eager")
    found, _ = answers({"a": Head(5), "b": narrow}, (x, [0] * N))
    assert found.agreement and found.agreement.value > 0.9
    found, _ = answers({"a": narrow, "b": Head(5)}, (x.numpy(), np.zeros(N)))
    assert found.agreement and found.agreement.value > 0.9


def test_labels_that_are_not_the_models(x: Tensor) -> None:
    model = Head(5)
    right = model(x).argmax(1)
    assert answers({"a": model}, (x, right))[1] == []
    assert "permuted" in answers({"a": model}, (x, (right + 1) % 5))[1][0]
    chance = torch.randint(5, (N,), generator=torch.Generator().manual_seed(3))
    assert "no better than guessing" in answers({"a": model}, (x, chance))[1][0]
    assert answers({"a": model}, (x[:8], (right + 1)[:8] % 5))[1] == [], "too few to tell"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda x: (x, torch.full((N,), 1.7)), "has the label 1.7"),
        (lambda x: (x, torch.full((N,), -1)), "has the label -1"),
        (lambda x: (x, [0] * (N - 1)), "60 images and 59 labels"),
        (lambda x: (x, ["cat"] * N), "one class number for each"),
        (lambda x: (x, torch.full((N, 5), 2)), "marks of several classes are 0 or 1"),
        (lambda x: [(x[:8], [0] * 8), (x[8:], None)], "some have none"),
        (lambda x: (x * 255).to(torch.uint8), "not .* uint8"),
        (lambda x: [{"picture": x}], "no images under"),
        (lambda x: 7, "the data is int"),
        (lambda x: (x[:0], None), "no images"),
    ],
)
def test_bad_data(x: Tensor, data: Any, message: str) -> None:
    with pytest.raises(VitreousError, match=message) as refused:
        answers({"a": Head(5)}, data(x))
    assert "\n" not in str(refused.value)


def test_bad_models(x: Tensor) -> None:
    assert list(named([Head(5), Head(5)])) == ["1. Head", "2. Head"] and list(named(Head(5))) == ["model"]
    for models, message in (({"a": "deit"}, "'a' is str"), (7, "models is int"), ([], "nothing to prove")):
        with pytest.raises(VitreousError, match=message):
            named(models)  # type: ignore[arg-type]
    for odd in (lambda x: "cat", lambda x: {"text": "cat"}, lambda x: x.sum(), lambda x: x[:1]):
        with pytest.raises(VitreousError, match=r"model 'odd' (gives|fails)"):
            answers({"a": Head(5), "odd": odd}, x)


def test_several_classes_without_labels_are_known_when_told(x: Tensor) -> None:
    """Each class is a question; the largest score alone says nothing of the others."""
    a, b = Head(6), Head(6, seed=1)
    found, _ = answers({"a": a, "b": b}, x, multi_label=True)
    with torch.no_grad():
        alike = ((a(x) > 0) == (b(x) > 0)).float().mean()
    assert found.agreement is not None and found.agreement.value == pytest.approx(float(alike)) and found.accuracy is None
    other, _ = answers({"a": a, "b": b}, x)
    assert other.agreement is not None and other.agreement.value != found.agreement.value


def test_a_neighbour_that_is_as_near_is_no_loss() -> None:
    """From the first image the two others are 10° away, but for rounding: which of them is found says nothing."""
    turned = lambda *degrees: torch.stack([torch.tensor(degrees).deg2rad().cos(), torch.tensor(degrees).deg2rad().sin()], 1)
    kept = neighbours_kept(turned(0.0, 10.0, -10.001), turned(0.0, 10.001, -10.0))
    assert kept is not None and kept.value == 1


def test_two_classes_for_each_other_are_no_other_order_of_all() -> None:
    truth = np.arange(600) % 10
    swapped = np.where(truth == 0, 1, np.where(truth == 1, 0, truth))
    assert caution("a", swapped, truth, 10) == "", "right for 80 %, which a muddled order would not be"
