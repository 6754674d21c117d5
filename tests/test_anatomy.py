"""Anatomy: what is found in each family, and whether a block is plain is found by trying."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
import vit_pytorch
from support import small_vit
from timm.layers import Attention
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

from vitreous.anatomy import Block as FoundBlock
from vitreous.anatomy import read, steady
from vitreous.anatomy import reading as anatomy
from vitreous.anatomy.parts import mix, plain_forward
from vitreous.errors import VitreousError

TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)

# family: (name, arguments, grid, prefix tokens, class token, pool, heads of the last block)
PLAIN: dict[str, tuple[str, dict[str, Any], tuple[int, int], int, bool, str]] = {
    "vit": ("vit_tiny_patch16_224", TINY, (4, 4), 1, True, "token"),
    "deit distilled": ("deit_tiny_distilled_patch16_224", TINY, (4, 4), 2, True, "token"),
    "deit3": ("deit3_small_patch16_224", TINY, (4, 4), 1, True, "token"),
    "dinov2": ("vit_small_patch14_dinov2", {**TINY, "img_size": 28, "patch_size": 14}, (2, 2), 1, True, "token"),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        {**TINY, "img_size": 28, "patch_size": 14},
        (2, 2),
        5,
        True,
        "token",
    ),
    "clip": ("vit_base_patch32_clip_224", TINY, (4, 4), 1, True, "token"),
    "siglip": ("vit_base_patch16_siglip_224", TINY, (4, 4), 0, False, "map"),
    "not square": ("vit_tiny_patch16_224", {**TINY, "img_size": (32, 48)}, (4, 6), 1, True, "token"),
}
# family: (name, arguments, grid, prefix tokens, blocks, why not plain)
OTHERS: dict[str, tuple[str, dict[str, Any], tuple[int, int] | None, int, int, str]] = {
    "cait": ("cait_xxs24_224", TINY, (4, 4), 0, 4, "TalkingHeadAttn computes something else"),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2)),
        (8, 8),
        0,
        2,
        "fixed grid or window",
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        dict(img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2)),
        (8, 8),
        0,
        2,
        "fixed grid or window",
    ),
    "pvt v2": (
        "pvt_v2_b0",
        dict(depths=(1, 1, 1, 1)),
        None,
        0,
        4,
        "does not run on a plain sequence",
    ),
    "maxvit": ("maxvit_rmlp_pico_rw_256", dict(img_size=64), None, 0, 22, "bias for each pair of places"),
    "mobilevit": ("mobilevit_xxs", {}, None, 0, 9, "grid of tokens changes between its stages"),
}


@pytest.mark.parametrize("family", PLAIN)
def test_plain_families(family: str) -> None:
    name, arguments, grid, prefix, class_token, pool = PLAIN[family]
    model = timm.create_model(name, num_classes=5, **arguments)
    found = read(model)
    assert (found.grid, found.prefix, found.class_token, found.pool) == (grid, prefix, class_token, pool)
    assert found.plain and all(b.plain and not b.why_not for b in found.blocks)
    assert [b.name for b in found.blocks] == ["blocks.0", "blocks.1"] and [b.index for b in found.blocks] == [0, 1]
    for b in found.blocks:
        assert (b.attention.name, b.attention.heads, b.attention.head_dim) == (f"{b.name}.attn", 2, 16)
        assert b.attention.scale == pytest.approx(0.25) and b.attention.projections == ("qkv",)
        assert b.attention.proj == "proj" and b.attention.position == "absolute" and b.mlp == "mlp"
        assert b.norms[:2] == ("norm1", "norm2") and b.layer_scale == (family in ("deit3", "dinov2", "registers"))
    assert found.width == 32 and len(found.stages) == 2 and found.classifier in ("head", "head_dist")
    assert len(found.other_attention) == (family == "siglip")
    found.require_plain("a step")
    # The tokens really are prefix then grid.
    tokens: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    size = arguments["img_size"]
    model.eval()(torch.randn(1, 3, *(size if isinstance(size, tuple) else (size, size))))
    assert tokens[0].shape[1] == prefix + grid[0] * grid[1]


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_read_and_say_why_not(family: str) -> None:
    name, arguments, grid, prefix, blocks, why = OTHERS[family]
    found = read(timm.create_model(name, num_classes=5, **arguments))
    assert (found.grid, found.prefix, len(found.blocks)) == (grid, prefix, blocks)
    assert not found.plain and not any(b.plain for b in found.blocks)
    assert why in found.blocks[0].why_not, found.blocks[0].why_not
    assert all(b.attention.heads for b in found.blocks)
    assert found.blocks[0].name in str(found) and "not plain" in str(found)
    with pytest.raises(VitreousError, match=found.blocks[0].name):
        found.require_plain("tokens.EViT")
    if family in ("swin", "swinv2", "pvt v2", "maxvit"):
        reductions = [s.reduction for s in found.stages if s.blocks]
        assert sorted(reductions) == reductions and len(set(reductions)) == len(reductions) > 1
        assert sum(len(s.blocks) for s in found.stages) == blocks


def test_a_model_without_attention_says_so() -> None:
    found = read(timm.create_model("resnet18", num_classes=5))
    assert not found.blocks and not found.attention and not found.plain
    assert "no attention" in str(found) and found.classifier == "fc"
    assert [s.reduction for s in found.stages] == [2, 4, 8, 16, 32]
    with pytest.raises(VitreousError, match="ResNet has none"):
        found.require_plain("tokens.EViT")


def test_torchvision() -> None:
    model = torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
    found = read(model)
    assert (found.grid, found.prefix, found.class_token, found.width) == ((4, 4), 1, True, 32)
    assert [b.attention.heads for b in found.blocks] == [2, 2] and found.blocks[0].attention.projections == ("in_proj_weight",)
    assert found.plain and found.classifier == "heads.head"


def test_hugging_face() -> None:
    config = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
    found = read(transformers.ViTModel(transformers.ViTConfig(**config)))
    assert (found.grid, found.prefix, found.class_token, len(found.blocks)) == ((4, 4), 1, True, 2)
    found = read(transformers.DeiTModel(transformers.DeiTConfig(**config)))
    assert (found.grid, found.prefix, found.class_token) == ((4, 4), 2, True)


def test_naflex_counts_its_registers_though_its_grid_is_free() -> None:
    found = read(timm.create_model("naflexvit_base_patch16_gap", num_classes=5, embed_dim=32, depth=2, num_heads=2))
    assert found.grid is None and found.prefix == 4 and not found.class_token


# ---- plain or not, by trying


def verdict(block: nn.Module, scale: float | None = None) -> FoundBlock:
    """What `read` says of a block, its weights drawn large and its layer scale set."""
    model = nn.Module()
    model.add_module("blocks", nn.ModuleList([block]))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
        elif scale is not None and ("gamma" in name or name.endswith(".ls")):
            nn.init.constant_(p, scale)
    (found,) = read(model).blocks
    return found


class Parallel(nn.Module):
    """Everything a plain block has, under the same names, but the MLP reads what attention reads."""

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, 2, qkv_bias=True), nn.Sequential(nn.Linear(dim, dim), nn.GELU())
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), scale)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma_1 * self.attn(self.norm1(x)) + self.gamma_2 * self.mlp(self.norm2(x))


class Sequential(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class Swapped(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_2 * self.mlp(self.norm2(x))
        return x + self.gamma_1 * self.attn(self.norm1(x))


class PostNorm(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.norm1(self.attn(x))
        return x + self.gamma_2 * self.norm2(self.mlp(x))


class SharpAttention(Attention):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT * 1.1 * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-5])
def test_order_and_norms_are_told_apart_however_small_the_layer_scale(scale: float) -> None:
    assert verdict(Sequential(32, scale)).plain
    for kind in (Parallel, Swapped, PostNorm):
        found = verdict(kind(32, scale))
        assert not found.plain and "computes something else" in found.why_not, kind


@pytest.mark.parametrize("scale", [None, 1e-5])
def test_timm_blocks(scale: float | None) -> None:
    assert verdict(Block(32, 2, qkv_bias=True, init_values=scale), scale).plain
    post = verdict(ResPostBlock(32, 2, qkv_bias=True, init_values=scale))
    assert not post.plain and "computes something else" in post.why_not
    things = nn.ModuleDict({"norm": nn.LayerNorm(32), "b": ParallelThingsBlock(32, 2)})
    assert not any(b.plain for b in read(things).blocks)
    assert not any(b.plain for b in read(nn.ModuleList([ParallelScalingBlock(32, 2)])).blocks)


def test_a_subtly_different_attention_is_not_plain() -> None:
    block = Block(32, 2, qkv_bias=True)
    block.attn = SharpAttention(32, 2, qkv_bias=True)
    found = verdict(block)
    assert not found.plain and "SharpAttention" in found.why_not


@pytest.mark.parametrize(
    "extra",
    [
        dict(qk_norm=True),
        dict(scale_attn_norm=True),
        dict(init_values=1e-5),
        dict(proj_bias=False),
        dict(class_token=False, global_pool="avg"),
    ],
)
def test_variants_that_are_plain(extra: dict[str, Any]) -> None:
    model = small_vit(depth=1, **extra)
    assert read(model).plain, str(read(model))
    x = torch.randn(2, 5, 48)
    block = model.blocks[0]
    with torch.no_grad():
        torch.testing.assert_close(plain_forward(block, x), block(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mix(block.attn, x), block.attn(x), atol=1e-5, rtol=1e-5)


def test_separate_projections_are_plain() -> None:
    found = read(timm.create_model("vit_tiny_patch16_224", **TINY, qkv_bias=False))
    assert found.plain
    eva = timm.create_model("eva02_base_patch14_224", img_size=28, embed_dim=32, depth=1, num_heads=2, use_rot_pos_emb=False)
    assert read(eva).blocks[0].attention.projections == ("q_proj", "k_proj", "v_proj")


def test_half_precision_is_read(images: Tensor) -> None:
    assert read(small_vit(depth=1).bfloat16()).plain


def test_reading_leaves_the_model_as_it_was() -> None:
    model = small_vit(depth=2).train()
    model.blocks[0].attn.eval()
    modes = [m.training for m in model.modules()]
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    read(model)
    assert [m.training for m in model.modules()] == modes and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_slimmed_model_still_reads_as_plain(images: Tensor) -> None:
    from vitreous.quant import RepQ
    from vitreous.steps import slim
    from vitreous.tokens import EViT, ToMe

    for steps in ([EViT(keep=0.5)], [ToMe(r=2)], [RepQ()], [EViT(keep=0.5), RepQ()]):
        small = slim(small_vit(depth=2), steps, images)
        found = read(small)
        assert found.plain and found.grid == (4, 4) and found.prefix == 1, str(found)


class TestReadOnce:
    """Blocks are tried only when something of the model is another than the last time."""

    @pytest.fixture
    def tried(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        tried: list[str] = []
        real = anatomy._why_not_plain

        def count(block: nn.Module, part: anatomy.AttentionPart, module: nn.Module) -> tuple[str, bool]:
            tried.append(part.name)
            return real(block, part, module)

        monkeypatch.setattr(anatomy, "_why_not_plain", count)
        return tried

    def test_an_unchanged_model_is_tried_once(self, tried: list[str]) -> None:
        model = small_vit(depth=2)
        first = read(model)
        model(torch.randn(1, 3, 32, 32))
        assert read(model.train()) is first and len(tried) == 2 and read(small_vit(depth=2)) == first and len(tried) == 4

    @pytest.mark.parametrize("change", ["block", "attribute", "forward", "weight", "tuple"])
    def test_a_changed_one_again(self, tried: list[str], change: str) -> None:
        model = small_vit(depth=2)
        before = read(model)
        block = model.blocks[1]
        if change == "block":
            model.blocks[1] = ResPostBlock(48, 3)
        elif change == "attribute":
            block.attn.scale = 0.5
        elif change == "forward":
            block.forward = lambda x: 2 * x
        elif change == "weight":
            nn.init.zeros_(block.attn.qkv.weight)
        else:
            model.patch_embed.grid_size = (2, 8)
        after = read(model)
        assert len(tried) == 4
        assert after.blocks[1].plain == (change in ("weight", "tuple"))  # timm's fused attention has a scale of its own
        assert (after.blocks[1].attention.scale == 0.5) == (change == "attribute")
        assert (after.grid == (2, 8)) == (change == "tuple")
        assert before.blocks[1].plain

    def test_models_are_not_kept_alive(self) -> None:
        model = small_vit(depth=1)
        model.blocks[0].hold = model.forward  # a bound method, which holds the model
        read(model)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None


EINOPS: Any = dict(image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, dim_head=16, mlp_dim=64)


@pytest.mark.parametrize(
    ("make", "inside"),
    [(lambda: small_vit(depth=2), "blocks.0.norm1"), (lambda: vit_pytorch.ViT(**EINOPS).eval(), "to_patch_embedding")],
)
def test_another_thread_runs_the_model_while_it_is_read(make: Callable[[], nn.Module], inside: str) -> None:
    """Neither takes what the other computes for its own, nor is stopped by it."""
    model, x, answers = make(), torch.randn(1, 3, 32, 32), []
    right = model(x)

    def meanwhile(module: nn.Module, given: Any) -> None:
        handle.remove()
        with ThreadPoolExecutor(1) as other:
            answers.append(other.submit(model, x).result())

    handle = model.get_submodule(inside).register_forward_pre_hook(meanwhile)
    found = read(model)
    found.require_plain("reading")
    assert found.grid == (4, 4) and len(answers) == 1
    torch.testing.assert_close(answers[0], right)


def test_a_model_that_learns_is_read_once() -> None:
    model = small_vit()
    with steady():
        first = read(model)
        with torch.no_grad():
            model.get_parameter("blocks.0.norm1.weight").mul_(2)
        assert read(model) is first
    assert read(model) is not first
    model.set_submodule("blocks", nn.Sequential(model.get_submodule("blocks.0")))
    with steady():  # what was read outside counts only while it holds
        assert len(read(model).blocks) == 1
