"""The rules of relevance by hand, what they conserve, and on every kind of plain model."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support import small_vit
from timm.layers import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.macs import CountMacs
from vitreous.quant import MinMax
from vitreous.relevance import relevance
from vitreous.relevance.rules import convolution_rule, image_rule, linear_rule, mean_rule, product_rule, sum_rule
from vitreous.relevance.tape import Tape


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class TestRules:
    def test_a_linear_layer_by_hand(self) -> None:
        """Contributions 2·1, −1·3, −1·−2 and 4·0: of the relevance 8 the positive ones, 2 and 2, get half each."""
        x, w, b = torch.tensor([[2.0, -1.0, -1.0, 4.0]]), torch.tensor([[1.0, 3.0, -2.0, 0.0]]), torch.tensor([5.0])
        r = linear_rule(x, w, b, F.linear(x, w, b), torch.tensor([[8.0]]))
        assert torch.allclose(r, torch.tensor([[4.0, 0.0, 4.0, 0.0]]))

    def test_what_only_a_bias_made_goes_nowhere(self) -> None:
        x, w, b = torch.rand(1, 3, 4), -torch.rand(2, 4), torch.tensor([3.0, 7.0])
        r = linear_rule(x, w, b, F.linear(x, w, b), torch.ones(1, 3, 2))
        assert torch.isfinite(r).all() and r.abs().max() < 10

    def test_a_sum_by_hand(self) -> None:
        """3 + 1 share 3 : 1; of 5 − 3 the 5 gets all, of 2 − 6 the −6; nothing and nothing share alike."""
        a, b = torch.tensor([3.0, 5.0, 2.0, 0.0]), torch.tensor([1.0, -3.0, -6.0, 0.0])
        found = sum_rule(a, b, a + b, torch.tensor([8.0, 1.0, 2.0, 6.0]))
        assert torch.equal(found[0], torch.tensor([6.0, 1.0, 0.0, 3.0]))
        assert torch.equal(found[1], torch.tensor([2.0, 0.0, 2.0, 3.0]))

    def test_a_product_by_hand(self) -> None:
        """[1 2]·[3 −1]ᵀ = 3 − 2: the 3 has made it positive, and its relevance goes to its two factors."""
        a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [-1.0]])
        found = product_rule(a, b, a @ b, torch.tensor([[4.0]]))
        assert torch.allclose(found[0], torch.tensor([[4.0, 0.0]]), atol=1e-6)
        assert torch.allclose(found[1], torch.tensor([[4.0], [0.0]]), atol=1e-6)

    def test_a_mean_by_hand(self) -> None:
        x = torch.tensor([[6.0], [-2.0], [2.0]])
        assert torch.equal(mean_rule(x, x.mean(0), torch.tensor([4.0]), 0), torch.tensor([[3.0], [0.0], [1.0]]))

    def test_patches_by_hand(self) -> None:
        """One patch of two pixels, 0 and 4 between l = 0 and h = 4: w = 3 sees (0, 4), w = −1 sees (−4, 0)."""
        x = torch.tensor([[[[0.0, 4.0]]]])
        w = torch.tensor([[[[-1.0, 3.0]]]])  # contributions 4 and 12
        r = image_rule(
            x, w, torch.tensor([2.0]), F.conv2d(x, w, torch.tensor([2.0]), (1, 2)), torch.full((1, 1, 1, 1), 8.0), ((1, 2),)
        )
        assert torch.allclose(r, torch.tensor([[[[2.0, 6.0]]]]))

    def test_a_convolution_is_a_linear_layer_at_every_place(self) -> None:
        g = torch.Generator().manual_seed(0)
        x, w, b = (torch.randn(*size, generator=g) for size in ((2, 4, 6, 6), (8, 2, 3, 3), (8,)))
        way = (2, 1, 1, 2)  # strided, padded, in two groups
        y = F.conv2d(x, w, b, *way)
        r = torch.rand(y.shape, generator=g)
        expected = torch.zeros_like(x)
        for group in range(2):
            mine, out = slice(2 * group, 2 * group + 2), slice(4 * group, 4 * group + 4)
            columns = F.unfold(x[:, mine], 3, padding=1, stride=2).mT
            flat = w[out].flatten(1)
            found = linear_rule(columns, flat, b[out], F.linear(columns, flat, b[out]), r[:, out].flatten(2).mT)
            expected[:, mine] = F.fold(found.mT, (6, 6), 3, padding=1, stride=2)
        torch.testing.assert_close(convolution_rule(x, w, b, y, r, way), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("rule", [sum_rule, product_rule])
    def test_nothing_lost_nothing_negative_however_much_cancels(self, rule: Any) -> None:
        g = torch.Generator().manual_seed(0)
        a = torch.randn(16, 16, generator=g)
        b = 1e-6 * torch.randn(16, 16, generator=g) - a
        r = torch.rand(16, 16, generator=g)
        shares = 1 if rule is sum_rule else 2
        found = rule(a, b, a + b if rule is sum_rule else a @ b, r / shares)
        assert all((t >= -1e-5).all() for t in found)
        assert torch.allclose(sum(t.sum() for t in found), r.sum(), rtol=1e-4)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"init_values": 0.3},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "gated": {"mlp_layer": timm.layers.SwiGLU},
    "packed gate": {"mlp_layer": timm.layers.GluMlp},
    "without bias": {"qkv_bias": False},
    "normed queries": {"qk_norm": True},
    "averaged": {"global_pool": "avg"},
    "attention pool": {"global_pool": "map", "class_token": False},
    "norm first": {"pre_norm": True},
    "relu": {"act_layer": "relu"},
}


@pytest.fixture(params=[*KINDS, "features", "distilled", "stem"], scope="module")
def any_model(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "distilled":
        torch.manual_seed(0)
        size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
        return timm.create_model("deit_tiny_distilled_patch16_224", **size).eval()
    model = small_vit(depth=2, **KINDS.get(request.param, {}))
    if request.param == "features":
        model.reset_classifier(0)
        nn.init.normal_(model.norm.weight)  # else all features have one norm, and another score is explained
    if request.param == "stem":
        convolutions = ConvStem(3, depth=3, channels=(12, 24, 48), kernel_size=3, stride=(2, 2, 2), act_layer=nn.GELU)
        model.patch_embed = HybridEmbed(convolutions, img_size=32, patch_size=1, embed_dim=48)
    return model.eval()


class TestEveryModel:
    def test_conserves(self, any_model: nn.Module, images: Tensor) -> None:
        with torch.no_grad():
            out = any_model(images)
        found = relevance(any_model, images)
        score = out.amax(1) if out.shape[1] == 7 else out.square().sum(1)
        assert torch.allclose(found.score, score, rtol=1e-4)
        for tokens in (found.entering, found.leaving):
            assert torch.allclose(tokens.sum(1) * found.score, score, rtol=0.01) and (tokens > -1e-4).all()
        patches = found.entering[:, -16:].sum(1)
        assert (found.pixels.sum((1, 2, 3)) <= 1.001 * patches).all()  # the rest is the position embedding's
        for name, a in found.attention.items():
            assert torch.allclose(2 * a.sum((1, 2, 3)), found.layers[f"{name}.av"], rtol=1e-3, atol=1e-5)
            assert torch.allclose(a.sum((1, 2, 3)), found.layers[f"{name}.qk"], rtol=1e-3, atol=1e-5)

    def test_every_layer_is_weighed(self, any_model: nn.Module, images: Tensor) -> None:
        found = relevance(any_model, images[:1])
        layers = {n for n, m in any_model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        assert layers - {"attn_pool.q"} <= found.layers.keys()  # that one reads no image
        assert all(0 <= float(r) < 1.01 for r in found.layers.values())

    def test_each_image_as_if_alone(self, any_model: nn.Module, images: Tensor) -> None:
        together = relevance(any_model, images, gradients=True)
        for i in range(3):
            alone = relevance(any_model, images[i : i + 1], gradients=True)
            assert torch.allclose(together.pixels[i], alone.pixels[0], atol=1e-5 * float(alone.pixels.max()))
            for name, a in alone.gradients.items():
                assert torch.allclose(together.gradients[name][i], a[0], atol=1e-5)

    def test_single_precision_is_enough(self, any_model: nn.Module, images: Tensor) -> None:
        rough, fine = relevance(any_model, images), relevance(copy.deepcopy(any_model).double(), images.double())
        assert (rough.pixels - fine.pixels).abs().max() < 1e-3 * fine.pixels.abs().max()
        assert (rough.entering - fine.entering).abs().max() < 1e-4


def test_gradients_are_those_of_the_score(images: Tensor) -> None:
    model = small_vit(depth=2)
    found = relevance(model, images, 3, gradients=True)
    from vitreous.glass import glass

    with glass(model, grad=True) as g:
        model(images)[:, 3].sum().backward()
    for ours, theirs in zip(found.gradients.values(), g.gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_attention_without_the_fused_kernel_is_the_same(images: Tensor) -> None:
    model = small_vit(depth=2)
    fused = relevance(model, images)
    for block in model.blocks:
        block.attn.fused_attn = False
    split = relevance(model, images)
    assert torch.allclose(fused.pixels, split.pixels, atol=1e-6) and fused.layers.keys() == split.layers.keys()


def test_uniformly_quantized_models_too(images: Tensor) -> None:
    model = small_vit(depth=2)
    small = MinMax().apply(model, images)
    a, b = relevance(model, images, 1), relevance(small, images, 1)
    assert (a.entering - b.entering).abs().max() < 0.1 * a.entering.max() and not torch.equal(a.entering, b.entering)


def test_nothing_is_left_behind(images: Tensor) -> None:
    model = small_vit(depth=2).train()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        relevance(model, images)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not images.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(VitreousError, match="no target"):
        relevance(model, images, 9)
    gc.collect()
    assert not any(type(o) is Tape for o in gc.get_objects()), "what holds the whole graph must go with it"


def test_half_precision_is_explained_in_single(images: Tensor) -> None:
    model = small_vit(depth=2).bfloat16()
    assert torch.allclose(relevance(model, images.bfloat16()).entering.sum(1), torch.ones(3), rtol=1e-3)


def test_what_has_no_rule_is_named(images: Tensor) -> None:
    model = small_vit(depth=2)
    model.norm = nn.Hardshrink()
    with pytest.raises(VitreousError, match="no rule for 'hardshrink'"):
        relevance(model, images)


def test_costs_at_most_six_forward_passes() -> None:
    """Counted in multiplications; the time is measured by hand, for it depends on who else computes."""
    model = timm.create_model("vit_small_patch16_224", depth=2, num_classes=10).eval()
    x = torch.randn(1, 3, 224, 224)

    def operations(run: Callable[[], object]) -> int:
        with CountMacs() as counted, torch.no_grad():
            run()
        return counted.total

    relevance(model, x, 0)  # what a model answers with is found out once, by a pass
    once = operations(lambda: model(x))
    assert operations(lambda: relevance(model, x, 0)) < 5 * once
    assert operations(lambda: relevance(model, x, 0, gradients=True)) < 6 * once
