"""Vision transformers that people write themselves: torch's own encoder, attention by any name, tokens in any order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import vitreous as vt
from vitreous.errors import VitreousError

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MANY = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Encoder(nn.Module):
    """A ViT on `torch.nn.TransformerEncoder`; its class token first or last, its tokens before the images or after."""

    def __init__(self, first: bool = True, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.batch_first = first, batch_first
        self.embed, self.cls = nn.Conv2d(3, 48, 8, 8), nn.Parameter(torch.randn(1, 1, 48))
        self.pos = nn.Parameter(torch.randn(1, 17, 48))
        layer = nn.TransformerEncoderLayer(48, 3, 96, 0.0, norm_first=True, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 7)
        for p in self.encoder.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.2)

    def forward(self, images: Tensor) -> Tensor:
        x, cls = self.embed(images).flatten(2).mT, self.cls.expand(len(images), -1, -1)
        x = torch.cat([cls, x] if self.first else [x, cls], 1) + self.pos
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(self.norm(x[:, 0 if self.first else -1]))


class MSA(nn.Module):
    """Attention that no name tells; with fewer heads of keys than of queries where `kv` is less."""

    def __init__(self, kv: int = 4) -> None:
        super().__init__()
        self.kv, self.to_q, self.to_kv, self.last = kv, nn.Linear(48, 48), nn.Linear(48, 24 * kv), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, kv = (t.unflatten(-1, (-1, 12)).transpose(1, 2) for t in (self.to_q(x), self.to_kv(x)))
        k, v = kv.chunk(2, 1)
        return self.last(F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv < 4).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, kv: int) -> None:
        super().__init__()
        self.a, self.b, self.mixing = nn.LayerNorm(48), nn.LayerNorm(48), MSA(kv)
        self.feed = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(self.a(x))
        return x + self.feed(self.b(x))


class Unnamed(nn.Module):
    def __init__(self, kv: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.pos = nn.Conv2d(3, 48, 8, 8), nn.Parameter(torch.randn(1, 16, 48))
        self.layers = nn.Sequential(Layer(kv), Layer(kv))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 7)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(images).flatten(2).mT + self.pos)).mean(1))


@pytest.mark.parametrize(
    "step", [vt.tokens.EViT(keep=1.0), vt.tokens.ToMe(r=2), vt.prune.Heads(share=0.3), vt.quant.RepQ()], ids=str
)
def test_torchs_own_encoder_goes_through_every_kind_of_step(step: Any) -> None:
    model = Encoder().eval()
    small = vt.slim(model, step, MANY)
    off = (small(X) - model(X)).norm() / model(X).norm()
    assert off < 1e-5 if step == vt.tokens.EViT(keep=1.0) else 1e-5 < off < 0.5
    assert vt.read(model).grid == (4, 4) and vt.read(model).prefix == 1


def test_a_class_token_behind_the_patches_is_not_taken_for_one_before_them() -> None:
    model = Encoder(first=False).eval()
    with pytest.raises(VitreousError, match=r"see\.rollout reads patches after all other tokens, but Encoder has 1 of 17 tokens"):
        vt.see.rollout(model, X)
    with pytest.raises(VitreousError, match="1 of 17 tokens, no patches, behind the patches: put class and other tokens first"):
        vt.slim(model, vt.tokens.EViT())
    registers = pytest.importorskip("vit_pytorch.simple_vit_with_register_tokens")
    size = dict(image_size=32, patch_size=8, num_classes=7, dim=48, depth=1, heads=3, mlp_dim=96, num_register_tokens=4)
    with pytest.raises(VitreousError, match="4 of 20 tokens"):
        vt.see.rollout(registers.SimpleViT(**size).eval(), X)


def test_a_configuration_that_tells_of_fewer_tokens_is_not_believed() -> None:
    size = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8)
    model: Any = transformers.ViTForImageClassification(transformers.ViTConfig(**size, num_labels=7)).eval()
    assert vt.read(model).grid == (4, 4)
    model = copy.deepcopy(model)
    more = torch.randn(1, 3, 48)
    model.vit.embeddings.register_forward_hook(lambda _, __, x: torch.cat([x, more.expand(len(x), -1, -1)], 1))
    with pytest.raises(VitreousError, match="3 of 20 tokens, no patches, behind the patches"):
        vt.see.rollout(model, X)


def test_tokens_before_images_are_shown_when_the_grid_is_told_and_refused_with_the_reason() -> None:
    model, usual = Encoder(batch_first=False).eval(), Encoder().eval()
    assert torch.equal(model(X), usual(X))
    with pytest.raises(VitreousError, match="build it with batch_first=True, which takes the same weights"):
        vt.slim(model, vt.tokens.EViT())
    with pytest.raises(VitreousError, match=r"tell it by vitreous\.read\(model, grid="):
        vt.see.rollout(model, X)
    vt.read(model, grid=(4, 4), prefix=1)
    assert torch.allclose(vt.see.rollout(model, X), vt.see.rollout(usual, X), atol=1e-6)


def test_attention_by_any_name_is_found_by_what_it_computes() -> None:
    model = Unnamed().eval()
    anatomy = vt.read(model)
    assert [b.attention.name for b in anatomy.blocks] == ["layers.0.mixing", "layers.1.mixing"] and anatomy.grid == (4, 4)
    with vt.glass(model) as g:
        model(X)
    assert [tuple(a.shape) for a in g.attention] == [(2, 4, 16, 16)] * 2
    assert vt.read(nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))).attention == ()


def test_shared_keys_are_attention_too() -> None:
    model = Unnamed(kv=2).eval()
    with vt.glass(model) as g:
        answers = model(X)
    assert [tuple(a.shape) for a in g.attention] == [(2, 4, 16, 16)] * 2
    assert torch.allclose(answers, model(X), atol=1e-5)
    maps = vt.see.rollout(model, X)
    vt.read(model, grid=(4, 4), prefix=0)
    assert maps.shape == (2, 4, 4) and torch.equal(vt.see.rollout(model, X), maps)


class Wide(Unnamed):
    """Made for pictures twice as wide as tall, of which no attribute tells; inside of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(1, 32, 48))


def test_a_wide_grid_is_told_by_the_picture() -> None:
    x = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    for model in (Wide().eval(), nn.Sequential(nn.Identity(), Wide()).eval()):
        assert vt.see.rollout(model, x).shape == vt.see.lrp(model, x, target=[0]).shape == (1, 4, 8)


def test_blocks_are_found_inside_of_a_wrapper_whatever_their_norms_are_called() -> None:
    model = nn.Sequential(nn.Identity(), Unnamed()).eval()
    assert [b.name for b in vt.read(model).blocks] == ["1.layers.0", "1.layers.1"] and vt.read(model).plain
