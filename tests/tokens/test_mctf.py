"""MCTF: what the official implementation computes, each of its criteria, and the edges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support import filled, golden, small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous import VitreousError, slim
from vitreous.blocks import PlainBlock, Tokens, traced
from vitreous.quant import RepQ
from vitreous.tokens import MCTF, EViT
from vitreous.tokens.mctf import FuseByCriteria, attraction, bidirectional_matching

OFFICIAL = {"tau_sim": 1.0, "tau_info": 20.0, "tau_size": 40.0}


def reducers(model: nn.Module) -> list[FuseByCriteria]:
    return [m for m in model.modules() if isinstance(m, FuseByCriteria)]


def lengths(model: nn.Module, x: Tensor) -> list[int]:
    seen: list[int] = []
    blocks = [m for m in model.modules() if isinstance(m, PlainBlock)]
    hooks = [b.register_forward_hook(lambda _, __, out: seen.append(Tokens.of(out).x.shape[1])) for b in blocks]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "model", "step"),
    [("mctf--deit_t_r16", "deit_tiny_patch16_224", MCTF(r=16, at=tuple(range(1, 12))))],
)
def test_official_outputs(name: str, model: str, step: MCTF) -> None:
    info, expected, x = golden(name)
    small = slim(filled(timm.create_model(model)), step)
    assert sum(p.numel() for p in small.parameters()) == info["params"]
    assert [n for n, *_ in info["state"]] == list(small.state_dict())
    with torch.no_grad():
        out = small(x)[:, : expected.shape[1]].numpy()
    assert abs(out - expected).max() <= 1e-4 * abs(expected).max()


def as_published(block: Any, x: Tensor, size: Tensor, r: int, bidirectional: bool, ahead: bool) -> tuple[Tensor, Tensor]:
    """One block on `[N, C]` with sizes `[N]`, one prefix token, pair by pair and with the attention map itself fused."""
    attn, n = block.attn, len(x)

    def heads(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attn.qkv(t).unflatten(-1, (3, 3, -1)).permute(1, 2, 0, 3)
        return q, k, v

    q, k, v = heads(block.norm1(x))
    a = (q @ k.mT * attn.scale + size.log()).softmax(-1)  # [heads, N, N]
    received = a.mean((0, 1))
    if not ahead:
        x = x + attn.proj((a @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
    info, small = 1 / received, 1 / size
    info, small, u = info / info.max(), small / small.max(), x / x.norm(dim=-1, keepdim=True)

    def w(i: int, j: int) -> float:
        return float((u[i] @ u[j] + 1) / 2 * (info[i] * info[j]) ** (1 / 20) * (small[i] * small[j]) ** (1 / 40))

    even, odd = list(range(2, n, 2)), list(range(1, n, 2))
    members = {i: [i] for i in range(n)}

    def move(givers: list[int], takers: list[int], number: int) -> list[int]:
        """Moves the best givers; returns the others by falling score."""
        best = sorted(((max(w(i, j) for j in takers), i) for i in givers), reverse=True)
        for _, i in best[:number]:
            members[max(takers, key=lambda j: w(i, j))] += members.pop(i)
        return [i for _, i in best[number:]]

    even = sorted(move(even, odd, r // 2 if bidirectional else r))
    odd = move(odd, even, r - r // 2) if bidirectional else odd
    sums = torch.stack([torch.eye(n)[members[i]].sum(0) for i in [0, *even, *odd]])  # [N', N]
    average = sums * (received * size)
    average = average / average.sum(-1, keepdim=True)
    new = average @ x
    if ahead:
        a = average @ a @ sums.mT  # rows averaged, columns summed; no second softmax
        new = new + attn.proj((a @ heads(block.norm1(new))[2]).transpose(0, 1).flatten(1))
        new = new + block.mlp(block.norm2(new))
    return new, sums @ size


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "behind"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_one_block_as_published(vit: nn.Module, r: int, bidirectional: bool, ahead: bool) -> None:
    small = slim(vit, MCTF(r=r, at=(1,), one_step_ahead=ahead, bidirectional=bidirectional))
    block = next(m for m in small.modules() if isinstance(m, PlainBlock) and len(m.reducers))
    x, size = torch.randn(2, 17, 48), torch.randint(1, 5, (2, 17, 1)).float()
    with torch.no_grad():
        out, sizes, _ = block(Tokens(x, size))
        expected = [as_published(block, *given, r, bidirectional, ahead) for given in zip(x, size[..., 0], strict=True)]
    torch.testing.assert_close(out, torch.stack([e for e, _ in expected]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sizes[..., 0], torch.stack([s for _, s in expected]))


def test_each_criterion_counts() -> None:
    """Of four equal pairs the one that is less informative, or smaller, is fused; by similarity alone they tie."""
    x = torch.eye(4).repeat_interleave(2, 0).repeat(1, 2)[None]
    received, size = torch.full((1, 8), 1 / 8), torch.ones(1, 8, 1)
    received[:, [4, 5]] = 1 / 40
    size[:, [0, 1, 4, 5, 6, 7]] = 3.0

    def best(**taus: float) -> list[int]:
        w = attraction(x, received, size, 0, **{**OFFICIAL, **taus})[0]
        torch.testing.assert_close(w.argmax(1), torch.arange(4))  # the twins, whatever else counts
        return [i for i, v in enumerate(w.diagonal()) if v >= w.diagonal().max() - 1e-6]

    assert best(tau_info=0.0, tau_size=0.0) == [0, 1, 2, 3]
    assert best(tau_size=0.0) == [2]
    assert best(tau_info=0.0) == [1]
    assert not torch.allclose(attraction(x, received, size, 0, 1.0, 0.0, 0.0), attraction(x, received, size, 0, 4.0, 0.0, 0.0))
    assert attraction(x, received, size, 0, 0.0, 20.0, 0.0)[0, 0, 0] == attraction(x, received, size, 0, 0.0, 20.0, 0.0)[0, 0, 1]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_matching_moves_both_ways_and_keeps_every_token(prefix: int, bidirectional: bool) -> None:
    n = prefix + 12
    first_even = prefix + prefix % 2
    scores = torch.rand(3, len(range(first_even, n, 2)), len(range(prefix + 1 - prefix % 2, n, 2)))
    pairs = bidirectional_matching(scores, 5, prefix, bidirectional)
    from_even = (pairs.moved % 2 == 0).sum(1)
    assert (from_even == (2 if bidirectional else 5)).all()
    assert (pairs.moved >= prefix).all() and (pairs.target >= prefix).all()
    assert torch.equal(torch.cat([pairs.kept, pairs.moved], 1).sort().values, torch.arange(n).expand(3, -1))
    x = torch.randn(3, n, 4)
    torch.testing.assert_close(pairs.merge(x).sum(1), x.sum(1))
    onto = torch.zeros(3, n - 5, 4).scatter_add_(1, pairs.into()[..., None].expand(-1, -1, 4), x)
    torch.testing.assert_close(pairs.merge(x), onto)


@pytest.mark.parametrize(
    "change", [{"tau_sim": 0.0}, {"tau_info": 0.0}, {"one_step_ahead": False}, {"bidirectional": False}], ids=str
)
def test_switches_change_the_answer(vit: nn.Module, images: Tensor, change: dict[str, Any]) -> None:
    with torch.no_grad():
        assert (slim(vit, MCTF(r=3))(images) - slim(vit, MCTF(r=3, **change))(images)).abs().max() > 1e-3


def test_sizes_count_where_there_are_any(vit: nn.Module, images: Tensor) -> None:
    """τ_size acts from the second fusion on, and attention counts a token as often as its patches."""
    one, two = (slim(vit, MCTF(r=5, at=at)) for at in ((1,), (1, 2)))
    with torch.no_grad():
        for small, same in ((one, True), (two, False)):
            other = copy.deepcopy(small)
            for m in reducers(other):
                m.taus = (1.0, 20.0, 1.0)
            assert torch.equal(small(images), other(images)) is same
        last, entered = [m for m in two.modules() if isinstance(m, PlainBlock)][3], []
        last.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
        two(images)
        assert (entered[0].size.sum(1) == 17).all() and entered[0].size.shape[1] == 10
        x = torch.randn(1, 10, 48)
        counted = last(Tokens(x, torch.arange(1.0, 11.0)[None, :, None]))
        assert not torch.allclose(counted, last(Tokens(x, torch.ones(1, 10, 1))))


@pytest.mark.parametrize(
    ("r", "n", "goes"),
    [
        (16, 197, 16),
        (0.35, 197, 68),
        (16, 21, 10),
        (100, 17, 7),
        (100, 197, 98),
        (3, 10, 0),
        (0.35, 10, 0),
        (0.35, 11, 3),
        (8, 5, 0),
    ],
)
def test_how_many_go(r: float, n: int, goes: int) -> None:
    """At most half of the patches, and, when counted, none of the last ten tokens."""
    assert FuseByCriteria(MCTF(r=r), prefix=1).number(n) == goes


def test_lengths_of_the_published_scripts(images: Tensor) -> None:
    assert lengths(slim(small_vit(depth=12), MCTF(r=2)), images) == [17, 15, 13, 11, *[10] * 8]
    model = small_vit(depth=4, global_pool="avg", class_token=False)
    assert lengths(slim(model, MCTF(r=0.35, at=(1, 2, 3))), images) == [16, 11, 8, 8]
    assert lengths(slim(small_vit(), MCTF(r=100)), images) == [17, 10, 10, 10]


def test_zero_is_the_identity(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        for r in (0, 0.0):
            torch.testing.assert_close(slim(vit, MCTF(r=r))(images), vit(images), atol=1e-5, rtol=1e-5)
        small = slim(vit, MCTF(r=3))
        for m in reducers(small):
            m.r = 0
        torch.testing.assert_close(small(images), vit(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [MCTF(r=3), MCTF(r=0.3, one_step_ahead=False)], ids=str)
@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_base_patch16_siglip_224", 0),
        ("beit", 1),
        ("eva", 1),
    ],
)
def test_prefix_tokens_and_grids(step: MCTF, name: str, prefix: int) -> None:
    patch = 14 if "dinov2" in name else 16
    kwargs: dict[str, Any] = {"img_size": (4 * patch, 6 * patch), "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
    model: Any
    if name == "beit":  # separate biases of q and v, layer scale as plain parameters
        model = timm.models.beit.Beit(**kwargs, use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=0.1).eval()
        nn.init.normal_(model.blocks[1].attn.q_bias)
        nn.init.normal_(model.blocks[1].attn.v_bias)
    elif name == "eva":  # three projections
        model = timm.models.eva.Eva(**kwargs, qkv_fused=False, use_rot_pos_emb=False).eval()
        assert model.blocks[0].attn.q_proj is not None
    else:
        model = timm.create_model(name, **kwargs, qk_norm=name == "vit_tiny_patch16_224").eval()
    x = torch.randn(1, 3, 4 * patch, 6 * patch)
    small = slim(model, step)
    with torch.no_grad(), traced(small) as trace:
        assert small(x).shape == (1, 5)
    assert len(trace) == 3
    for reduction in trace:
        assert torch.equal(reduction.into[0, :prefix], torch.arange(prefix))
        assert (reduction.into[0, prefix:] >= prefix).all()
        torch.testing.assert_close(reduction.matrix().sum(-1), torch.ones(1, reduction.tokens))
    with torch.no_grad():  # values and queries made apart are those made at once
        for m in reducers(small):
            m.r = 0
        torch.testing.assert_close(small(x), model(x), atol=1e-4, rtol=1e-4)


def test_survivors_and_rollout_are_drawn(vit: nn.Module, images: Tensor) -> None:
    small = slim(vit, MCTF(r=3))
    drawn = vt.see.survival(small, images)
    assert [len(set(places[0].flatten())) for _, places in drawn] == [13, 10, 9]
    assert (drawn[-1][1] >= 0).all()
    assert vt.see.rollout(small, images).shape == (6, 4, 4)


def test_quantizers_see_map_and_values(vit: nn.Module, images: Tensor) -> None:
    """What enters the product of the one-step-ahead map goes through `operands`, and quantizing it changes little."""
    small = slim(vit, [MCTF(r=3), RepQ(softmax=True)], images)
    block: Any = next(m for m in small.modules() if isinstance(m, PlainBlock) and len(m.reducers))
    seen: dict[str, tuple[int, ...]] = {}
    for name, operand in block.attn.operands.items():
        operand.register_forward_hook(lambda _, args, __, name=name: seen.update({name: tuple(args[0].shape)}))
    with torch.no_grad():
        out, exact = small(images), slim(vit, MCTF(r=3))(images)
    assert seen == {"q": (6, 3, 17, 16), "k": (6, 3, 17, 16), "v": (6, 3, 17, 16), "probs": (6, 3, 17, 17)}
    assert 0 < (out - exact).norm() < 0.5 * exact.norm()


def test_exports_with_any_batch(tmp_path: Path) -> None:
    small = slim(small_vit(depth=2), MCTF(r=1))  # one pair: nothing moves from even places
    x = torch.randn(5, 3, 32, 32)
    vt.ship(small, tmp_path / "m.onnx", example=x)
    run = vt.Runtime(tmp_path / "m.onnx")
    with torch.no_grad():
        for n in (1, 5):
            torch.testing.assert_close(run(x[:n]), small(x[:n]), atol=1e-4, rtol=1e-4)


def test_low_precision_and_compile(vit: nn.Module, images: Tensor) -> None:
    small = slim(vit, MCTF(r=3))
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.isfinite(copy.deepcopy(small).to(dtype)(images[:1].to(dtype))).all()
        compiled = torch.compile(small, backend="aot_eager")
        torch.testing.assert_close(compiled(images), small(images), atol=1e-4, rtol=1e-4)


def test_trains(vit: nn.Module, images: Tensor) -> None:
    small = slim(vit, MCTF(r=3)).train()
    small(images).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())
    qkv = small.blocks[1].attn.qkv.weight.grad
    assert (qkv.unflatten(0, (3, -1)).abs().sum((1, 2)) > 0).all(), "the map is lent on with its gradient"


def test_wrong_parameters(vit: nn.Module) -> None:
    with pytest.raises(VitreousError, match="whole number"):
        MCTF(r=1.5)
    with pytest.raises(VitreousError, match="whole number"):
        MCTF(r=-1)
    with pytest.raises(VitreousError, match="tau_info must be"):
        MCTF(tau_info=-1.0)
    with pytest.raises(VitreousError, match="there is no block 4"):
        slim(vit, MCTF(at=(4,)))
    with pytest.raises(VitreousError, match="already shortens"):
        slim(vit, [EViT(), MCTF()])
    with pytest.raises(VitreousError, match="already shortens"):
        slim(vit, [MCTF(), EViT()])
