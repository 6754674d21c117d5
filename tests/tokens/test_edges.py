"""Every registered token step at the edges: nothing to do, one token left, odd grids and prefixes, one image, half precision."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vitreous.blocks import PlainBlock, Tokens
from vitreous.steps import REGISTRY, make_step, slim
from vitreous.tokens.mctf import FEWEST
from vitreous.tokens.sparsifiner import ConnectivityPredictor

DEPTH, GRID, PATCHES = 5, (4, 6), 24  # five halvings leave one of 24 patches


@dataclass(frozen=True)
class Edges:
    """Arguments of a step with which it does something, nothing, and as much as it can; and the patches that then stay."""

    some: dict[str, Any]
    nothing: dict[str, Any] | None
    most: dict[str, Any]
    stay: int = 1


EDGES = {
    "tokens.EViT": Edges({"keep": 0.5}, {"keep": 1.0}, {"keep": 0.01, "at": (0,), "fuse": False}),
    "tokens.MCTF": Edges({"r": 3}, {"r": 0}, {"r": 0.99}, stay=0),  # stops at ten tokens, as the official code does
    "tokens.RandomChoice": Edges({"keep": 0.5}, {"keep": 1.0}, {"keep": 0.01, "at": (0,)}),
    "tokens.SemanticTokens": Edges({"tokens": 6}, None, {"tokens": 1}),  # its centers never are the patches
    "tokens.Sparsifiner": Edges({"budget": 0.25}, {"budget": 1.0}, {"budget": 0.01}, stay=PATCHES),  # shortens no sequence
    "tokens.ToMe": Edges({"r": 3}, {"r": 0}, {"r": 100}),
    "tokens.TokenSlimming": Edges({"keep": 0.5}, {"keep": 1.0}, {"keep": 0.01}),
    "tokens.UniformPooling": Edges({}, {"at": ()}, {"at": (0, 1, 2, 3, 4)}),
}
PREFIXES: dict[int, tuple[str, dict[str, Any]]] = {
    0: ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    1: ("vit_tiny_patch16_224", {}),
    2: ("deit_tiny_distilled_patch16_224", {}),
    5: ("vit_tiny_patch16_224", {"reg_tokens": 4}),
}


def make(prefix: int, depth: int = DEPTH) -> nn.Module:
    name, kwargs = PREFIXES[prefix]
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(img_size=(32, 48), patch_size=8, embed_dim=48, depth=depth, num_heads=3, num_classes=7)
    model = timm.create_model(name, **shape, **kwargs)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    return model.eval()


@cache
def original(prefix: int) -> nn.Module:
    return make(prefix)


@cache
def shortened(name: str, prefix: int) -> nn.Module:
    return slim(original(prefix), make_step(name, **EDGES[name].some))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def test_every_token_step_is_here() -> None:
    """All but the one that is for no ViT, which `test_ssm_pruning.py` tries so."""
    assert {*EDGES, "tokens.SSMPruning"} == {name for name in REGISTRY if name.startswith("tokens.")}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", [name for name, edges in EDGES.items() if edges.nothing is not None])
def test_nothing_to_do_is_the_identity(name: str, prefix: int, x: Tensor) -> None:
    nothing, model = EDGES[name].nothing, original(prefix)
    assert nothing is not None
    with torch.no_grad():
        torch.testing.assert_close(slim(model, make_step(name, **nothing))(x), model(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", EDGES)
class TestEdges:
    def test_one_patch_stays(self, name: str, prefix: int, x: Tensor) -> None:
        small = slim(original(prefix), make_step(name, **EDGES[name].most))
        left: list[int] = []
        *_, last = (m for m in small.modules() if isinstance(m, PlainBlock))
        last.register_forward_hook(lambda _, __, out: left.append(Tokens.of(out).x.shape[1]))
        with torch.no_grad():
            assert torch.isfinite(small(x)).all()
        if name == "tokens.MCTF":
            assert prefix < left[0] <= FEWEST
        else:
            assert left == [prefix + EDGES[name].stay]
        if name == "tokens.Sparsifiner":
            assert {m.keep for m in small.modules() if isinstance(m, ConnectivityPredictor)} == {1}

    def test_one_image_is_answered_as_among_others(self, name: str, prefix: int, x: Tensor) -> None:
        small = shortened(name, prefix)
        with torch.no_grad():
            together, alone = small(x), torch.cat([small(one) for one in x[:2].split(1)])
            assert not torch.allclose(together, original(prefix)(x), atol=1e-3), "these arguments do something"
        torch.testing.assert_close(alone, together[:2], atol=1e-4, rtol=1e-4)

    def test_half_precision_stays_near(self, name: str, prefix: int, x: Tensor) -> None:
        small = shortened(name, prefix)
        for dtype, bound in ((torch.bfloat16, 0.04), (torch.float16, 0.006)):
            with torch.no_grad():
                exact, half = small(x), copy.deepcopy(small).to(dtype)(x.to(dtype)).float()
            assert torch.isfinite(half).all()
            error = (half - exact).norm(dim=1) / exact.norm(dim=1)
            # Where two tokens score nearly alike, rounding decides between them: an image may differ, not most.
            assert error.median() < bound, dtype


@pytest.mark.parametrize("name", EDGES)
def test_compiles_whole(name: str, x: Tensor) -> None:
    torch._dynamo.reset()
    small = slim(make(5, depth=2), make_step(name, **EDGES[name].some))  # two blocks: tracing is slow
    with torch.no_grad():
        compiled = torch.compile(small, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, small(x), atol=1e-5, rtol=1e-5)
