"""Vision transformers from where people have them, each small, with random weights, and made without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from support import small_vit
from torch import Tensor, nn

SIDE = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8)


def drawn(model: nn.Module) -> nn.Module:
    """Weights, scales and biases large enough that every part matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (p.ndim < 2) * 0.3)
    return model.eval()


def timm_model(name: str, **arguments: Any) -> nn.Module:
    shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7)
    model = timm.create_model(name, **{**shape, **arguments})
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    return drawn(model)


class Normalised(nn.Module):
    """A user's wrapper: it prepares the images, asks a backbone and puts a head of its own on it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.linear = backbone, nn.Linear(48, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.backbone((x - 0.1) / 0.9))


class Cosine(nn.Module):
    """A head of directions, one a class."""

    def __init__(self) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.randn(7, 48))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.normalize(x, dim=-1) @ F.normalize(self.directions, dim=-1).mT


class OwnAttention(nn.Module):
    """As many write it with einops: the norm inside, one layer for queries, keys and values, head by head."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.h = heads
        self.prenorm = nn.LayerNorm(dim)
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.prenorm(x)).unflatten(-1, (self.h, 3, -1)).permute(3, 0, 2, 1, 4)
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.to_out((a @ v).transpose(1, 2).flatten(2))


class OwnBlock(nn.Module):
    """An MLP without a module, its activation a function."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.mixer, self.ln = OwnAttention(dim, heads), nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.scale_a, self.scale_b = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale_a * self.mixer(x)
        return x + self.scale_b * self.down(F.gelu(self.up(self.ln(x))))


class OwnViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(3, 48, 8, 8)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 48)), nn.Parameter(torch.zeros(1, 17, 48))
        self.trunk = nn.ModuleList([OwnBlock(48, 3) for _ in range(3)])
        self.final, self.answers = nn.LayerNorm(48), nn.Linear(48, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patchify(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.trunk:
            x = block(x)
        return self.answers(self.final(x)[:, 0])


def vit_pytorch(kind: str = "vit", **arguments: Any) -> nn.Module:
    module = pytest.importorskip(f"vit_pytorch.{kind}")
    made = dict(image_size=32, patch_size=8, num_classes=7, dim=48, depth=3, heads=3, mlp_dim=96, dim_head=16)
    model = next(getattr(module, n) for n in ("ViT", "SimpleViT") if hasattr(module, n))
    return drawn(model(**made | arguments))


def open_clip_tower(**arguments: Any) -> nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    made = dict(image_size=32, patch_size=8, width=48, layers=3, heads=3, mlp_ratio=2.0, output_dim=24)
    return drawn(transformer.VisionTransformer(**made | arguments))


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    return drawn(peft.get_peft_model(small_vit(depth=3), peft.LoraConfig(target_modules=["qkv", "fc1"], r=4)))


def hugging_face(name: str, **arguments: Any) -> nn.Module:
    config = getattr(transformers, f"{name.removesuffix('Model').removesuffix('ForImageClassification')}Config")
    return drawn(getattr(transformers, name)(config(**SIDE | arguments)))


@dataclass(frozen=True)
class Family:
    make: Callable[[], nn.Module]
    prefix: int = 1
    classifier: str | None = None
    position: str = "absolute"
    export: bool = True


TORCHVISION = dict(image_size=32, patch_size=8, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=7)
FAMILIES: dict[str, Family] = {
    "timm DINOv3": Family(lambda: timm_model("vit_small_patch16_dinov3", num_classes=0), 5, None, "rotary"),
    "timm EVA-02": Family(lambda: timm_model("eva02_tiny_patch14_224"), 1, "head", "rotary"),
    "timm PE": Family(lambda: timm_model("vit_pe_core_tiny_patch16_384", num_classes=7), 1, "head", "rotary"),
    "timm RoPE-ViT": Family(lambda: timm_model("vit_small_patch16_rope_224"), 1, "head", "rotary"),
    "timm RoPE-ViT, mixed": Family(lambda: timm_model("vit_small_patch16_rope_mixed_ape_224"), 1, "head", "rotary"),
    "timm BEiT": Family(lambda: timm_model("beit_base_patch16_224"), 1, "head", "relative"),
    "timm BEiTv2": Family(lambda: timm_model("beitv2_base_patch16_224"), 1, "head", "relative"),
    "timm BEiT, shared": Family(
        lambda: timm_model("beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True), 1, "head", "relative"
    ),
    "timm ViT, relative": Family(lambda: timm_model("vit_relpos_small_patch16_224"), 0, "head", "relative"),
    "timm ViT, relative, of all": Family(lambda: timm_model("vit_srelpos_small_patch16_224"), 0, "head", "relative"),
    "timm ViT, relative, class token": Family(lambda: timm_model("vit_relpos_base_patch16_cls_224"), 1, "head", "relative"),
    "torchvision": Family(lambda: drawn(torchvision.models.VisionTransformer(**cast(Any, TORCHVISION))), 1, "heads.head"),
    "HF ViT": Family(lambda: hugging_face("ViTForImageClassification", num_labels=7), 1, "classifier"),
    "HF DeiT": Family(lambda: hugging_face("DeiTForImageClassification", num_labels=7), 2, "classifier"),
    "HF DINOv2": Family(lambda: hugging_face("Dinov2Model")),
    "HF DINOv2, registers": Family(lambda: hugging_face("Dinov2WithRegistersModel", num_register_tokens=2), 3),
    "HF DINOv3": Family(lambda: hugging_face("DINOv3ViTModel", num_register_tokens=2), 3, None, "rotary"),
    "HF CLIP": Family(lambda: hugging_face("CLIPVisionModel"), 1),
    "HF SigLIP": Family(lambda: hugging_face("SiglipVisionModel"), 0),
    "HF AIMv2": Family(lambda: hugging_face("Aimv2VisionModel"), 0),
    "open_clip": Family(open_clip_tower),
    "open_clip, layer scale": Family(lambda: open_clip_tower(ls_init_value=0.5)),
    "vit-pytorch": Family(vit_pytorch, 1, "mlp_head"),
    "vit-pytorch, SimpleViT": Family(lambda: vit_pytorch("simple_vit"), 0, "linear_head"),
    "own, einops": Family(lambda: drawn(OwnViT()), 1, "answers"),
    "Sequential(normalise, vit)": Family(lambda: nn.Sequential(nn.Identity(), small_vit(depth=3)).eval(), 1, "1.head"),
    "backbone and own head": Family(lambda: drawn(Normalised(small_vit(depth=3, num_classes=0))), 1, "linear"),
    "backbone and cosine head": Family(lambda: drawn(nn.Sequential(small_vit(depth=3, num_classes=0), Cosine())), 1, "1"),
    "DataParallel": Family(lambda: nn.DataParallel(small_vit(depth=3)).eval(), 1, "module.head"),
    "compiled": Family(lambda: cast(nn.Module, torch.compile(small_vit(depth=3), backend="eager")), 1, "_orig_mod.head"),
    "LoRA": Family(lora, 1, "base_model.model.head"),
}
