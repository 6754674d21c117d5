"""The ensemble of paths: they sum to the answer, and what is lost without each is what its removal by hand gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from support import small_vit
from torch import Tensor, nn

from vitreous import read, see
from vitreous.errors import VitreousError
from vitreous.quant import RepQ
from vitreous.see.paths import MEASURES
from vitreous.steps import slim
from vitreous.tokens import EViT


def of(found: see.Paths, measure: str) -> np.ndarray:
    return found.values[MEASURES.index(measure)]


def constant(model: Any, y: Tensor) -> Tensor:
    """What the biases of the final norm and the classifier add to the class's logit less the mean of all."""
    norm = model.norm if isinstance(model.norm, nn.LayerNorm) else model.fc_norm
    logits = norm.bias @ model.head.weight.T + model.head.bias
    return logits[y] - logits.mean()


@pytest.mark.parametrize(
    "model",
    [small_vit(), small_vit(class_token=False, global_pool="avg"), small_vit(init_values=0.5, reg_tokens=2)],
    ids=["class token", "average", "layer scale and registers"],
)
def test_contributions_sum_to_the_logit(model: Any, images: Tensor) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        y, out = torch.arange(6) % 7, model(images)
        expected = (out.gather(1, y[:, None])[:, 0] - out.mean(1) - constant(model, y)).mean()
    found = see.paths(model, images, y, batch=4)
    assert found.images == 6 and len(found.names) == 9
    assert of(found, "contribution").sum() == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


def test_what_is_lost_is_what_removal_by_hand_gives(images: Tensor) -> None:
    model: Any = small_vit()
    y = torch.arange(6) % 7
    found = see.paths(model, images, y)
    streams: list[Tensor] = []
    with torch.no_grad():
        base = F.cross_entropy(model(images), y)
        handle = model.blocks[2].mlp.register_forward_hook(lambda _, __, out: streams.append(out) or torch.zeros_like(out))
        without = F.cross_entropy(model(images), y) - base
        handle.remove()
        handle = model.norm.register_forward_pre_hook(lambda _, args: (args[0] - streams[0],))
        direct = F.cross_entropy(model(images), y) - base
        handle.remove()
    assert found.names[6] == "blocks.2.mlp"
    assert of(found, "loss_without")[6] == pytest.approx(float(without), abs=1e-5)
    assert of(found, "loss_without_direct")[6] == pytest.approx(float(direct), abs=1e-5)
    assert np.isnan(of(found, "loss_without")[0]), "without an embedding there is no model"


@pytest.mark.parametrize("name", ["timm EVA-02", "timm BEiT", "torchvision", "vit-pytorch"])
def test_blocks_with_positions_and_other_names(name: str, images: Tensor) -> None:
    model = FAMILIES[name].make()
    y = torch.arange(6) % 7
    found = see.paths(model, images, y)
    with torch.no_grad():
        base = F.cross_entropy(model(images), y)
        last = [m for m in model.get_submodule(read(model).blocks[1].attention.name).modules() if isinstance(m, nn.Linear)][-1]
        for p in last.parameters():
            p.zero_()
        lost = F.cross_entropy(model(images), y) - base
    assert of(found, "loss_without")[3] == pytest.approx(float(lost), abs=1e-4)
    assert of(found, "accuracy_up_to")[-1] == pytest.approx(found.accuracy)


def test_one_logit_is_two_classes(images: Tensor) -> None:
    model: Any = small_vit(num_classes=1)
    y = torch.arange(6) % 2
    found = see.paths(model, images, y)
    with torch.no_grad():
        out = model(images)[:, 0]
        expected = ((y * 2 - 1) * (out - model.norm.bias @ model.head.weight[0] - model.head.bias) / 2).mean()
        assert found.accuracy == pytest.approx(float(((out > 0) == y.bool()).float().mean()))
    assert of(found, "contribution").sum() == pytest.approx(float(expected), rel=1e-3, abs=1e-4)
    with pytest.raises(VitreousError, match="one class an image"):
        see.paths(small_vit(), images, torch.ones(6, 7))


def test_nothing_is_lost_without_a_path_that_says_nothing(images: Tensor) -> None:
    model: Any = small_vit()
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.zero_()
        model.blocks[1].attn.proj.bias.zero_()
    found = see.paths(model, images)
    np.testing.assert_allclose(found.values[:5, 3], 0, atol=1e-6)
    assert (np.abs(np.delete(of(found, "loss_without"), [0, 3])) > 1e-4).all()


def test_a_path_that_pulls_the_answer_down_is_seen_and_cut(images: Tensor) -> None:
    model: Any = small_vit()
    with torch.no_grad():
        y = model(images).argmax(1)
        wrong = model.head.weight[int((y[0] + 1) % 7)]
        model.blocks[3].mlp.fc2.bias += 20 * wrong / wrong.norm()
        assert (model(images).argmax(1) == y).float().mean() < 1
        assert (see.without_paths(model, images, [8]).argmax(1) == y).float().mean() > (
            model(images).argmax(1) == y
        ).float().mean()
    found = see.paths(model, images, y)
    assert of(found, "loss_without_direct")[8] < -0.1 and of(found, "contribution")[8] < 0


def test_lengths_add_up_to_the_whole_model(images: Tensor) -> None:
    model = small_vit()
    y = torch.arange(6) % 7
    found = see.paths(model, images, y)
    with torch.no_grad():
        right = float((model(images).argmax(1) == y).float().mean())
        torch.testing.assert_close(see.without_paths(model, images, []), model(images))
        longer = see.without_paths(model, images, range(4))
    assert found.accuracy == pytest.approx(right) and of(found, "accuracy_up_to")[-1] == pytest.approx(right)
    assert of(found, "accuracy_beyond")[3] == pytest.approx(float((longer.argmax(1) == y).float().mean()))
    assert [r["length"] for r in found.rows()] == list(range(9))


def test_refusals(images: Tensor) -> None:
    model: Any = small_vit()
    with pytest.raises(VitreousError, match="there is none of 9"):
        see.without_paths(model, images, [9])
    with pytest.raises(VitreousError, match="drops or merges tokens"):
        see.paths(slim(model, EViT(keep=0.5)), images)
    assert see.paths(slim(model, RepQ(), images), images).images == 6
    model.reset_classifier(0)
    with pytest.raises(VitreousError, match="needs a classifier"):
        see.paths(model, images)
