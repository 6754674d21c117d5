"""Models from where people have them: what is found in each, and that what works on plain blocks works on them, unpatched."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, Family, OwnViT, drawn, hugging_face, timm_model
from support import small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous import VitreousError, read, slim
from vitreous.blocks import PlainBlock, Tokens
from vitreous.outputs import answer
from vitreous.prune import Heads
from vitreous.quant import Auto, RepQ
from vitreous.quant.layers import QuantLinear
from vitreous.steps import Step
from vitreous.tokens import MCTF, EViT, RandomChoice, SemanticTokens, Sparsifiner, TokenSlimming, ToMe, UniformPooling

EVERY = pytest.mark.parametrize("name", FAMILIES)
SHORTER: list[Step] = [EViT(keep=0.5), ToMe(r=2), MCTF(r=2), RandomChoice(0.5), UniformPooling(), TokenSlimming(), Sparsifiner()]
SHORTER.append(SemanticTokens(tokens=4, at=0))
NOTHING: list[Step] = [EViT(keep=1.0), ToMe(r=0), MCTF(r=0), RandomChoice(1.0), UniformPooling(at=()), TokenSlimming(keep=1.0)]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random images are not what these models were made for
        yield


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def answered(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return answer(model(x))


def entering(model: nn.Module, x: Tensor) -> list[int]:
    """How many tokens enter each block."""
    seen: list[int] = []
    blocks = [m for m in model.modules() if isinstance(m, PlainBlock)]
    handles = [b.register_forward_pre_hook(lambda _, given: seen.append(Tokens.of(given[0]).x.shape[1])) for b in blocks]
    answered(model, x)
    for handle in handles:
        handle.remove()
    return seen


@EVERY
def test_what_is_found(name: str, x: Tensor) -> None:
    family: Family = FAMILIES[name]
    model = family.make()
    found = read(model)
    assert found.plain, str(found)
    assert (found.grid, found.prefix, found.classifier, found.width) == ((4, 4), family.prefix, family.classifier, 48)
    assert len(found.blocks) == 3 and all(b.attention.position == family.position for b in found.blocks)
    assert found.class_token == (family.prefix > 0)
    assert all(isinstance(model.get_submodule(b.name), nn.Module) for b in found.blocks)


@EVERY
def test_token_steps(name: str, x: Tensor) -> None:
    model = FAMILIES[name].make()
    before = answered(model, x)
    for step in NOTHING:
        torch.testing.assert_close(answered(slim(model, step), x), before, atol=1e-5, rtol=1e-5, msg=str(step))
    prefix = FAMILIES[name].prefix
    whole = prefix + 16
    for step in SHORTER:
        small = slim(model, step)
        after = answered(small, x)
        assert after.shape == before.shape and torch.isfinite(after).all() and not torch.allclose(after, before, rtol=1e-3), step
        if isinstance(step, ToMe):
            assert entering(small, x) == [whole, whole - 2, whole - 4]


@EVERY
def test_heads_quantizers_and_files(name: str, x: Tensor, tmp_path: Path) -> None:
    model = FAMILIES[name].make()
    before = answered(model, x)
    for steps in ([Auto()], [EViT(keep=0.5), Heads(share=0.3), RepQ()]):
        small = slim(model, cast(list[Step], steps), x)
        after = answered(small, x)
        layers = [m for b in small.modules() if isinstance(b, PlainBlock) for m in b.modules() if isinstance(m, nn.Linear)]
        assert len(layers) >= 3 * 4 and all(isinstance(m, QuantLinear) for m in layers), "all layers of the blocks"
        if len(steps) == 1:
            assert (after - before).norm() < 0.06 * before.norm(), steps
        else:
            assert sum(cast(Any, m.attn).num_heads for m in small.modules() if isinstance(m, PlainBlock)) == 7
            vt.save(small, tmp_path / "m.safetensors")
            again = vt.load(tmp_path / "m.safetensors", FAMILIES[name].make())
            assert torch.equal(answered(again, x), after)


def test_removed_heads_are_those_that_gave_nothing(x: Tensor) -> None:
    """Also where every head has angles or a bias of its own."""
    for make in (FAMILIES["timm RoPE-ViT, mixed"].make, FAMILIES["timm BEiT, shared"].make, FAMILIES["torchvision"].make):
        model = slim(make(), ToMe(r=0))
        for block in (m for m in model.modules() if isinstance(m, PlainBlock)):
            proj = cast(nn.Linear, block.attn.proj)
            with torch.no_grad():
                proj.weight[:, 16:32] = 0
        small = slim(model, Heads(share=0.34), x)
        assert [m.attn.num_heads for m in small.modules() if isinstance(m, PlainBlock)] == [2, 2, 2]
        torch.testing.assert_close(answered(small, x), answered(model, x), atol=1e-5, rtol=1e-5)


# ---- positions of what is left


def attend(block: Any, h: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * 16**-0.5
    return block.attn.proj(torch.einsum("bhnm,bhmd->bnhd", (scores if bias is None else scores + bias).softmax(-1), v).flatten(2))


def kept_by_random_choice(small: nn.Module) -> Tensor:
    from vitreous.tokens.random_choice import KeepDrawn

    (drawn_,) = (m for m in small.modules() if isinstance(m, KeepDrawn))
    return drawn_.rank.argsort()[:8].sort().values


def test_tokens_that_are_left_keep_their_angles(x: Tensor) -> None:
    """EVA-02, by hand: from block 1 on eight patches are left, each turned by the angles of its own place in the grid."""
    model: Any = timm_model("eva02_tiny_patch14_224")
    small: Any = slim(model, RandomChoice(0.5, at=(0,)))
    kept = kept_by_random_choice(small)
    with torch.no_grad():
        tokens, table = model._pos_embed(model.patch_embed(x))
        y = model.blocks[0].forward(tokens, rope=table)
        # What the first block's MLP gave is of the tokens alone, so the rows that stay can be taken out behind it.
        y = torch.cat([y[:, :1], y[:, 1:][:, kept]], 1)
        for block in model.blocks[1:]:
            y = block(y, rope=table[kept])
        torch.testing.assert_close(answered(small, x), model.forward_head(model.norm(y)), atol=1e-5, rtol=1e-5)


def test_tokens_that_are_left_keep_their_biases(x: Tensor) -> None:
    """BEiT, by hand: the bias of a pair is that of the places where the two stood."""
    model: Any = timm_model("beit_base_patch16_224")
    small: Any = slim(model, RandomChoice(0.5, at=(0,)))
    rows = torch.cat([torch.zeros(1, dtype=torch.long), kept_by_random_choice(small) + 1])
    with torch.no_grad():
        tokens = model.pos_drop(torch.cat([model.cls_token.expand(4, -1, -1), model.patch_embed(x)], 1))
        y = model.blocks[0](tokens)[:, rows]
        for block in model.blocks[1:]:
            bias = block.attn._get_rel_pos_bias()[:, :, rows][:, :, :, rows]
            a = block.attn
            qkv = F.linear(block.norm1(y), a.qkv.weight, torch.cat([a.q_bias, a.k_bias, a.v_bias]))
            q, k, v = qkv.reshape(4, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
            y = y + block.gamma_1 * attend(block, y, q, k, v, bias)
            y = y + block.gamma_2 * block.mlp(block.norm2(y))
        torch.testing.assert_close(answered(small, x), model.forward_head(model.norm(y)), atol=1e-5, rtol=1e-5)


def test_a_merged_token_stands_where_the_other_one_came_to(x: Tensor) -> None:
    small: Any = slim(hugging_face("DINOv3ViTModel", num_register_tokens=2), ToMe(r=3))
    seen: list[Tokens] = []
    for block in (m for m in small.modules() if isinstance(m, PlainBlock)):
        block.register_forward_pre_hook(lambda _, given: seen.append(Tokens.of(given[0])))
    with vt.traced(small) as trace:
        answered(small, x)
    assert seen[0].place is None
    place = cast(Tensor, seen[1].place)
    for image in range(4):
        for token in range(19):
            assert trace[0].into[image, place[image, trace[0].into[image, token]]] == trace[0].into[image, token]
        assert place[image, :3].tolist() == [0, 1, 2] and len(set(place[image].tolist())) == 16
    odd = [int(p) for p in place[0] if p >= 3 and p % 2 == 1]
    assert len(odd) == 8, "all that others are merged into stay where they are"


def test_another_size_of_image() -> None:
    """Positions follow the image, not the configuration."""
    large = torch.randn(2, 3, 48, 32)
    for model in (
        timm_model("vit_small_patch16_dinov3", num_classes=0, dynamic_img_size=True),
        hugging_face("DINOv3ViTModel", num_register_tokens=4),
    ):
        assert read(model).prefix == 5
        small = slim(model, EViT(keep=1.0, at=(0, 1)))
        torch.testing.assert_close(answered(small, large), answered(model, large), atol=1e-5, rtol=1e-5)
        assert torch.isfinite(answered(slim(model, ToMe(r=2)), large)).all()


# ---- what is told, and what is refused


class Silent(OwnViT):
    """Takes images of 40 × 24 pixels alone, and says so nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 16, 48))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2:] == (40, 24)
        return super().forward(x)


def test_what_cannot_be_found_can_be_told() -> None:
    model = drawn(Silent())
    assert read(model).grid is None
    with pytest.raises(VitreousError, match=r"vitreous\.read"):
        slim(model, UniformPooling())
    found = read(model, grid=(5, 3), prefix=1, classifier="answers")
    assert (found.grid, found.prefix, found.classifier) == ((5, 3), 1, "answers")
    assert read(copy.deepcopy(model)).grid == (5, 3)
    assert read(nn.DataParallel(model)).grid == (5, 3)
    assert read(model, classifier="").classifier is None
    small = slim(model, UniformPooling())
    assert torch.isfinite(small(torch.randn(2, 3, 40, 24))).all()
    with pytest.raises(VitreousError, match="has no layer 'nowhere'"):
        read(model, classifier="nowhere")


def test_features_are_found_inside_of_wrappers() -> None:
    import timm

    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, features_only=True
    )
    found = read(net)
    assert found.plain and (found.grid, found.prefix) == ((4, 4), 1) and found.blocks[0].name == "model.blocks.0"
    x = torch.randn(2, 3, 32, 32)
    quantized = slim(net, RepQ(), x)
    with torch.no_grad():
        for a, b in zip(quantized(x), net.eval()(x), strict=True):
            assert (a - b).norm() < 0.1 * b.norm()


def test_an_original_is_left_as_it_was(x: Tensor) -> None:
    for name in ("torchvision", "vit-pytorch", "LoRA", "own, einops"):
        model = FAMILIES[name].make()
        names, before = list(model.state_dict()), answered(model, x)
        slim(model, [EViT(keep=0.5), Heads(share=0.3), RepQ()], x)
        assert list(model.state_dict()) == names and torch.equal(answered(model, x), before)
        assert not any(isinstance(m, PlainBlock) for m in model.modules())


def test_layers_for_keys_and_values_together_and_three_orders(x: Tensor) -> None:
    for layout in ("three", "heads first", "heads last"):
        model = drawn(_Ordered(layout))
        assert read(model).plain, str(read(model))
        torch.testing.assert_close(answered(slim(model, ToMe(r=0)), x), answered(model, x), atol=1e-5, rtol=1e-5)


class _OrderedAttention(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.to_q, self.to_kv, self.to_out = nn.Linear(48, 48), nn.Linear(48, 96), nn.Linear(48, 48)
        if order != "three":
            self.to_q = None
            self.to_kv = nn.Linear(48, 144)

    def forward(self, x: Tensor) -> Tensor:
        made = self.to_kv(x)
        if self.order == "three":
            k, v = made.unflatten(-1, (2, 3, 16)).permute(2, 0, 3, 1, 4)
            q = cast(nn.Module, self.to_q)(x).unflatten(-1, (3, 16)).transpose(1, 2)
        elif self.order == "heads first":
            q, k, v = made.unflatten(-1, (3, 3, 16)).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = made.unflatten(-1, (3, 16, 3)).permute(4, 0, 2, 1, 3)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _OrderedBlock(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.pre, self.post = nn.LayerNorm(48), nn.LayerNorm(48)
        self.tokens_meet, self.think = _OrderedAttention(order), nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens_meet(self.pre(x))
        return x + self.think(self.post(x))


class _Ordered(OwnViT):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.trunk = nn.ModuleList([_OrderedBlock(order) for _ in range(2)])


def test_a_mask_is_refused_and_not_passed_over(x: Tensor) -> None:
    small: Any = slim(small_vit(), ToMe(r=2))
    with torch.no_grad(), pytest.raises(VitreousError, match="cannot use"):
        small.blocks[0](torch.randn(1, 17, 48), torch.ones(17, 17).triu())
