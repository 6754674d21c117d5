"""RandomChoice and UniformPooling: what a method that looks at its tokens must beat."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from support import small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous import VitreousError, slim
from vitreous.blocks import PlainBlock, Reduction, Tokens, traced
from vitreous.steps import Step
from vitreous.tokens import EViT, RandomChoice, UniformPooling
from vitreous.tokens.pooling import PoolGrid
from vitreous.tokens.random_choice import KeepDrawn

STEPS = [RandomChoice(keep=0.5), UniformPooling()]


def reduced(reducer: nn.Module, x: Tensor, size: Tensor | None = None) -> tuple[Tokens, Reduction]:
    """What a reducer leaves, and what it says that it did."""
    block = PlainBlock(cast(Any, small_vit(depth=1)).blocks[0], "b", last=False)
    with traced(block) as trace:
        out = reducer(Tokens(x, size), x, x, None, block)
    return out, trace[0]


def lengths(model: nn.Module, x: Tensor) -> list[int]:
    seen: list[int] = []
    blocks = [m for m in model.modules() if isinstance(m, PlainBlock)]
    hooks = [b.register_forward_hook(lambda _, __, out: seen.append(Tokens.of(out).x.shape[1])) for b in blocks]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def drawn(step: Step, seed_model: int = 0) -> list[Tensor]:
    small = slim(small_vit(seed=seed_model), step)
    with torch.no_grad(), traced(small) as trace:
        small(torch.randn(3, 3, 32, 32))
    return [r.into for r in trace]


def test_the_draw_depends_on_the_seed_alone() -> None:
    first, again, other = drawn(RandomChoice(0.5)), drawn(RandomChoice(0.5), seed_model=3), drawn(RandomChoice(0.5, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all((into == into[:1]).all() for into in first), "the same for all images"
    assert not torch.equal(first[0][0, 1:9] < 9, first[1][0, 1:9] < 5), "blocks draw apart"


def test_random_choice_keeps_what_it_says(images: Tensor) -> None:
    assert lengths(slim(small_vit(), RandomChoice(keep=0.5)), images) == [17, 9, 5, 3]
    assert lengths(slim(small_vit(), RandomChoice(keep=0.01, at=(0,))), images) == [2] * 4
    reducer = KeepDrawn(0.5, 1, 16, torch.Generator().manual_seed(0))
    x, size = torch.randn(2, 17, 3), torch.rand(2, 17, 1)
    (out, sizes, _), trace = reduced(reducer, x, size)
    kept = [0, *sorted((reducer.rank.argsort()[:8] + 1).tolist())]
    assert torch.equal(out, x[:, kept]) and sizes is not None and torch.equal(sizes, size[:, kept])
    torch.testing.assert_close(trace.matrix() @ x, out)


def test_every_patch_is_as_likely() -> None:
    counts = torch.zeros(16)
    for seed in range(200):
        rank = KeepDrawn(0.5, 1, 16, torch.Generator().manual_seed(seed)).rank
        counts[rank.argsort()[:8]] += 1
    assert counts.min() > 70 and counts.max() < 130


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 4), (2, 1)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_pooling_averages_two_by_two(grid: tuple[int, int], prefix: int) -> None:
    h, w = grid
    x = torch.randn(2, prefix + h * w, 3)
    (out, sizes, _), trace = reduced(PoolGrid(grid, prefix), x)
    image = x[:, prefix:].mT.unflatten(-1, grid)
    pooled = F.avg_pool2d(image, 2, ceil_mode=True, count_include_pad=False).flatten(2).mT
    torch.testing.assert_close(out, torch.cat([x[:, :prefix], pooled], 1))
    assert sizes is not None and (sizes.sum(1) == prefix + h * w).all()
    torch.testing.assert_close(trace.matrix() @ x, out)


def test_pooling_weighs_by_size() -> None:
    x, size = torch.randn(1, 4, 3), torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]
    (out, sizes, _), _ = reduced(PoolGrid((2, 2), 0), x, size)
    torch.testing.assert_close(out[0, 0], (x * size).sum((0, 1)) / 10)
    assert sizes is not None and sizes.item() == 10


def test_pooling_down_to_one_token(images: Tensor) -> None:
    assert lengths(slim(small_vit(), UniformPooling(at=(0, 1, 2, 3))), images) == [5, 2, 2, 2]
    assert lengths(slim(small_vit(), UniformPooling()), images) == [17, 17, 5, 5]


@pytest.mark.parametrize("step", [RandomChoice(keep=1.0), UniformPooling(at=())], ids=str)
def test_identity(vit: nn.Module, images: Tensor, step: Step) -> None:
    with torch.no_grad():
        torch.testing.assert_close(slim(vit, step)(images), vit(images), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("step", [*STEPS, UniformPooling(at=(0, 2))], ids=str)
@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_base_patch16_siglip_224", 0),
    ],
)
def test_prefix_tokens_and_grids(step: Step, name: str, prefix: int) -> None:
    patch = 14 if "dinov2" in name else 16
    model = timm.create_model(name, img_size=(3 * patch, 5 * patch), embed_dim=48, depth=4, num_heads=3, num_classes=5)
    x = torch.randn(1, 3, 3 * patch, 5 * patch)
    small = slim(model, step)
    with torch.no_grad(), traced(small) as trace:
        assert torch.isfinite(small(x)).all()
    assert trace
    for reduction in trace:
        assert torch.equal(reduction.into[0, :prefix], torch.arange(prefix))
        assert (reduction.into[0, prefix:] >= prefix).all()
    ((_, places), *_) = vt.see.survival(small, x)
    assert places.shape == (1, 3, 5)
    assert (places == -1).sum() == (7 if isinstance(step, RandomChoice) else 0)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_low_precision_compile_and_training(vit: nn.Module, images: Tensor, step: Step) -> None:
    small = slim(vit, step)
    with torch.no_grad():
        half = copy.deepcopy(small).bfloat16()
        assert torch.isfinite(half(images.bfloat16())).all()
        torch.testing.assert_close(torch.compile(small, backend="aot_eager")(images), small(images), atol=1e-4, rtol=1e-4)
    small.train()(images).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_exports_with_any_batch(tmp_path: Path, step: Step) -> None:
    small = slim(small_vit(depth=2), step)
    x = torch.randn(5, 3, 32, 32)
    vt.ship(small, tmp_path / "m.onnx", example=x)
    with torch.no_grad():
        torch.testing.assert_close(vt.Runtime(tmp_path / "m.onnx")(x[:1]), small(x[:1]), atol=1e-4, rtol=1e-4)


def test_half_precision_draws_the_same(vit: nn.Module, images: Tensor) -> None:
    small = slim(vit, RandomChoice(keep=0.5))
    with torch.no_grad(), traced(small) as exact:
        small(images)
    with torch.no_grad(), traced(small.bfloat16()) as half:
        small(images.bfloat16())
    assert all(torch.equal(a.into, b.into) for a, b in zip(exact, half, strict=True))


def test_refusals(vit: nn.Module, images: Tensor) -> None:
    with pytest.raises(VitreousError, match="keep must lie"):
        RandomChoice(keep=0.0)
    for step in (RandomChoice(at=(4,)), UniformPooling(at=(4,))):
        with pytest.raises(VitreousError, match="there is no block 4"):
            slim(vit, step)
    with pytest.raises(VitreousError, match="already shortens"):
        slim(vit, [EViT(), RandomChoice()])
    with pytest.raises(VitreousError, match=r"block 1 already shortens.*no grid"):
        slim(vit, [EViT(at=(1,)), UniformPooling(at=(3,))])
    with pytest.raises(VitreousError, match=r"8 patches enter.*not a grid of 4 × 4"):
        slim(vit, [UniformPooling(at=(3,)), EViT(keep=0.4, at=(1,))])(images)
