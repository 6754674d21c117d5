"""The glass: it sees the attention of every family, changes nothing unless told to, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from support import small_vit
from timm.models.gcvit import GlobalContextVit
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitreous.anatomy.parts import emit
from vitreous.errors import VitreousError
from vitreous.glass import glass

TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
SAME = dict(atol=1e-5, rtol=1e-5)


def named(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **kwargs)


# name: (how to make it, image size, number of attention maps in one run)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "vit": (named("vit_tiny_patch16_224", **TINY), 32, 2),
    "deit distilled": (named("deit_tiny_distilled_patch16_224", **TINY), 32, 2),
    "deit3": (named("deit3_small_patch16_224", **TINY), 32, 2),
    "dinov2 registers": (
        named("vit_small_patch14_reg4_dinov2", img_size=28, embed_dim=32, depth=2, num_heads=2),
        28,
        2,
    ),
    "clip": (named("vit_base_patch32_clip_224", **TINY), 32, 2),
    "siglip": (named("vit_base_patch16_siglip_224", **TINY), 32, 3),
    "relative positions": (named("vit_relpos_small_patch16_224", **TINY), 32, 2),
    "beit": (named("beit_base_patch16_224", **TINY), 32, 2),
    "eva02": (named("eva02_tiny_patch14_224", **{**TINY, "img_size": 28, "patch_size": 14}), 28, 2),
    "rope": (named("vit_medium_patch16_rope_reg1_gap_256", **TINY), 32, 2),
    "cait": (named("cait_xxs24_224", **TINY), 32, 4),
    "convit": (named("convit_tiny", **{**TINY, "embed_dim": 16}, local_up_to_layer=1), 32, 3),  # GPSA has two softmaxes
    "tnt": (named("tnt_s_legacy_patch16_224", img_size=32, depth=1), 32, 2),
    "xcit": (named("xcit_nano_12_p16_224", depth=1), 32, 3),
    "swin": (
        named("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(1, 2)),
        32,
        3,
    ),
    "swinv2": (
        named("swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(1, 2)),
        32,
        3,
    ),
    "pvt v2": (named("pvt_v2_b0", depths=(1, 1, 1, 1)), 64, 4),
    "maxvit": (named("maxvit_rmlp_pico_rw_256", img_size=64), 64, 22),
    "volo": (
        lambda: VOLO([1, 1, 1, 1], 32, 3, 5, embed_dims=[32, 64, 64, 64], num_heads=[1, 2, 2, 2], post_layers=("ca",)),
        32,
        5,
    ),
    "crossvit": (named("crossvit_9_240", depth=([1, 1, 0],), img_size=240), 240, 4),
    "davit": (
        named("davit_tiny", depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), num_heads=(1, 2, 2, 2)),
        64,
        8,
    ),
    "gcvit": (
        lambda: GlobalContextVit(
            img_size=64,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 2),
            embed_dim=16,
            num_classes=5,
            window_size=(4, 4, 4, 2),
        ),
        64,
        4,
    ),
    "next-vit": (named("nextvit_small"), 64, 4),
    "tiny-vit": (named("tiny_vit_5m_224", depths=(1, 1, 1, 1)), 64, 3),
    "levit": (named("levit_128s"), 224, 11),
    "halonet": (named("halonet26t"), 256, 3),
    "caformer": (named("caformer_s18"), 64, 12),
    "twins": (named("twins_svt_small", depths=[1, 1, 1, 1]), 64, 4),
    "hiera": (named("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1)), 64, 4),
    "fastvit": (named("fastvit_sa12"), 64, 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_seen_and_not_changed(family: str) -> None:
    make, size, maps = FAMILIES[family]
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.trunc_normal_(p, std=0.05)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        before = model(x)
        with glass(model) as g:
            during = model(x)
        assert torch.equal(model(x), before)
    assert before.abs().max() > 0
    assert (during - before).abs().max() <= 1e-5 * before.abs().max()
    assert len(g.attention) == maps
    for a in g.attention:
        assert (a >= 0).all()
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a.sum(-1)), **SAME)


@pytest.fixture
def tv() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
    nn.init.normal_(model.heads.head.weight, std=0.2)
    return model.eval()


def test_torchvision(tv: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        before = tv(images)
        with glass(tv, record=("attention", "q", "k", "v", "output", "block")) as g:
            torch.testing.assert_close(tv(images), before, **SAME)
    assert before.std() > 0.1
    assert [tuple(a.shape) for a in g.attention] == [(6, 2, 17, 17)] * 2
    view, attn = g[0], tv.get_submodule(g.names[0])
    assert view.q is not None and view.k is not None and view.v is not None and view.attention is not None
    torch.testing.assert_close((view.q @ view.k.mT / 4).softmax(-1), view.attention, **SAME)
    mixed = attn.out_proj((view.attention @ view.v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, view.output, **SAME)
    assert view.block is not None and view.block.shape == (6, 17, 32)


def test_torchvision_interventions(tv: nn.Module, images: Tensor) -> None:
    attn = tv.get_submodule(glass(tv).names[1])
    bias = torch.randn(6, 2, 17, 17)
    with torch.no_grad():
        before = tv(images)
        with glass(tv, record=()) as g:
            g.mask_heads(1, 0)
            masked = tv(images)
        with glass(tv) as b:
            b.add_bias(1, bias)
            tv(images)
        with glass(tv, record=("q", "k")) as free:
            tv(images)
        attn.out_proj.weight[:, :16] = 0
        torch.testing.assert_close(masked, tv(images), **SAME)
    assert not torch.allclose(masked, before, atol=1e-3)
    q, k = free[1].q, free[1].k
    assert q is not None and k is not None
    torch.testing.assert_close(b.attention[1], (q @ k.mT / 4 + bias).softmax(-1), **SAME)
    with glass(tv) as g, pytest.raises(VitreousError, match=r"attention of \[6, 2, 17, 17\]"):
        g.patch(0, "attention", torch.zeros(1))
        tv(images)
    with torch.no_grad(), glass(tv) as g:
        g.patch(1, "attention", lambda a: a.flip(-1))
        assert not torch.allclose(tv(images), before, atol=1e-4)


MULTI_HEAD: dict[str, dict[str, Any]] = {
    "plain": {},
    "other keys and values": dict(kdim=12, vdim=20),
    "no bias": dict(bias=False, kdim=12),
    "bias of keys and values": dict(add_bias_kv=True),
    "zero key": dict(add_zero_attn=True, kdim=12),
    "all": dict(kdim=12, vdim=20, add_bias_kv=True, add_zero_attn=True, batch_first=False),
}


@pytest.mark.parametrize("kind", MULTI_HEAD)
def test_multi_head_attention_of_every_kind(kind: str) -> None:
    options = {"batch_first": True, **MULTI_HEAD[kind]}
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(16, 4, **options)
    for p in attn.parameters():
        nn.init.normal_(p, std=0.5)
    model = nn.Sequential()
    model.attn = attn
    shapes = ((3, 5, 16), (3, 7, options.get("kdim", 16)), (3, 7, options.get("vdim", 16)))
    given = [torch.randn(s) if options["batch_first"] else torch.randn(s).transpose(0, 1) for s in shapes]
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    hidden[1, :3] = True
    how = dict(key_padding_mask=hidden, attn_mask=torch.randn(5, 7).tril(), average_attn_weights=False)
    with torch.no_grad():
        out, probs = attn(*given, **how)
        with glass(model, record=("attention", "q", "v")) as g:
            seen, told = attn(*given, **how)
        torch.testing.assert_close((seen, told), (out, probs), **SAME)
        torch.testing.assert_close(g.attention[0], probs, **SAME)
        assert g[0].v is not None and g[0].v.shape[:2] == (3, 4)
        with glass(model, record=()) as g:
            g.mask_heads(0, [1])
            masked, _ = attn(*given, **how)
        attn.out_proj.weight[:, 4:8] = 0
        torch.testing.assert_close(masked, attn(*given, **how)[0], **SAME)


def test_hugging_face(images: Tensor) -> None:
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = transformers.ViTModel(transformers.ViTConfig(**shape, image_size=32, patch_size=8)).eval()
    with torch.no_grad():
        before = model(images).last_hidden_state
        with glass(model, record=("attention", "q", "output", "block")) as g:
            torch.testing.assert_close(model(images).last_hidden_state, before, **SAME)
        with glass(model, record=()) as changed:
            changed.mask_heads(0, 1)
            assert not torch.allclose(model(images).last_hidden_state, before, atol=1e-5)
    assert [tuple(a.shape) for a in g.attention] == [(6, 2, 17, 17)] * 2
    for view in g.views:
        assert None not in (view.q, view.output, view.block)


# ---- recording


@pytest.mark.parametrize("fused", [True, False])
def test_parts_recompose_to_what_the_layer_gave(images: Tensor, fused: bool) -> None:
    model = small_vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad(), glass(model, record=("attention", "q", "k", "v", "output", "block")) as g:
        model(images)
    assert len(g.views) == 4
    for i, view in enumerate(g.views):
        attn = model.get_submodule(g.names[i])
        assert view.q is not None and view.k is not None and view.v is not None
        assert view.attention is not None and view.output is not None and view.block is not None
        scale = attn.scale if fused else 1.0  # without the fused kernel timm scales the queries first
        torch.testing.assert_close((view.q @ view.k.mT * scale).softmax(-1), view.attention, **SAME)
        with torch.no_grad():
            torch.testing.assert_close(emit(attn, view.attention @ view.v, images), view.output, **SAME)
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.norm(g.views[-1].block)[:, 0]), model(images), **SAME)


def fused_kernels(model: nn.Module, x: Tensor) -> int:
    """How many fused attention kernels really run."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    return sum(e.count for e in profile.key_averages() if e.key == "aten::scaled_dot_product_attention")


def test_only_the_chosen_layers_are_seen_and_the_fused_kernel_runs_in_the_others(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad(), glass(vit, layers=[1, "blocks.3.attn"]) as g:
        vit(images)
    assert [v.name for v in g.views] == ["blocks.1.attn", "blocks.3.attn"]
    assert fused_kernels(vit, images) == 4
    for layers, record, expected in [(None, ("attention",), 0), ([-1], ("attention",), 3), (None, ("q", "output"), 4)]:
        with glass(vit, record=record, layers=layers):
            assert fused_kernels(vit, images) == expected
    with glass(vit, record=()) as g:
        g.mask_heads(2, 0)
        assert fused_kernels(vit, images) == 3


def test_layers_recorded_without_attention_give_bit_equal_outputs(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad(), glass(vit, record=("q", "k", "v", "output", "block")):
        seen = vit(images)
    with torch.no_grad():
        assert torch.equal(seen, vit(images))


def test_reductions_keep_less(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        with glass(vit) as whole:
            vit(images)
        for reduce, expected in [
            ("mean", lambda a: a.mean(1)),
            ("class", lambda a: a[:, :, 0]),
            (lambda a: a.amax(1), lambda a: a.amax(1)),
        ]:
            with glass(vit, reduce=reduce) as g:
                vit(images)
            for a, b in zip(g.attention, whole.attention, strict=True):
                torch.testing.assert_close(a, expected(b))


def test_gradients_of_the_probabilities(images: Tensor) -> None:
    model, images = small_vit(depth=2).double(), images.double()
    with glass(model, grad=True) as g:
        model(images)[:, 3].sum().backward()
    assert [tuple(d.shape) for d in g.gradients] == [(6, 3, 17, 17)] * 2
    # A small step along one probability changes the score as its gradient says.
    step = torch.zeros(6, 3, 17, 17)
    step[2, 1, 0, 5] = 1e-6
    with torch.no_grad():
        base = model(images)[:, 3].sum()
        with glass(model, record=()) as h:
            h.patch(0, "attention", lambda a: a + step)
            moved = model(images)[:, 3].sum()
    assert float((moved - base) / 1e-6) == pytest.approx(float(g.gradients[0][2, 1, 0, 5]), rel=1e-3)


def test_without_grad_what_is_kept_holds_no_graph(vit: nn.Module, images: Tensor) -> None:
    with glass(vit) as g:
        vit(images)
    assert not any(a.requires_grad for a in g.attention)
    with pytest.raises(VitreousError, match="grad=True"):
        _ = g.gradients


def test_calls_add_up_until_cleared_and_the_last_view_is_found(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad(), glass(vit) as g:
        vit(images)
        vit(images[:2])
        assert len(g.attention) == 8 and g["blocks.2.attn"].attention.shape[0] == 2
        g.clear()
        vit(images[:1])
    assert [len(a) for a in g.attention] == [1] * 4


# ---- interventions


def silenced(model: nn.Module, layer: int, heads: list[int]) -> Iterator[None]:
    """The same by other means: these heads' slice of the projection's input set to zero."""
    attn: Any = model.get_submodule(f"blocks.{layer}.attn")

    def zero(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        x = args[0].unflatten(-1, (attn.num_heads, -1)).clone()
        x[..., heads, :] = 0
        return x.flatten(-2)

    handle = attn.proj.register_forward_pre_hook(zero)
    yield
    handle.remove()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("heads", [1, [0, 2]])
def test_a_masked_head_gives_nothing(images: Tensor, fused: bool, heads: int | list[int]) -> None:
    model = small_vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad():
        with glass(model, record=()) as g:
            g.mask_heads(2, heads)
            ours = model(images)
        for _ in silenced(model, 2, [heads] if isinstance(heads, int) else heads):
            torch.testing.assert_close(ours, model(images), **SAME)
        assert not torch.allclose(ours, model(images), atol=1e-3)


def test_a_head_factor_scales(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        before = vit(images)
        with glass(vit, record=()) as g:
            g.mask_heads(0, [0, 1, 2], factor=1.0)
            torch.testing.assert_close(vit(images), before, **SAME)
            g.mask_heads(1, 0, factor=0.5)
            half = vit(images)
        with glass(vit, record=()) as g:
            g.mask_heads(1, 0, factor=0.25).mask_heads(1, 0, factor=0.5)  # the last one holds
            torch.testing.assert_close(vit(images), half, **SAME)
    assert not torch.allclose(half, before, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_cut_edges_carry_nothing_and_the_rest_stays_normalised(images: Tensor, fused: bool) -> None:
    model = small_vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    edges = torch.zeros(17, 17, dtype=torch.bool)
    edges[0, 5:] = True
    edges[3] = True  # a query with no edge left attends nowhere, and is not NaN
    with torch.no_grad():
        with glass(model) as free:
            model(images)
        with glass(model) as g:
            g.cut(0, edges)
            out = model(images)
    assert torch.isfinite(out).all()
    expected = free.attention[0].masked_fill(edges, 0)
    expected = expected / expected.sum(-1, keepdim=True).clamp_min(1e-9)
    torch.testing.assert_close(g.attention[0], expected, **SAME)


def test_bias_adds_to_the_scaled_scores(vit: nn.Module, images: Tensor) -> None:
    bias = torch.randn(3, 17, 17)
    with torch.no_grad():
        with glass(vit) as free:
            vit(images)
        with glass(vit) as g:
            g.add_bias(0, bias)
            vit(images)
    torch.testing.assert_close(g.attention[0], (free.attention[0].log() + bias).softmax(-1), **SAME)


@pytest.mark.parametrize("what", ["attention", "output", "block"])
def test_patched_activations_bring_another_image_in(vit: nn.Module, images: Tensor, what: str) -> None:
    with torch.no_grad():
        with glass(vit, record=("attention", "output", "block")) as donor:
            vit(images[:1])
        with glass(vit, record=(what,)) as g:
            g.patch(1, what, getattr(donor[1], what))
            out = vit(images[1:2])
        assert torch.equal(getattr(g[1], what), getattr(donor[1], what))
        own, other = vit(images[1:2]), vit(images[:1])
    assert not torch.allclose(out, own, atol=1e-4)
    # All later layers see only the donor's block output; the other two leave the image's own stream in.
    assert torch.allclose(out, other, atol=1e-5) == (what == "block")


def test_a_patch_may_be_a_function(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad(), glass(vit, record=("output",)) as g:
        g.patch(3, "output", lambda y: y * 0).patch(3, "output", lambda y: y + 1)
        vit(images)
    assert g[3].output is not None and (g[3].output == 1).all()


# ---- errors, and what stays behind


def test_errors_name_what_there_is(vit: nn.Module, images: Tensor) -> None:
    for ask, match in [
        (lambda: glass(vit, record=("attn",)), "attention, q, k, v, output, block"),
        (lambda: glass(vit, reduce="max"), "mean, class"),
        (lambda: glass(vit, layers=[4]), "4 attention layers"),
        (lambda: glass(vit, layers=["blocks.1.atn"]), "did you mean blocks.1.attn"),
        (lambda: glass(vit).mask_heads(9, 0), "no layer 9"),
        (lambda: glass(vit).patch(0, "q", images), "attention, output or block"),
        (lambda: glass(vit)[0], "not recorded"),
        (lambda: glass(vit, grad=True, reduce="mean"), "not both"),
    ]:
        with pytest.raises(VitreousError, match=match):
            ask()
    with pytest.raises(VitreousError, match="heads 0 to 2"), glass(vit) as g:
        g.mask_heads(0, 3)
        vit(images)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_left_on_the_model(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        before, found = vit(images), hooks(vit)
        with glass(vit, record=("attention", "q", "output", "block")) as g:
            g.mask_heads(0, 0).cut(1, torch.ones(17, 17).triu(1).bool()).patch(2, "block", lambda y: y + 1)
            assert hooks(vit) > found
            assert not torch.equal(vit(images), before)
        assert hooks(vit) == found
        assert torch.equal(vit(images), before)
    seen = len(g.views)
    with torch.no_grad():
        vit(images)
    assert len(g.views) == seen


def test_an_error_inside_the_model_leaves_the_glass_usable(vit: nn.Module, images: Tensor) -> None:
    found = hooks(vit)
    with torch.no_grad(), glass(vit) as g:
        g.patch(1, "output", lambda y: y[:, :3])
        with pytest.raises(VitreousError, match=r"output of \[6, 17, 48\]: \[6, 3, 48\]"):
            vit(images)
        assert not g._running
    assert hooks(vit) == found
    with pytest.raises(ZeroDivisionError), glass(vit) as g:
        raise ZeroDivisionError
    with torch.no_grad(), g:
        vit(images)
    assert len(g.attention) == 4 and hooks(vit) == found


# ---- whom it concerns


def test_another_thread_is_not_changed(images: Tensor) -> None:
    """What a glass changes and records is what its own thread runs, whatever others run on the same model meanwhile."""
    model = small_vit()
    with torch.no_grad():
        plain = model(images)

    def runs(times: int, change: Any) -> list[Tensor]:
        with torch.no_grad():
            if change is None:
                return [model(images) for _ in range(times)]
            found = []
            with glass(model, record=("attention", "block")) as g:
                change(g)
                for i in range(times):
                    g.clear()
                    found.append(model(images))
                    assert len(g.attention) == len(g.names) == sum(v.block is not None for v in g.views), i
            return found

    changes = {
        "plain": None,
        "patch": lambda g: g.patch(1, "block", lambda x: -x),
        "mask": lambda g: g.mask_heads(0, 1),
    }
    right = {name: runs(1, change)[0] for name, change in changes.items()}
    assert not any(torch.allclose(right[name], plain, atol=1e-3) for name in ("patch", "mask"))
    with ThreadPoolExecutor(3) as pool:
        futures = {name: pool.submit(runs, 20, change) for name, change in changes.items()}
        for name, future in futures.items():
            for out in future.result():
                torch.testing.assert_close(out, right[name], **SAME)
    assert not any(m._forward_hooks for m in model.modules())


def test_tasks_of_one_thread(images: Tensor) -> None:
    model = small_vit()

    async def meet() -> tuple[Tensor, str]:
        opened, closed = asyncio.Event(), asyncio.Event()

        async def look() -> None:
            with glass(model, record=()) as g:
                g.patch(0, "output", torch.zeros_like)
                g.mask_heads(1, 0)
                opened.set()
                await closed.wait()

        looking = asyncio.create_task(look())
        await opened.wait()
        try:
            with torch.no_grad(), pytest.raises(VitreousError) as refused, glass(model):
                pass
            with torch.no_grad():
                return model(images), str(refused.value)
        finally:
            closed.set()
            await looking

    with torch.no_grad():
        out, reason = asyncio.run(meet())
        torch.testing.assert_close(out, model(images), **SAME)
    assert "another task" in reason
    with glass(model):  # nothing is left open
        pass


def test_closed_out_of_order(images: Tensor) -> None:
    model = small_vit()
    first, second = glass(model), glass(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with torch.no_grad():
        model(images)
    second.__exit__(None, None, None)
    assert not first.views and len(second.attention) == 4
    with torch.no_grad():
        model(images)
    assert len(second.attention) == 4
    with glass(model) as again, pytest.raises(VitreousError, match="open already"):
        again.__enter__()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_seen_once(images: Tensor, reentrant: bool) -> None:
    model: Any = small_vit()

    def forward(x: Tensor) -> Tensor:
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.forward_head(model.norm(x))

    def gradient(run: Any) -> Tensor:
        x = images.clone().requires_grad_()
        with glass(model, record=("attention", "block")) as g:
            g.mask_heads(0, 1)
            run(x).square().sum().backward()
        assert len(g.attention) == 4 == len(g.views)
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(gradient(forward), gradient(model), **SAME)


def test_a_compiled_model_runs_as_it_is_written(images: Tensor) -> None:
    model = torch.compile(small_vit(), backend="eager")
    with torch.no_grad(), glass(model) as g:
        model(images)
    assert len(g.attention) == 4
