"""EViT and ToMe: what the official implementations compute, the ideas themselves, and the edges."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from support import filled, golden, small_vit
from torch import Tensor, nn

from vitreous import VitreousError, slim
from vitreous.blocks import PlainBlock, Tokens, traced
from vitreous.steps import Step
from vitreous.tokens import EViT, ToMe
from vitreous.tokens.tome import bipartite_soft_matching

# golden, timm name, the step that reproduces it
REFERENCES = [
    ("evit--deit_s_k07_fuse", "deit_small_patch16_224", EViT(keep=0.7)),
    ("tome--deit_t_r13", "deit_tiny_patch16_224", ToMe(r=13)),
]


@pytest.mark.parametrize(("name", "model", "step"), REFERENCES, ids=lambda v: str(v))
def test_official_outputs(name: str, model: str, step: Step) -> None:
    info, expected, x = golden(name)
    small = slim(filled(timm.create_model(model)), step)
    assert sum(p.numel() for p in small.parameters()) == info["params"]
    with torch.no_grad():
        out = small(x)[:, : expected.shape[1]].numpy()
    assert abs(out - expected).max() <= 1e-4 * abs(expected).max()


def lengths(model: nn.Module, x: Tensor) -> list[int]:
    """Tokens that leave each block."""
    seen: list[int] = []
    hooks = [
        m.register_forward_hook(lambda _, __, out: seen.append(Tokens.of(out).x.shape[1]))
        for m in model.modules()
        if isinstance(m, PlainBlock)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_evit_keeps_what_the_class_token_attends_to(vit: nn.Module, images: Tensor) -> None:
    small = slim(vit, EViT(keep=0.5, at=(1,), fuse=False))
    before: list[Tensor] = []
    hook = vit.blocks[1].attn.register_forward_hook(lambda m, args, _: before.append(args[0]))
    with torch.no_grad():
        vit(images)
        with traced(small) as trace:
            small(images)
    hook.remove()
    qkv = vit.blocks[1].attn.qkv(before[0]).reshape(6, 17, 3, 3, 16)
    q, k = qkv[:, :, 0], qkv[:, :, 1]
    attention = torch.einsum("bhd,bnhd->bhn", q[:, 0], k).div(4).softmax(-1).mean(1)[:, 1:]
    best = attention.topk(8).indices.sort().values
    kept = torch.stack([(into[1:] < 9).nonzero()[:, 0] for into in trace[0].into])
    assert torch.equal(best, kept)


def test_evit_fuses_the_rest_by_attention(vit: nn.Module, images: Tensor) -> None:
    """Without the fused token the answer differs, and the fused token is the attention-weighted sum of what went."""
    reducer = next(m for m in slim(vit, EViT(keep=0.25, at=(0,))).modules() if isinstance(m, PlainBlock)).reducers[0]
    x, q, k = torch.randn(2, 17, 48), torch.randn(2, 3, 17, 16), torch.randn(2, 3, 17, 16)

    class Block:
        class attn:
            scale = 0.25

        name = "b"

    out = reducer(Tokens(x), q, k, None, Block()).x
    scores = (q[:, :, :1] @ k.mT / 4).softmax(-1).mean((1, 2))[:, 1:]
    weights = scores.clone().scatter_(1, scores.topk(4).indices, 0.0)
    assert out.shape == (2, 6, 48)
    torch.testing.assert_close(out[:, -1], torch.einsum("bn,bnc->bc", weights, x[:, 1:]))


@pytest.mark.parametrize("step", [EViT(keep=1.0), EViT(keep=1.0, at=(0, 1, 2, 3)), ToMe(r=0)], ids=str)
def test_nothing_to_do_is_the_identity(vit: nn.Module, images: Tensor, step: Step) -> None:
    with torch.no_grad():
        torch.testing.assert_close(slim(vit, step)(images), vit(images), atol=1e-5, rtol=1e-5)


def test_default_blocks_are_the_papers(images: Tensor) -> None:
    small = slim(small_vit(depth=12), EViT(keep=0.5))
    assert lengths(small, images) == [17] * 3 + [10] * 3 + [7] * 3 + [5] * 3  # 16 → 8 + 1 → 5 + 1 → 3 + 1 patches


def test_down_to_one_token(vit: nn.Module, images: Tensor) -> None:
    assert lengths(slim(vit, EViT(keep=0.01, at=(0,), fuse=False)), images) == [2] * 4
    assert lengths(slim(vit, ToMe(r=100)), images) == [9, 5, 3, 2]


@pytest.mark.parametrize("step", [EViT(keep=0.5), ToMe(r=3)], ids=str)
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
    """Prefix tokens stay, whatever their number; grids need not be square; the input may hold one image."""
    patch = 14 if "dinov2" in name else 16
    model = timm.create_model(name, img_size=(4 * patch, 6 * patch), embed_dim=48, depth=4, num_heads=3, num_classes=5)
    x = torch.randn(1, 3, 4 * patch, 6 * patch)
    small = slim(model, step)
    with torch.no_grad(), traced(small) as trace:
        assert small(x).shape == (1, 5)
        assert torch.isfinite(small(x)).all()
    for reduction in trace:
        assert torch.equal(reduction.into[0, :prefix], torch.arange(prefix))
        assert (reduction.into[0, prefix:] >= prefix).all()
        torch.testing.assert_close(reduction.matrix().sum(-1), torch.ones(1, reduction.tokens))


def test_tome_merges_the_most_similar_pairs() -> None:
    metric = torch.randn(2, 9, 6)
    metric[:, 4] = metric[:, 7] * 2.0  # the same direction, at an even and an odd place
    merge, where, _ = bipartite_soft_matching(metric, r=1, prefix=1)
    into = where()
    assert (into[:, 4] == into[:, 7]).all()
    x = torch.randn(2, 9, 3)
    merged = merge(x)
    assert merged.shape == (2, 8, 3)
    torch.testing.assert_close(merged.sum(1), x.sum(1))
    torch.testing.assert_close(merged[torch.arange(2), into[:, 4]], x[:, 4] + x[:, 7])


def test_tome_counts_a_token_as_often_as_its_patches(vit: nn.Module) -> None:
    """Proportional attention: attention over a merged token of size 2 equals attention over two equal tokens."""
    small = slim(vit, ToMe(r=0))
    attn = next(m for m in small.modules() if isinstance(m, PlainBlock)).attn
    twice, once = torch.randn(1, 5, 48), torch.empty(0)
    twice[:, 4] = twice[:, 3]
    once = twice[:, :4]
    bias = torch.tensor([1.0, 1.0, 1.0, 2.0]).log().expand(1, 1, 1, 4)
    with torch.no_grad():
        torch.testing.assert_close(attn(once, bias), attn(twice)[:, :4])


@pytest.mark.parametrize("step", [EViT(keep=0.5), ToMe(r=3)], ids=str)
def test_low_precision_and_compile(vit: nn.Module, images: Tensor, step: Step) -> None:
    small = slim(vit, step)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.no_grad():
            assert torch.isfinite(copy.deepcopy(small).to(dtype)(images.to(dtype))).all()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small, backend="aot_eager")(images), small(images), atol=1e-4, rtol=1e-4)


def test_trains(vit: nn.Module, images: Tensor) -> None:
    small = slim(vit, EViT(keep=0.5)).train()
    small(images).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18", "cait_xxs24_224"])
def test_other_anatomies_are_refused_by_name(name: str) -> None:
    with pytest.raises(VitreousError, match=r"not one: |has none"):
        slim(timm.create_model(name), EViT())


def test_wrong_blocks_are_refused(vit: nn.Module) -> None:
    with pytest.raises(VitreousError, match="there is no block 4"):
        slim(vit, EViT(at=(4,)))
    with pytest.raises(VitreousError, match="already shortens"):
        slim(slim(vit, EViT()), ToMe())
    with pytest.raises(VitreousError, match="keep must lie"):
        EViT(keep=0.0)
