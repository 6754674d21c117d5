"""EViT's keep rate while fine-tuning."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitreous as vt
from vitreous import VitreousError, slim
from vitreous.learn import keep_rate, set_keep
from vitreous.tokens import EViT, ToMe


def test_half_a_cosine_from_one_to_the_target() -> None:
    rates = [keep_rate(epoch, 10, 110, 0.7) for epoch in range(130)]
    assert rates[:11] == [1.0] * 11 and rates[110:] == [0.7] * 20
    assert rates[10:111] == sorted(rates[10:111], reverse=True)
    assert math.isclose(keep_rate(60, 10, 110, 0.7), 0.85)
    assert math.isclose(keep_rate(35, 10, 110, 0.7), 0.7 + 0.3 * (1 + math.cos(math.pi / 4)) / 2)
    assert keep_rate(10.5, 10, 110, 0.7) < 1
    assert keep_rate(0, 0, 0, 0.7) == 0.7, "no epochs of shrinking: the target at once"


def test_set_keep_changes_the_model_and_its_recipe(vit: nn.Module, images: Tensor, tmp_path: Path) -> None:
    small = slim(vit, [EViT(keep=0.7), vt.prune.Heads(share=0.0)], images)
    with torch.no_grad():
        set_keep(small, 1.0)
        torch.testing.assert_close(small(images), vit(images), atol=1e-5, rtol=1e-5)
        set_keep(small, 0.4)
        assert torch.equal(small(images), slim(vit, EViT(keep=0.4))(images))
        vt.save(small, tmp_path / "m.safetensors")
        assert torch.equal(vt.load(tmp_path / "m.safetensors", base=vit)(images), small(images))


def test_refusals(vit: nn.Module) -> None:
    with pytest.raises(VitreousError, match="needs a model with EViT"):
        set_keep(slim(vit, ToMe()), 0.5)
    small = slim(vit, EViT())
    with pytest.raises(VitreousError, match="keep must lie"):
        set_keep(small, 0.0)
    assert {m.keep for m in small.modules() if hasattr(m, "keep")} == {0.7}
