"""Head importance: the shared ablation is the naive loop, and each metric says what its definition says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES
from scipy.stats import kendalltau
from support import from_timm, small_vit
from torch import Tensor, nn

from vitreous import see
from vitreous.anatomy import read
from vitreous.copies.own import still
from vitreous.errors import VitreousError
from vitreous.glass import glass
from vitreous.prune import Heads
from vitreous.prune.heads import importance
from vitreous.quant import RepQ
from vitreous.see import hot
from vitreous.see.ablation import hot_blocks, why_one_by_one, without_each_head
from vitreous.see.head_importance import PRECISIONS, kendall
from vitreous.see.stream import Means, interval
from vitreous.see.tail import lay_out
from vitreous.ship.openvino_graph import core
from vitreous.steps import slim
from vitreous.tokens import EViT


def scaled() -> nn.Module:
    model: Any = small_vit(init_values=0.3)
    for block in model.blocks:
        nn.init.uniform_(block.ls1.gamma, 0.1, 2)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "class token": (small_vit, True),
    "registers, gated": (lambda: from_timm("vit_small_patch14_reg4_dinov2"), True),
    "distilled": (lambda: from_timm("deit_tiny_distilled_patch16_224"), True),
    "average": (lambda: small_vit(class_token=False, global_pool="avg"), True),
    "attention pooling": (lambda: small_vit(class_token=False, global_pool="map"), True),
    "layer scale": (scaled, True),
    "norms of queries and keys": (lambda: small_vit(qk_norm=True), True),
    "features": (lambda: _features(), True),
    "relative positions": (FAMILIES["timm BEiT"].make, True),
    "angles": (FAMILIES["timm EVA-02"].make, True),
    "names of torchvision": (FAMILIES["torchvision"].make, True),
    "pairs in a list": (FAMILIES["vit-pytorch"].make, True),
    "drops tokens": (lambda: slim(small_vit(), EViT(keep=0.7, at=(1,))), False),
    "quantized": (lambda: slim(small_vit(), RepQ(), torch.randn(8, 3, 32, 32)), False),
}


def _features() -> nn.Module:
    model: Any = small_vit()
    model.reset_classifier(0)
    return model


def naive(model: nn.Module, x: Tensor, layer: int, head: int) -> Tensor:
    with torch.no_grad(), glass(model, record=()) as g:
        g.mask_heads(layer, head)
        return model(x)


@pytest.mark.parametrize("name", MODELS)
def test_every_ablation_is_that_of_the_naive_loop(name: str, images: Tensor) -> None:
    make, shared = MODELS[name]
    model = make()
    anatomy = read(model)
    with still(model) as own:
        why_not = lay_out(own, model, anatomy) or why_one_by_one(own, read(own))
        assert (why_not == "") == shared
        whole, found = without_each_head(own, images, read(own), hot_blocks(own, read(own)) if shared else None)
    with torch.no_grad():
        torch.testing.assert_close(whole, model(images))
    assert len(found) == len(anatomy.blocks)
    for layer, outputs in enumerate(found):
        assert len(outputs) == 3
        for head, out in enumerate(outputs):
            torch.testing.assert_close(out, naive(model, images, layer, head), atol=1e-5, rtol=1e-5)


def test_the_prefix_is_shared(images: Tensor) -> None:
    """Blocks see each image once before the ablation, then only copies after it, and the classifier's tokens at the end."""
    model: Any = small_vit()
    anatomy, seen = read(model), [0] * 4

    def count(i: int) -> Any:
        return lambda _, args, __: seen.__setitem__(i, seen[i] + args[0].shape[0] * args[0].shape[1])

    handles = [block.mlp.register_forward_hook(count(i)) for i, block in enumerate(model.blocks)]
    without_each_head(model, images, anatomy, hot_blocks(model, anatomy))
    for handle in handles:
        handle.remove()
    tokens, copies = 17 * 6, 3
    assert seen == [tokens * (1 + copies * (i + 1)) for i in range(3)] + [tokens + 6 * copies * 4]


def test_hot_blocks_run_in_openvino_and_say_the_same(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_vit()
    anatomy = read(model)
    cool = without_each_head(model, images, anatomy, hot_blocks(model, anatomy))[1]
    monkeypatch.setattr(hot, "HOT", 1)
    blocks = hot_blocks(model, anatomy)
    found = without_each_head(model, images, anatomy, blocks)[1]
    assert [b.whole.run is b.whole.block for b in blocks] == [True, False, False, True]  # of 0 and 3 no copy runs the whole
    assert all(b.rest.run is not b.rest.block for b in blocks)
    for a, b in zip(found, cool, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bf16_only_where_asked_and_close(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vit(depth=2)
    exact = see.head_importance(model, images, metrics=["output"]).values
    monkeypatch.setattr(hot, "HOT", 1)
    off = {p: abs(see.head_importance(model, images, metrics=["output"], precision=p).values - exact).max() for p in PRECISIONS}
    assert off["f32"] < 1e-6
    assert off["bf16"] < 0.05 * exact.max()
    if "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert off["bf16"] > 1e-6


def test_blocks_without_translation_stay_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if input.sum() > 0 else input

    monkeypatch.setattr(hot, "HOT", 1)
    for block, x in [(Odd(4, 4), torch.ones(2, 3, 4)), (nn.Linear(4, 4).double(), torch.ones(2, 3, 4).double())]:
        fast = hot.Hot(block)
        assert torch.equal(fast(x), block(x)) and fast.run is block


@pytest.mark.parametrize("labelled", [True, False])
def test_metrics_are_their_definitions(labelled: bool, images: Tensor) -> None:
    model = small_vit()
    y = torch.arange(6) % 7 if labelled else model(images).argmax(1)
    found = see.head_importance(model, images, y if labelled else None, batch=4)
    assert found.metrics == ("loss", "accuracy", "output", "taylor", "gradient_attention") and found.images == 6
    with torch.no_grad():
        out = model(images)
    for layer, head in [(0, 0), (2, 1), (3, 2)]:
        other = naive(model, images, layer, head)
        p, q = out.softmax(1), other.softmax(1)
        expected = {
            "loss": F.cross_entropy(other, y) - F.cross_entropy(out, y),
            "accuracy": (out.argmax(1) == y).float().mean() - (other.argmax(1) == y).float().mean(),
            "output": (p * (p / q).log()).sum(1).mean(),
        }
        for name, value in expected.items():
            ours = found.values[found.metrics.index(name), layer, head]
            assert ours == pytest.approx(float(value), abs=1e-5), name


def test_several_labels_are_each_a_question(images: Tensor) -> None:
    model = small_vit(depth=2)
    with torch.no_grad():
        out, other = model(images), naive(model, images, 1, 2)
    marks = (torch.arange(42).view(6, 7) % 3 == 0).long()
    for y, given in ((marks.float(), marks), ((out > 0).float(), None)):
        found = see.head_importance(model, images, given, multi_label=True)
        bce = F.binary_cross_entropy_with_logits
        p, q = torch.distributions.Bernoulli(logits=out), torch.distributions.Bernoulli(logits=other)
        expected = {
            "loss": bce(other, y) - bce(out, y),
            "accuracy": ((out > 0) == (y > 0)).float().mean() - ((other > 0) == (y > 0)).float().mean(),
            "output": torch.distributions.kl_divergence(p, q).mean(),
        }
        for name, value in expected.items():
            assert found.values[found.metrics.index(name), 1, 2] == pytest.approx(float(value), abs=1e-5), name
    with glass(model, grad=True) as g:
        bce(model(images), marks.float(), reduction="none").mean(1).sum().backward()
    taylor = (g.attention[1] * g.gradients[1])[:, 2].sum((1, 2)).abs().mean()
    found = see.head_importance(model, images, marks, ["taylor"])
    assert found.values[0, 1, 2] == pytest.approx(float(taylor), rel=1e-3)


def test_taylor_is_the_slope_of_a_mask_and_gradient_attention_never_below_it(images: Tensor) -> None:
    model = small_vit()
    found = see.head_importance(model, images, metrics=["taylor", "gradient_attention"])
    np.testing.assert_allclose(found.values[0], torch.stack(importance(model, images)).numpy(), rtol=1e-3, atol=1e-6)
    assert (found.values[1] >= found.values[0]).all() and (found.values[1] > 1.01 * found.values[0]).any()


def test_a_head_that_says_nothing_has_no_importance(images: Tensor) -> None:
    model: Any = small_vit()
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[:, 16:32] = 0
    found = see.head_importance(model, images)
    np.testing.assert_allclose(found.values[:, 1, 1], 0, atol=1e-6)
    assert (np.abs(np.delete(found.values[2].ravel(), 4)) > 1e-4).all()


def test_features_and_frozen_weights(images: Tensor) -> None:
    model = _features().requires_grad_(False)
    found = see.head_importance(model, images)
    assert found.metrics == ("output", "taylor", "gradient_attention") and (found.values > 0).all()
    with torch.no_grad():
        f, other = model(images), naive(model, images, 1, 2)
    assert found.values[0, 1, 2] == pytest.approx(float(((f - other).norm(dim=1) / f.norm(dim=1)).mean()), rel=1e-4)
    with pytest.raises(VitreousError, match="no importance metric 'loss' here"):
        see.head_importance(model, images, metrics=["loss"])


def test_heads_that_pruning_removed_are_nan(images: Tensor) -> None:
    small = slim(small_vit(), Heads(share=0.34), images)
    found = see.head_importance(small, images)
    heads = [b.attention.heads or 0 for b in read(small).blocks]
    assert found.shared and (~np.isnan(found.values)).sum((0, 2)).tolist() == [5 * n for n in heads] and len(set(heads)) > 1
    assert len(found.rows()) == sum(heads) and not np.isnan(found.agreement).any()


def test_agreement_is_kendalls_tau(images: Tensor) -> None:
    values = np.random.default_rng(0).integers(0, 6, (3, 40)).astype(float)
    for i in range(3):
        for j in range(3):
            assert kendall(values)[i, j] == pytest.approx(kendalltau(values[i], values[j]).statistic)
    found = see.head_importance(small_vit(), images)
    assert (found.agreement_low <= found.agreement + 1e-9).mean() > 0.8
    assert found.agreement[0, 2] == pytest.approx(kendalltau(found.values[0].ravel(), found.values[2].ravel()).statistic)


def test_the_model_is_left_as_found(images: Tensor) -> None:
    model = small_vit().train()
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    see.head_importance(model, images)
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    for n, m in model.named_modules():
        assert "forward" not in m.__dict__ and not m._forward_hooks and not m._forward_pre_hooks
        assert set(m.__dict__) == set(before[n])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(metrics=["tailor"]), "did you mean taylor"),
        (dict(metrics=[]), "at least one of"),
        (dict(labels=torch.zeros(3).long()), "do not fit 6 images"),
        (dict(batch=0), "batch must be at least 1"),
        (dict(precision="fp32"), "must be one of f32, bf16"),
    ],
)
def test_refusals(given: dict[str, Any], message: str, images: Tensor) -> None:
    with pytest.raises(VitreousError, match=message):
        see.head_importance(small_vit(), images, **given)


def test_convolutional_networks_are_refused(images: Tensor) -> None:
    with pytest.raises(VitreousError, match="has none in its blocks"):
        see.head_importance(timm.create_model("resnet10t", num_classes=7), images)


# ---- means and intervals of what comes in batches


def test_means_keep_nothing_of_single_images() -> None:
    values = torch.randn(900, 5, generator=torch.Generator().manual_seed(0)) * 2 + 3
    means = Means(0)
    sizes = []
    for x in values.split(100):
        means.add(x)
        sizes.append(sum(v.numel() for v in vars(means).values() if isinstance(v, Tensor)))
    assert len(set(sizes)) == 1
    np.testing.assert_allclose(means.mean(), values.mean(0), rtol=1e-5)
    low, high = interval(means.resamples())
    half = 1.96 * values.std(0).numpy() / 30
    np.testing.assert_allclose((high - low) / 2, half, rtol=0.15)
    np.testing.assert_allclose((high + low) / 2, values.mean(0), atol=0.02)
