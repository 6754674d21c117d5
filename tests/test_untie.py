"""Weights that places share are given to each before a step moves factors between them: as if they had never been shared."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import error, small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous.copies.untie import untie


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def weight(blocks: nn.Sequential) -> None:
    blocks[1].attn.qkv.weight = blocks[0].attn.qkv.weight


def mlp(blocks: nn.Sequential) -> None:
    blocks[1].mlp = blocks[0].mlp


def norm(blocks: nn.Sequential) -> None:
    blocks[1].norm1 = blocks[0].norm2 = blocks[0].norm1


def block(blocks: nn.Sequential) -> None:
    blocks[1] = blocks[0]


KINDS: dict[str, tuple[Callable[[nn.Sequential], None], list[str]]] = {
    "weight": (weight, ["blocks.1.attn.qkv.weight"]),
    "mlp": (mlp, ["blocks.1.mlp"]),
    "norm": (norm, ["blocks.0.norm2", "blocks.1.norm1"]),
    "block": (block, ["blocks.1"]),
}


def tied(kind: str) -> nn.Module:
    model = small_vit(depth=2)
    KINDS[kind][0](model.blocks)
    return model


def apart(model: nn.Module) -> nn.Module:
    """The same function with nothing shared, by way of its state dict."""
    other = small_vit(depth=2)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_each_place_gets_its_own(kind: str, x: Tensor) -> None:
    model = tied(kind)
    expected = apart(model)
    with torch.no_grad():
        before = model(x)
        assert untie(model) == KINDS[kind][1] and untie(model) == []
        assert torch.equal(model(x), before)
        for p in model.blocks[0].parameters():
            p.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(model.blocks[1].parameters(), expected.blocks[1].parameters(), strict=True))


def test_what_is_not_shared_stays_as_it_is() -> None:
    model = small_vit(depth=2)
    act = model.blocks[1].mlp.act = model.blocks[0].mlp.act  # has no parameters
    before = dict(model.named_parameters())
    assert untie(model) == [] and model.blocks[1].mlp.act is act
    assert all(p is before[n] for n, p in model.named_parameters())


MOVES = ["SmoothQuant()", "RepQ()", "Heads(share=0.34)", "EViT(keep=0.5, at=(1,))"]
EVERY = [*((kind, step) for kind in KINDS for step in MOVES), ("mlp", "Auto()"), ("weight", "WeightOnly(bits=4)")]


@pytest.mark.parametrize(("kind", "step"), EVERY)
def test_a_step_does_what_it_does_to_the_untied_model(kind: str, step: str, x: Tensor, tmp_path: Path) -> None:
    model = tied(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match=f"{KINDS[kind][1][0]}.* shared weights with other layers"):
        small = vt.slim(model, vt.Recipe.parse(step), x)
    expected = vt.slim(apart(model), vt.Recipe.parse(step), x)
    with torch.no_grad():
        assert torch.equal(small(x), expected(x))
        again = vt.load(vt.save(small, tmp_path / "small.safetensors"), base=model)
        assert torch.equal(again(x), small(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(dict(model.named_parameters())) < len(dict(small.named_parameters(remove_duplicate=False))), "still shared"


def test_parameters_of_one_storage_are_apart_too(x: Tensor) -> None:
    model = small_vit(depth=2)
    model.blocks[1].attn.qkv.weight.data = model.blocks[0].attn.qkv.weight.data
    small, expected = (vt.slim(m, vt.quant.SmoothQuant(), x) for m in (model, apart(model)))
    with torch.no_grad():
        assert torch.equal(small(x), expected(x))


def test_a_layer_called_behind_two_norms_takes_factors_from_neither(x: Tensor) -> None:
    class Both(nn.Module):
        """The same MLP twice in a block, behind two norms."""

        def __init__(self, mlp: nn.Module, norm: nn.Module) -> None:
            super().__init__()
            self.mlp, self.norm = mlp, norm

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.norm(x)) + self.mlp(x)

    model = small_vit(depth=2)
    with torch.no_grad():
        for block in model.blocks:
            block.norm2.weight.mul_(torch.linspace(0.1, 10, 48))
            block.mlp = Both(block.mlp, nn.LayerNorm(48))
    assert error(vt.slim(model, vt.quant.SmoothQuant(alpha=1.0), x), model, x) < 0.1


def test_nothing_is_said_where_nothing_is_shared(x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vt.slim(small_vit(depth=1), vt.quant.MinMax(), x)
