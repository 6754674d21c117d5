"""Faithfulness: explanations of known truth get the figures they deserve."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous.prove.faithfulness import _area, _orders, faithfulness
from vitreous.prove.randomisation import randomised, rank_correlation


class Corner(nn.Module):
    """Class 1 as far as the upper left of 4 × 4 patches is bright; of no other does it know."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 1), nn.Linear(1, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.0], [20.0]]))
            self.head.bias.copy_(torch.tensor([0.0, -18.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, :, :8, :8].mean((1, 2, 3))[:, None])


class Backwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.third, self.unused = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
        self.second, self.first = nn.Linear(6, 6, bias=False), nn.Linear(12, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x.flatten(1)).relu()).relu())


def knows(model: nn.Module, x: Tensor, target: object) -> Tensor:
    return torch.eye(16)[0].view(1, 4, 4).repeat(len(x), 1, 1)


def lies(model: nn.Module, x: Tensor, target: object) -> Tensor:
    return 1 - knows(model, x, target)


def says_nothing(model: nn.Module, x: Tensor, target: object) -> Tensor:
    return torch.ones(len(x), 4, 4)


@pytest.fixture
def bright() -> Tensor:
    """Whose upper left patch alone is bright, too little so when it is blurred."""
    x = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    x[:, :, :8, :8] += 1
    return x


class TestCurves:
    def test_by_hand(self) -> None:
        """The score is the share of patches done, weighted: 0, then 0.7 after the first, then 1."""
        weight = torch.tensor([0.7, 0.3])
        order, start, end = torch.tensor([[0, 1]]), torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4)

        def score(x: Tensor, at: slice) -> Tensor:
            return x.unflatten(3, (2, 2)).mean((1, 2, 4)) @ weight

        assert _area(score, start, end, order, (1, 2), 2) == pytest.approx([(0 + 0.7) / 4 + (0.7 + 1) / 4])
        assert _area(score, start, end, order.flip(1), (1, 2), 2) == pytest.approx([(0 + 0.3) / 4 + (0.3 + 1) / 4])

    def test_most_important_first_and_equals_at_random(self) -> None:
        maps = torch.tensor([[[0.0, 5.0, 0.0], [2.0, 0.0, 0.0]]]).repeat(200, 1, 1)
        order, chance = _orders(maps, 0)
        assert (order[:, 0] == 1).all() and (order[:, 1] == 3).all()
        assert len(order[:, 2].unique()) == 4 and torch.equal(order.sort(1).values, chance.sort(1).values)
        assert torch.equal(order, _orders(maps, 0)[0])

    def test_truth_is_told_from_lies(self, bright: Tensor) -> None:
        found = faithfulness(Corner(), {"knows": knows, "lies": lies, "nothing": says_nothing}, bright, steps=16, sanity_images=2)
        for curve in ("insertion", "deletion"):
            assert getattr(found["knows"], curve).gain.low > 0.1
            assert getattr(found["lies"], curve).gain.high < -0.1
            gain = getattr(found["nothing"], curve).gain
            assert gain.value == gain.low == gain.high == 0, "an order of equals is the random one"
        assert found["knows"].insertion.area.value > 0.8 > 0.3 > found["knows"].deletion.area.value
        assert found.whole > 0.9 and found.blank < 0.1

    def test_the_score_is_that_of_the_labels(self, bright: Tensor) -> None:
        one, other = (faithfulness(Corner(), {"k": knows}, bright, torch.full((24,), c), sanity_images=1) for c in (1, 0))
        assert other["k"].insertion.area.value == pytest.approx(1 - one["k"].insertion.area.value, abs=1e-5)

    def test_a_model_that_only_embeds(self, vit: nn.Module, images: tuple[Tensor, Tensor], explain) -> None:
        vit.reset_classifier(0)
        asked = []

        def heat(model: nn.Module, x: Tensor, target: object) -> Tensor:
            asked.append(target)
            return explain(model, x)

        found = faithfulness(vit, {"norms": heat}, images[0][:8], sanity_images=2)
        assert found.whole == pytest.approx(1) and found.blank < 0.99 and "cosine" in found.score and set(asked) == {None}


class TestPointing:
    def test_hits_and_chance(self, bright: Tensor) -> None:
        boxes = torch.tensor([[0.0, 0, 16, 8], [8, 8, 32, 32], [0, 0, 32, 32], [torch.nan] * 4])  # 2, 9 and 16 of 16 patches
        found = faithfulness(Corner(), {"k": knows}, bright[:4], boxes=boxes, sanity_images=1)["k"]
        assert found.pointing is not None and found.pointing.value == pytest.approx(2 / 3)
        assert found.chance == pytest.approx((2 + 9 + 16) / 48)
        assert faithfulness(Corner(), {"k": knows}, bright[:4], sanity_images=1)["k"].pointing is None


class TestSanity:
    def test_an_edge_detector_fails_and_a_reader_of_weights_passes(self, vit: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        def edges(model: nn.Module, x: Tensor, target: object) -> Tensor:
            return x.std((1,)).unflatten(2, (4, 8)).unflatten(1, (4, 8)).mean((2, 4))

        def position(model: nn.Module, x: Tensor, target: object) -> Tensor:
            return model.pos_embed[:, 1:, 0].square().view(1, 4, 4).repeat(len(x), 1, 1)

        def classes(model: nn.Module, x: Tensor, target: object) -> Tensor:
            return model.head.weight[0, :16].abs().view(1, 4, 4).repeat(len(x), 1, 1)

        before = {k: v.clone() for k, v in vit.state_dict().items()}
        vit.train()
        found = faithfulness(vit, {"edges": edges, "position": position, "classes": classes}, images[0][:4], steps=2)
        assert found["edges"].passes is False and found["edges"].sanity[-1].correlation.value == pytest.approx(1)
        assert found["position"].passes and found["classes"].passes
        at = {n: [s.correlation.value for s in found[n].sanity] for n in ("position", "classes")}
        assert [s.name for s in found["edges"].sanity] == ["classifier", "25%", "50%", "75%", "100%"]
        assert at["position"][:4] == pytest.approx([1] * 4), "the lowest parameters are random last"
        assert all(c < 0.9 for c in at["classes"]), "and the classifier first"
        assert "FAILS" in str(found) and str(found).count("FAILS") == 1
        assert vit.training and all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())

    def test_every_parameter_is_shuffled_in_the_end(self, vit: nn.Module) -> None:
        state = [p.clone() for p in vit.parameters()]
        for name, random in randomised(vit, torch.zeros(1, 3, 32, 32), 0):
            changed = [not torch.equal(p, q) for p, q in zip(state, random.parameters(), strict=True)]
            same = all(
                torch.equal(p.sort().values, q.flatten().sort().values)
                for p, q in zip(map(torch.flatten, state), random.parameters())
            )
            assert same, "their values stay"
            assert changed[-2], name
        assert all(c or p.unique().numel() == 1 for c, p in zip(changed, state))

    def test_what_is_up_is_seen_by_running(self) -> None:
        """A model that holds its head first, and its body in the wrong order, is made random from the head down all the same."""
        ran = Backwards()
        state = {n: p.clone() for n, p in ran.named_parameters()}
        order = []
        for _, random in randomised(ran, torch.randn(1, 3, 2, 2), 0):
            order.append({n for n, p in random.named_parameters() if not torch.equal(p, state[n])})
        assert [len(names) for names in order] == [1, 1, 2, 3, 4], order
        assert order[0] == {"third.weight"} and order[2] - order[0] == {"second.weight"} and "unused.weight" not in order[3]

    def test_the_classifier_comes_first_whatever_runs_behind_it(self) -> None:
        torch.manual_seed(0)
        scaled = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 5), nn.BatchNorm1d(5)).eval()
        scaled.vitreous_embeds = False  # type: ignore[assignment]
        with torch.no_grad():
            scaled[3].weight.normal_()
        state = {n: p.clone() for n, p in scaled.named_parameters()}
        name, random = next(randomised(scaled, torch.randn(1, 3, 2, 2), 0))
        changed = {n for n, p in random.named_parameters() if not torch.equal(p, state[n])}
        assert (name, changed) == ("classifier", {"2.weight", "2.bias"})

    def test_rank_correlation(self) -> None:
        a = np.array([[[1.0, 2, 3]], [[1, 2, 3]], [[1, 2, 3]], [[1, 1, 1]]])
        b = np.array([[[10.0, 20, 999]], [[3, 2, 1]], [[2, 2, 2]], [[1, 2, 3]]])
        assert rank_correlation(a, b) == pytest.approx([1, -1, 0, 0])


def test_results_are_written_and_the_same_again(tmp_path, bright: Tensor) -> None:
    one, two = (vt.faithfulness(Corner(), {"k": knows}, bright, seed=3, sanity_images=4) for _ in range(2))
    assert one.rows == two.rows
    one.save(tmp_path / "f.json")
    read = json.loads((tmp_path / "f.json").read_text())
    assert read["rows"][0]["insertion"]["gain"]["low"] == one["k"].insertion.gain.low
    assert read["bound"] == 0.5 and read["machine"] and "k" in str(one)


def test_an_explanation_that_cannot_be_had_says_why(bright: Tensor) -> None:
    def refuses(model: nn.Module, x: Tensor, target: object) -> Tensor:
        raise vt.VitreousError("no attention here")

    found = faithfulness(Corner(), {"r": refuses, "k": knows}, bright, sanity_images=1)
    assert found["r"].error == "no attention here" and found["r"].passes is None and found["k"].error is None
    assert "no attention here" in str(found)


def test_bad_input(bright: Tensor) -> None:
    for given, match in [
        (({}, bright), "at least one explanation"),
        (({"k": knows}, bright[0]), r"\[B, C, H, W\]"),
        (({"k": knows}, bright, torch.zeros(3)), r"labels must be \[24\]"),
        (({"k": knows}, bright, None, torch.zeros(24, 3)), r"boxes must be \[24, 4\]"),
        (({"k": knows}, bright, torch.full((24,), 2)), "classes 0 to 1"),
    ]:
        with pytest.raises(vt.VitreousError, match=match):
            faithfulness(Corner(), *given)
    with pytest.raises(vt.VitreousError, match="steps=0"):
        faithfulness(Corner(), {"k": knows}, bright, steps=0)
    found = faithfulness(Corner(), {"k": lambda m, x, t: torch.full((len(x), 2, 2), torch.nan)}, bright)
    assert "finite" in (found["k"].error or "")


def test_one_logit_and_several_labels_are_scored_by_sigmoid() -> None:
    """The softmax of one logit is 1 whatever is seen."""
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one = small_vit(depth=1)
    one.head = torch.nn.Linear(48, 1)
    found = faithfulness(one, {"flat": lambda m, x, t: torch.rand(len(x), 4, 4)}, x, steps=2, sanity_images=1)
    with torch.no_grad():
        assert found.whole == pytest.approx(float(one(x).sigmoid().mean()), abs=1e-5) and "sigmoid" in found.score
        several = small_vit(depth=1)
        found = faithfulness(
            several, {"flat": lambda m, x, t: torch.rand(len(x), 4, 4)}, x, steps=2, sanity_images=1, multi_label=True
        )
        assert found.whole == pytest.approx(float(several(x).amax(1).sigmoid().mean()), abs=1e-5)


def test_images_in_other_forms_and_unprepared(bright: Tensor) -> None:
    right = faithfulness(Corner(), {"k": knows}, bright[:4], steps=2, sanity_images=1)
    for given in (list(bright[:4]), [bright[:2], bright[2:4]], bright[:4].numpy()):
        assert faithfulness(Corner(), {"k": knows}, given, steps=2, sanity_images=1).rows == right.rows
    with pytest.raises(vt.VitreousError, match="uint8"):
        faithfulness(Corner(), {"k": knows}, (bright * 200).to(torch.uint8))
