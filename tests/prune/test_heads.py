"""Head pruning: the right heads by the paper's importance, and a model that is really smaller."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support import small_vit
from torch import Tensor, nn

from vitreous.anatomy import read
from vitreous.blocks import PlainBlock
from vitreous.errors import VitreousError
from vitreous.glass import glass
from vitreous.prune import Heads
from vitreous.prune.heads import importance, least
from vitreous.quant import MinMax
from vitreous.steps import history_of, slim
from vitreous.tokens import EViT, ToMe

SAME = dict(atol=1e-5, rtol=1e-5)


def masked(model: nn.Module, removed: list[list[int]], x: Tensor) -> Tensor:
    with torch.no_grad(), glass(model, record=()) as g:
        for layer, heads in enumerate(removed):
            g.mask_heads(layer, heads)
        return model(x)


def removed_from(model: nn.Module) -> list[list[int]]:
    return history_of(model).done[-1][1]["heads"]


# ---- importance


def test_importance_is_the_slope_of_the_loss_in_a_head_mask(images: Tensor) -> None:
    model, x = small_vit(depth=3).double(), images.double()
    found = importance(model, x)
    labels = model(x).argmax(1)
    step = 1e-5

    def loss(layer: int, head: int, factor: float) -> Tensor:
        with torch.no_grad(), glass(model, record=()) as g:
            g.mask_heads(layer, head, factor=factor)
            return F.cross_entropy(model(x), labels, reduction="none")

    for layer in range(3):
        for head in range(3):
            slopes = (loss(layer, head, 1 + step) - loss(layer, head, 1 - step)) / (2 * step)
            assert float(found[layer][head]) == pytest.approx(float(slopes.abs().mean()), rel=1e-4)


def test_importance_is_that_of_the_attention_and_its_gradient(images: Tensor) -> None:
    """The paper's other form: |Aᵀ ∂L/∂A| of what the head gives."""
    model = small_vit(depth=2)
    given: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor]) -> None:
        args[0].retain_grad()
        given.append(args[0])

    handles = [b.attn.proj.register_forward_pre_hook(keep) for b in model.blocks]
    out = model(images)
    F.cross_entropy(out, out.argmax(1), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for ours, a in zip(importance(model, images), given, strict=True):
        assert a.grad is not None
        expected = (a * a.grad).unflatten(-1, (3, -1)).sum((1, 3)).abs().mean(0)
        torch.testing.assert_close(ours, expected.detach(), **SAME)


def test_importance_is_a_mean_over_images_however_they_are_batched(images: Tensor) -> None:
    model = small_vit(depth=2)
    many = torch.cat([images, images + 0.1, images - 0.1])  # more than one batch
    whole = importance(model, many)
    one_by_one = [importance(model, many[i : i + 1]) for i in range(len(many))]
    for layer in range(2):
        torch.testing.assert_close(whole[layer], torch.stack([o[layer] for o in one_by_one]).mean(0), **SAME)


def test_importance_needs_no_trainable_weights_and_leaves_no_trace(images: Tensor) -> None:
    model = small_vit(depth=2)
    before = importance(model, images)
    model.requires_grad_(False)
    with torch.no_grad():
        after = importance(model, images)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_classes_keeps_the_heads_that_move_its_feature(images: Tensor) -> None:
    model = small_vit(depth=2)
    model.reset_classifier(0)
    with torch.no_grad():  # silence all but one head of each layer
        for block in model.blocks:
            block.attn.proj.weight[:, :32] *= 1e-3
    small = slim(model, Heads(share=0.67), images)
    assert removed_from(small) == [[0, 1], [0, 1]]
    with torch.no_grad():
        moved = (small(images) - model(images)).norm() / model(images).norm()
    assert moved < 0.01


# ---- selection


def test_each_layer_is_normalised_and_keeps_a_head() -> None:
    scores = [torch.tensor([3.0, 4.0, 0.0]), torch.tensor([300.0, 0.3, 400.0]), torch.tensor([1.0, 1.0, 1.0])]
    assert least(scores, 0.0) == [[], [], []]
    assert least(scores, 0.25) == [[2], [1], []]  # two of nine
    assert least(scores, 4 / 9) == [[2], [1], [0, 1]]  # 0.577 of the even layer is less than 0.6 of the others
    assert least(scores, 0.99) == [[0, 2], [0, 1], [0, 1]]
    assert least([torch.zeros(2), torch.zeros(2)], 0.5) == [[0], [1]] or least([torch.zeros(2)] * 2, 0.5) == [[0], [0]]


# ---- the pruned model


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_output_is_that_of_the_masked_original(share: float, images: Tensor) -> None:
    model = small_vit()
    small = slim(model, Heads(share=share), images)
    removed = removed_from(small)
    assert sum(map(len, removed)) == min(int(share * 12), 8)
    with torch.no_grad():
        torch.testing.assert_close(small(images), masked(model, removed, images), **SAME)
        assert not torch.allclose(small(images), model(images), atol=1e-3)
    for block, gone in zip(read(small).blocks, removed, strict=True):
        attn: Any = small.get_submodule(block.attention.name)
        left = 3 - len(gone)
        assert attn.num_heads == block.attention.heads == left and block.attention.head_dim == 16
        assert attn.qkv.weight.shape == (3 * 16 * left, 48) and attn.proj.weight.shape == (48, 16 * left)
        assert (attn.qkv.in_features, attn.qkv.out_features, attn.proj.in_features) == (48, 48 * left, 16 * left)
        assert block.plain
    spared = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert spared == sum(len(gone) * 16 * (4 * 48 + 3) for gone in removed)


def test_the_least_important_heads_go(images: Tensor) -> None:
    """By the loss it really costs, the heads chosen are better to lose than those that are kept."""
    model = small_vit()
    removed = removed_from(slim(model, Heads(share=0.34), images))
    scores = [s / s.norm() for s in importance(model, images)]
    gone = [float(scores[i][h]) for i, heads in enumerate(removed) for h in heads]
    kept = [float(s[h]) for i, s in enumerate(scores) for h in range(3) if h not in removed[i] and len(removed[i]) < 2]
    assert len(gone) == 4 and max(gone) <= min(kept)


def test_a_share_of_nothing_is_the_identity(vit: nn.Module, images: Tensor) -> None:
    small = slim(vit, Heads(share=0.0), images)
    with torch.no_grad():
        torch.testing.assert_close(small(images), vit(images), **SAME)
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in vit.state_dict().items()}


def test_the_plan_alone_builds_the_structure(vit: nn.Module, images: Tensor) -> None:
    step = Heads(share=0.5)
    small = step.apply(vit, images)
    other = small_vit(seed=9)
    step.build(other, {"heads": removed_from(small)})
    other.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(images), small(images))
    for wrong in ([[0]], [[0, 1, 2], [], [], []], [[3], [], [], []]):
        with pytest.raises(VitreousError, match="plan"):
            step.build(small_vit(), {"heads": wrong})


@pytest.mark.parametrize("tokens", [EViT(keep=0.6), ToMe(r=2)], ids=str)
def test_with_token_steps_in_both_orders(tokens: EViT | ToMe, vit: nn.Module, images: Tensor) -> None:
    first = slim(vit, [Heads(share=0.34), tokens], images)
    last = slim(vit, [tokens, Heads(share=0.34)], images)
    pruned = slim(vit, Heads(share=0.34), images)
    for small in (first, last):
        assert sum(b.attention.heads or 0 for b in read(small).blocks) == 8
        assert all(isinstance(b, PlainBlock) for b in small.blocks)
        with torch.no_grad():
            out = small(images)
        assert torch.isfinite(out).all() and not torch.allclose(out, pruned(images), atol=1e-3)
    # The reducer after pruning is the one that a pruned model gets: the same tokens go.
    with torch.no_grad():
        assert torch.equal(first(images), slim(pruned, tokens)(images))


def test_it_trains_and_prunes_again(vit: nn.Module, images: Tensor) -> None:
    once = slim(vit, Heads(share=0.34), images)
    once(images).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in once.parameters())
    twice = slim(once, Heads(share=0.25), images)
    assert sum(b.attention.heads or 0 for b in read(twice).blocks) == 6


@pytest.mark.parametrize(
    "name, extra",
    [
        ("beit_base_patch16_224", dict(use_abs_pos_emb=True, use_rel_pos_bias=False)),  # query and value biases apart
        ("eva02_base_patch14_224", dict(use_rot_pos_emb=False, scale_mlp=False)),  # three projections
        ("vit_tiny_patch16_224", dict(qk_norm=True, init_values=0.1)),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_other_plain_families(name: str, extra: dict[str, Any], images: Tensor) -> None:
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    model = timm.create_model(name, **{**shape, **extra}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    small = slim(model, Heads(share=0.5), images)
    removed = removed_from(small)
    assert sum(map(len, removed)) == 4
    with torch.no_grad():
        torch.testing.assert_close(small(images), masked(model, removed, images), **SAME)


def test_a_gate_goes_with_its_heads(images: Tensor) -> None:
    from timm.layers import Attention

    model = small_vit(depth=2)
    torch.manual_seed(3)
    for block in model.blocks:
        block.attn = Attention(48, 3, qkv_bias=True, gated=True)
    small = slim(model, Heads(share=0.5), images)
    with torch.no_grad():
        torch.testing.assert_close(small(images), masked(model, removed_from(small), images), **SAME)


# ---- what it refuses


def test_refusals(vit: nn.Module, images: Tensor) -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(VitreousError, match=r"\[0, 1\)"):
            Heads(share=share)
    with pytest.raises(VitreousError, match="calibration images"):
        slim(vit, Heads())
    with pytest.raises(VitreousError, match="prune first"):
        slim(vit, [MinMax(), Heads()], images)
    with pytest.raises(VitreousError, match="normalises all heads together"):
        slim(small_vit(scale_attn_norm=True), Heads(share=0.5), images)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2)
    )
    with pytest.raises(VitreousError, match=r"layers\.0\.blocks\.0"):
        slim(swin, Heads(), images)
    with pytest.raises(VitreousError, match="none"):
        slim(timm.create_model("resnet18"), Heads(), images)


# ---- where the loss says nothing


def test_one_logit_is_ranked_by_how_far_it_moves(images: Tensor) -> None:
    model = small_vit(depth=2)
    model.head = nn.Linear(48, 1)
    found, step = importance(model, images), 1e-2

    def logit(layer: int, head: int, factor: float) -> Tensor:
        with torch.no_grad(), glass(model, record=()) as g:
            g.mask_heads(layer, head, factor=factor)
            return model(images)[:, 0]

    for layer in range(2):
        slopes = [(logit(layer, h, 1 + step) - logit(layer, h, 1 - step)).abs().mean() / (2 * step) for h in range(3)]
        torch.testing.assert_close(found[layer], torch.stack(slopes), atol=1e-4, rtol=1e-2)
    assert sum(map(len, removed_from(slim(model, Heads(share=0.34), images)))) == 2


def test_a_loss_that_is_certain_leaves_it_to_the_output(images: Tensor) -> None:
    model = small_vit(depth=2)
    with torch.no_grad():
        model.head.bias[3] = 1e4  # its probability is exactly 1
    found, flat = importance(model, images), small_vit(depth=2)
    flat.vitreous_embeds = True
    for a, b in zip(found, importance(flat, images), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


class Returns(nn.Module):
    """A model whose answer lies in a dict, a tuple or an object."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Any:
        y = self.model(x)
        return {"dict": {"logits": y, "extra": x}, "tuple": (y, x), "half": y.half()}[self.kind]


@pytest.mark.parametrize("kind", ["dict", "tuple", "half"])
def test_the_answer_is_found_in_what_the_model_returns(kind: str, images: Tensor) -> None:
    expected = importance(small_vit(depth=2), images)
    for a, b in zip(importance(Returns(small_vit(depth=2), kind), images), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if kind == "half" else 1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_lose_the_heads_that_the_whole_model_loses(dtype: torch.dtype, images: Tensor) -> None:
    small = slim(small_vit(depth=2).to(dtype), Heads(share=0.34), images)
    assert removed_from(small) == removed_from(slim(small_vit(depth=2), Heads(share=0.34), images))
    assert small(images.to(dtype)).dtype == dtype


def test_a_block_that_runs_again_and_again(images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    model = small_vit(depth=1)
    model.blocks = nn.Sequential(Twice(model.blocks[0]))
    small = slim(model, Heads(share=0.34), images)
    torch.testing.assert_close(small(images), masked(model, removed_from(small), images), **SAME)


def test_no_signal_prunes_nothing(images: Tensor) -> None:
    dead = small_vit(depth=1)
    with torch.no_grad():
        dead.blocks[0].attn.proj.weight.zero_()
    with pytest.raises(VitreousError, match="no head changes any answer"):
        slim(dead, Heads(share=0.34), images)
    with pytest.raises(VitreousError, match="no calibration images"):
        importance(small_vit(depth=1), images[:0])

    class Diverges(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *slopes: Tensor) -> Tensor:
            return slopes[0] * torch.nan

    model = small_vit(depth=1)
    model.norm.register_forward_hook(lambda _, __, out: Diverges.apply(out))
    with pytest.raises(VitreousError, match="NaN"):
        slim(model, Heads(share=0.34), images)
