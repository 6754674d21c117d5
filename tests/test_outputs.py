"""What a model returns, and whether its answer is classes or features."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support import small_vit
from torch import nn

import vitreous as vt
from vitreous.outputs import answer, embeds, tensors

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def backbone() -> nn.Module:
    model: Any = small_vit(depth=1)
    model.reset_classifier(0)
    return model


class Then(nn.Module):
    """A model whose output goes through a function of a module with weights `[5, 48]`."""

    def __init__(self, inner: nn.Module, function: Any) -> None:
        super().__init__()
        self.inner, self.function = inner, function
        self.prototypes, self.scale = nn.Parameter(torch.randn(5, 48)), nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, self.inner(x))


class Head(nn.Module):
    def __init__(self, name: str, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone()
        self.name = name
        self.add_module(name, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(self.backbone(x))


def cosine(m: Any, f: torch.Tensor) -> torch.Tensor:
    return m.scale.exp() * F.normalize(f, dim=-1) @ (m.prototypes / m.prototypes.norm(dim=1, keepdim=True)).T


def identity_head() -> nn.Module:
    model: Any = small_vit(depth=1)
    model.head = nn.Identity()  # num_classes stays 7
    return model


def timm_small(name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, img_size=32, patch_size=16, embed_dim=48, depth=1, num_heads=3, **kwargs).eval()


CLASSIFIERS = {
    "vit": lambda: small_vit(depth=1),
    "behind another module": lambda: nn.Sequential(nn.Identity(), small_vit(depth=1)),
    "linear": lambda: Head("linear", nn.Linear(48, 5)),
    "48 classes": lambda: Head("linear", nn.Linear(48, 48)),
    "mlp_head": lambda: Head("mlp_head", nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 20), nn.GELU(), nn.Linear(20, 1))),
    "dropout behind": lambda: Head("out", nn.Sequential(nn.Linear(48, 5), nn.Dropout(0.5), nn.Identity())),
    "scripted": lambda: Head("out", torch.jit.script(nn.Linear(48, 5))),
    "cosine": lambda: Then(backbone(), cosine),
    "cosine similarity": lambda: Then(backbone(), lambda m, f: F.cosine_similarity(f[:, None], m.prototypes, dim=-1)),
    "distances": lambda: Head("out", Distances()),
    "probabilities": lambda: nn.Sequential(small_vit(depth=1), nn.Softmax(-1)),
    "dict": lambda: Then(small_vit(depth=1), lambda m, y: {"out": y}),
    "logits of features": lambda: Then(backbone(), lambda m, y: {"image_embeds": y, "logits": y[:, :3]}),
    "two heads": lambda: timm_small("deit_tiny_distilled_patch16_224", num_classes=5),
    "parallel": lambda: nn.DataParallel(small_vit(depth=1)),
    "compiled": lambda: torch.compile(small_vit(depth=1), backend="eager"),
    "half": lambda: small_vit(depth=1).half(),
    "asked": lambda: asked(backbone(), False),
}
EMBEDDERS = {
    "no classes": backbone,
    "behind another module": lambda: nn.Sequential(nn.Identity(), backbone()),
    "identity head": identity_head,
    "normalised": lambda: Then(backbone(), lambda m, f: F.normalize(f, dim=-1)),
    "norm": lambda: Head("norm", nn.LayerNorm(48)),
    "projection": lambda: Head("visual_projection", nn.Linear(48, 5)),
    "class token": lambda: Then(small_vit(depth=1), lambda m, y: m.inner.forward_features(X[: len(y)])[:, 0]),
    "last block": lambda: Then(small_vit(depth=1), lambda m, y: m.inner.blocks(m.inner.patch_embed(X[: len(y)]))[:, 0]),
    "tokens": lambda: timm_small("vit_tiny_patch16_224", num_classes=0, global_pool=""),
    "pooled by attention": lambda: timm_small("vit_base_patch16_siglip_224", num_classes=0),
    "pyramid": lambda: Then(backbone(), lambda m, f: [f[:, :, None, None], f[:, :, None]]),
    "dict": lambda: Then(small_vit(depth=1), lambda m, y: {"last_hidden_state": y[:, None], "pooler_output": y}),
    "taken out of a dict": lambda: Then(
        Then(small_vit(depth=1), lambda m, y: {"image_embeds": y}), lambda m, y: y["image_embeds"]
    ),
    "asked": lambda: asked(small_vit(depth=1), True),
    "asked inside": lambda: nn.Sequential(asked(small_vit(depth=1), True)),
}


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(5, 48))

    def forward(self, f: torch.Tensor) -> torch.Tensor:
        return -(f[:, None] - self.prototypes).square().sum(-1)


def asked(model: Any, features: bool) -> nn.Module:
    model.vitreous_embeds = features
    return model


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classes(name: str) -> None:
    assert not embeds(CLASSIFIERS[name](), X)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_features(name: str) -> None:
    assert embeds(EMBEDDERS[name](), X)


def test_leaves_the_model_as_it_was_and_notices_another_head() -> None:
    model: Any = small_vit(depth=1).train()
    assert not embeds(model, X)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    model.head = nn.Identity()
    assert embeds(model, X)


def test_quantized_and_shortened_models_still_classify() -> None:
    images = torch.randn(16, 3, 32, 32)
    small = vt.slim(small_vit(depth=2), [vt.tokens.EViT(0.7, at=(0,)), vt.quant.RepQ()], calibration=images)
    assert not embeds(small, X)


def test_tensors_by_name() -> None:
    a, b, c = (torch.full((1, i), float(i)) for i in (1, 2, 3))
    pair = namedtuple("pair", "first second")
    assert list(tensors(a)) == ["output"]
    assert list(tensors((a, [b, None, c]))) == ["0", "1.0", "1.2"]
    assert list(tensors(pair(a, {"x": b}))) == ["first", "second.x"]
    assert list(tensors(SimpleNamespace(tokens=b, n=3, logits=a))) == ["tokens", "logits"]
    assert answer(SimpleNamespace(tokens=b, logits=a)) is a
    assert answer({"last_hidden_state": a, "pooler_output": b, "loss": c}) is b
    assert answer([c, a]) is c
    with pytest.raises(vt.VitreousError, match="no tensor"):
        answer({"loss": None})
