"""Explanations and analytics of models as people have them: half precision, wrapped, checkpointed, with outputs of any form."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from support import small_vit
from torch import Tensor, nn

from vitreous import see
from vitreous.errors import VitreousError
from vitreous.glass import glass
from vitreous.relevance import relevance

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
ANALYTICS: dict[str, Callable[[nn.Module], np.ndarray]] = {
    "head_importance": lambda m: see.head_importance(m, X, torch.tensor([1, 4])).values,
    "paths": lambda m: np.nan_to_num(see.paths(m, X, torch.tensor([1, 4])).values),
    "distance": lambda m: see.distance(m, X).measures,
    "artifacts": lambda m: see.artifacts(m, X).norms,
    "patterns": lambda m: see.patterns(m, X).offsets,
}


class Forms(nn.Module):
    """A ViT with the attributes of one, whose answer comes in another form."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.__dict__["form"] = form
        inner: Any = small_vit(depth=2)
        for name, child in inner.named_children():
            self.add_module(name, child)
        for name in ("cls_token", "pos_embed"):
            setattr(self, name, getattr(inner, name))
        for name in ("num_prefix_tokens", "global_pool", "num_classes", "get_classifier"):
            setattr(self, name, getattr(inner, name))
        self.__dict__["inner"] = inner

    def forward(self, x: Tensor) -> Any:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.form(self.head(self.norm(self.blocks(x))[:, 0]))


def inference() -> nn.Module:
    with torch.inference_mode():
        return small_vit(depth=2)


def checkpointed() -> nn.Module:
    model: Any = small_vit(depth=2)
    model.set_grad_checkpointing()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "half": lambda: small_vit(depth=2).half(),
    "bfloat16": lambda: small_vit(depth=2).bfloat16(),
    "training": lambda: small_vit(depth=2, proj_drop_rate=0.5).train(),
    "frozen": lambda: small_vit(depth=2).requires_grad_(False),
    "made in inference mode": inference,
    "checkpointed": checkpointed,
    "a dict": lambda: Forms(lambda y: {"loss": None, "features": y[:, :2], "logits": y}).eval(),
    "a tuple": lambda: Forms(lambda y: (y, y[:, :1])).eval(),
}
PLAIN = small_vit(depth=2)


@pytest.mark.parametrize("kind", MODELS)
def test_every_explanation(kind: str) -> None:
    model = MODELS[kind]()
    training, dtype = model.training, next(model.parameters()).dtype
    same = copy.deepcopy(model).float() if dtype != torch.float32 else PLAIN  # weights in few bits are explained in float32
    for name, explain in see.METHODS.items():
        right = explain(same, X.to(dtype).float(), target=[1, 4])
        found = explain(model, X.to(dtype), target=[1, 4])
        assert found.shape == (2, 4, 4) and not found.requires_grad, name
        assert float((found.float() - right).abs().max()) <= 1e-4 * float(right.max()), name
    assert model.training == training and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["bfloat16", "made in inference mode", "checkpointed", "a dict"])
def test_every_analysis(kind: str) -> None:
    model = MODELS[kind]()
    same = copy.deepcopy(model).float() if kind == "bfloat16" else PLAIN
    for name, analyse in ANALYTICS.items():
        right, found = analyse(same), analyse(model)
        assert np.nanmax(abs(found - right)) <= 1e-3 * np.nanmax(abs(right)), name


def test_under_autocast() -> None:
    right = {name: explain(PLAIN, X, target=2) for name, explain in see.METHODS.items()}
    with torch.autocast("cpu", torch.bfloat16):
        for name, explain in see.METHODS.items():
            torch.testing.assert_close(explain(PLAIN, X, target=2), right[name], atol=1e-6, rtol=1e-5)


def test_another_thread_meanwhile() -> None:
    """What others run on a model is not changed by explanations of it: not its mode, not its gradients, not its blocks."""
    model = small_vit(depth=2).train()
    right = model(X)

    def train() -> None:
        for _ in range(60):
            out = model(X)
            torch.testing.assert_close(out, right, atol=1e-6, rtol=1e-6)
            assert out.requires_grad

    def explain(name: str) -> None:
        see.METHODS[name](model, X, 3) if name in see.METHODS else ANALYTICS[name](model)

    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(train), *(pool.submit(explain, name) for name in ("lrp", "head_importance", "grad_cam", "paths"))]
        for future in work:
            future.result()


# ---- targets


@pytest.mark.parametrize("method", [n for n in see.METHODS if n not in ("attention", "rollout", "eigen_cam")])
def test_lists_of_targets(method: str) -> None:
    """More images than go together, and a list as long as such a part of them: a class for each image, or refused."""
    x, wanted = torch.cat([X, X, X.flip(0)]), [0, 3, 6, 1, 2, 5]
    explain = see.METHODS[method]
    assert torch.equal(explain(PLAIN, x, wanted), explain(PLAIN, x, torch.tensor(wanted)))
    torch.testing.assert_close(explain(PLAIN, x, wanted)[4:5], explain(PLAIN, x[4:5], 2), atol=1e-6, rtol=1e-4)
    for wrong in ([0, 3, 6, 1], [], "class", [1.0] * 6, [True] * 6):
        with pytest.raises(VitreousError, match="one for each of the 6 images"):
            explain(PLAIN, x, wrong)


# ---- features


def test_features_of_constant_norm_are_explained_by_their_distance_from_a_blank_picture() -> None:
    """The norm of normalised embeddings is 1 whatever is seen: its gradients are rounding."""
    model: Any = Forms(lambda y: {"image_embeds": F.normalize(y, dim=1)}).eval()
    blank = model(torch.zeros_like(X))["image_embeds"]
    apart = (model(X)["image_embeds"] - blank).square().sum(1)
    found = relevance(model, X)
    torch.testing.assert_close(found.score, apart.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.leaving.sum(1), torch.ones(2), rtol=1e-3, atol=1e-3)
    # The distance is that of nothing once all is blank, and what was blank already does nothing for it.
    x = X.clone()
    x[:, :, 8:16, 8:16] = 0
    falls = see.occlusion(model, x)
    assert (falls[:, 1, 1] == 0).all() and (falls.amax((1, 2)) > 0.01 * apart).all()
    assert float(see.integrated_gradients(model, x).sum()) > 0.5 * float(apart.sum())
    # Maps are no rounding noise: they are the same in double precision.
    for explain in (see.grad_cam, see.grad_rollout, see.layer_cam, see.lrp):
        rough = explain(model, X)
        fine = explain(copy.deepcopy(model).double(), X.double()).float()
        assert rough.max() > 0 and float((rough - fine).abs().max()) < 1e-3 * float(fine.max())


def test_features_of_any_form_are_explained() -> None:
    model: Any = Forms(lambda y: {"last_hidden_state": y.unflatten(1, (7, 1)) * torch.arange(1.0, 8.0)[:, None]}).eval()
    for name, explain in see.METHODS.items():
        assert explain(model, X).shape == (2, 4, 4), name
    assert see.head_importance(model, X).metrics == ("output", "taylor", "gradient_attention")
    with pytest.raises(VitreousError, match="scores"):
        see.grad_cam(model, X, 3)


# ---- what is read, and the grid


def test_a_class_token_that_nobody_reads_is_not_shown() -> None:
    """What is read is found out, not told by the class token or a name: patches, two tokens, the class token and patches."""

    def reading(read: Callable[[Tensor], Tensor]) -> nn.Module:
        model: Any = small_vit(depth=2)
        model.forward_head = lambda x, **_: model.head(read(x))
        return model

    with torch.no_grad(), glass(PLAIN) as g:
        PLAIN(X)
    last = g.attention[-1].mean(1)
    of_patches, of_class = (rows.mean(1)[:, 1:].view(2, 4, 4) for rows in (last[:, 1:], last[:, :1]))
    for read, right in (
        (lambda x: x[:, 1:].mean(1), of_patches),
        (lambda x: x[:, 0], of_class),
        (lambda x: x[:, 0] + x[:, 1:].mean(1), (of_class + of_patches) / 2),
    ):
        torch.testing.assert_close(see.attention(reading(read), X), right, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("side", [(32, 64), (48, 32), (40, 24)])
def test_the_grid_is_that_of_the_image(side: tuple[int, int]) -> None:
    model = small_vit(depth=2, dynamic_img_size=True)
    x, grid = torch.randn(1, 3, *side), (side[0] // 8, side[1] // 8)
    for name in ("rollout", "attention", "grad_rollout", "lrp", "grad_cam", "occlusion"):
        assert see.METHODS[name](model, x).shape == (1, *grid), name
    assert see.distance(model, x).grid == grid
    assert see.rollout(model, X).shape == (2, 4, 4)


def test_hugging_face_at_another_size() -> None:
    size = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8)
    model: Any = transformers.ViTForImageClassification(transformers.ViTConfig(**size)).eval()
    forward = type(model).forward
    model.forward = types.MethodType(lambda self, x: forward(self, x, interpolate_pos_encoding=True), model)
    for side, grid in (((32, 32), (4, 4)), ((48, 80), (6, 10))):
        assert see.rollout(model, torch.randn(1, 3, *side)).shape == (1, *grid)
        assert see.attention(model, torch.randn(1, 3, *side)).shape == (1, *grid)


def test_every_layer_of_siglip_counts_and_its_pooling_is_read() -> None:
    size = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**size, attn_implementation="eager")).eval()
    with torch.no_grad(), glass(model) as g:
        model(X)
    *layers, pooling = (a.mean(1) for a in g.attention)
    row = pooling
    for a in reversed(layers):
        a = a + torch.eye(16)
        row = row @ (a / a.sum(-1, keepdim=True))
    torch.testing.assert_close(see.rollout(model, X), row.view(2, 4, 4), atol=1e-6, rtol=1e-4)


def test_maps_that_no_memory_holds_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_vit(depth=2), torch.randn(1, 3, 32, 32)
    wanted = 4 * 3 * 17 * 17
    monkeypatch.setattr("vitreous.see.patches.free_memory", lambda: wanted)
    assert see.rollout(model, x).shape == (1, 4, 4)
    monkeypatch.setattr("vitreous.see.patches.free_memory", lambda: wanted - 1)
    monkeypatch.setattr(type(model.blocks[1]), "forward", lambda *_: pytest.fail("it ran"))
    with pytest.raises(VitreousError, match=r"32 × 32 are 17 tokens.*img_size"):
        see.rollout(model, x)
