"""Official checkpoints for another size of images say so, and which; and bring their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitreous as vt
from vitreous import VitreousError
from vitreous.models import load_official, variants
from vitreous.models.classifier import init_weights
from vitreous.models.undrawn import Undrawn

SMALL = dict(embed_dim=32, depth=1, num_heads=2)


def test_load_official_says_which_size_to_pass() -> None:
    state = vt.open("crate_tiny", img_size=384, **SMALL).state_dict()
    with pytest.raises(VitreousError, match=r"do not fit.* 384 × 384 pixels: pass img_size=384"):
        load_official("vir--tiny", vt.open("vir_tiny", img_size=384, depth=1).state_dict(), depth=1)
    with pytest.raises(VitreousError, match=r"do not fit") as caught:
        load_official("vir--tiny", state, depth=1)
    assert "img_size" not in str(caught.value), "another model altogether"


def test_classes_are_the_checkpoints() -> None:
    state = vt.open("vir_tiny", depth=1, num_classes=5).state_dict()
    model: Any = load_official("vir--tiny", state, depth=1)
    assert model.num_classes == 5 and torch.equal(model.head.weight, state["head.weight"])
    with pytest.raises(VitreousError, match="do not fit"):
        load_official("vir--tiny", state, depth=1, num_classes=4)
    with pytest.raises(VitreousError, match="do not fit"):
        load_official("vir--tiny", {**state, "head.weight": torch.zeros(5, 7)}, depth=1)


def test_open_says_which_size_to_pass(tmp_path: Path) -> None:
    small = dict(stem_hidden_dim=8, embed_dims=(16, 16, 24, 32), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1))
    torch.save(vt.open("spectformer_s", img_size=384, **small).state_dict(), tmp_path / "w.pt")
    with pytest.raises(VitreousError, match=r"do not fit.*img_size=384 fits"):
        vt.open("spectformer_s", checkpoint=tmp_path / "w.pt", **small)
    assert vt.open("spectformer_s", checkpoint=tmp_path / "w.pt", img_size=384, **small)


def test_variants_are_known_as_reference_outputs_call_them() -> None:
    assert {f"spectformer--h_{size}" for size in "sbl"} <= set(variants())


def test_what_a_checkpoint_brings_is_not_drawn_first() -> None:
    random = torch.get_rng_state()
    with Undrawn():
        nn.Sequential(nn.Linear(8, 8), nn.Conv2d(3, 8, 3)).apply(init_weights)
    assert torch.equal(random, torch.get_rng_state())
