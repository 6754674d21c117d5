"""SiT: LV-ViT whose blocks slim their tokens. Zong et al., "Self-slimmed Vision Transformer" (ECCV 2022).

Facts from the official repository, Sense-X/SiT. LV-ViT is Jiang et al., "All Tokens Matter: Token Labeling for Training Better
Vision Transformers" (NeurIPS 2021).
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, cast

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..blocks import PlainBlock
from ..errors import VitreousError
from ..tokens.slimming import ReverseSlimming, TokenSlimmingModule, init_linears
from .official import official

STEMS = {"4c": ((8, 2), (4, 2), (2, 2), (1, 2)), "6c": ((8, 2), (8, 1), (8, 1), (4, 2), (2, 2), (1, 2))}  # width / n, stride


class Stem(nn.Sequential):
    """Images `[B, C, H, W]` to patches `[B, H/16 · W/16, width]`: 3 × 3 convolutions, each with BatchNorm, GELU between them."""

    def __init__(self, kind: str, img_size: tuple[int, int], patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        if kind not in STEMS:
            self.proj = nn.Conv2d(in_chans, width, patch_size, patch_size)
            return
        for i, (part, stride) in enumerate(STEMS[kind], start=1):
            if i > 1:
                self.add_module(f"act{i - 1}", nn.GELU())
            self.add_module(f"conv{i}", nn.Conv2d(in_chans, width // part, 3, stride, 1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width // part))
            in_chans = width // part

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flatten(2).mT


class Divide(nn.Module):
    """Where other blocks have a layer scale: the residual branch divided by LV-ViT's constant."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by


class SiT(nn.Module):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`.

    stage_blocks: blocks a stage; after each stage but the last the patches are slimmed to `int(patches · keeping_ratio**stage)`.
    distillation_type: "frd" for SiT; None for LV-ViT, the teacher, which slims nothing; to timm's
        `create_model`, which drops what is None, "none".
    p_emb: "4c" or "6c", a stem of 4 or 6 convolutions and a stride of 16; anything else one convolution by `patch_size`.
    skip_lam: every residual branch is divided by it.

    `rtsm` (reverse modules) and `aux_head` (token labeling's, frozen) are in official checkpoints; `forward` uses neither.
    Training as published: `vitreous.learn.frd`. The blocks are plain ones whose reducers are the slimming modules, so that
    every step, `traced` and `rollout` work on it.
    """

    head: nn.Module
    aux_head: nn.Module

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        p_emb: str = "4c",
        skip_lam: float = 2.0,
        stage_blocks: tuple[int, ...] = (9, 3, 2, 2),
        keeping_ratio: float = 0.5,
        distillation_type: str | None = "frd",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < keeping_ratio <= 1:
            raise VitreousError(f"SiT: keeping_ratio must lie in (0, 1], not {keeping_ratio}")
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if distillation_type not in (None, "none", "frd"):
            raise VitreousError(f"SiT: distillation_type must be 'frd', or None for the teacher, not {distillation_type!r}")
        if sum(stage_blocks) != depth:
            raise VitreousError(f"SiT: the stages {tuple(stage_blocks)} must add up to the depth {depth}")
        if size[0] % patch_size or size[1] % patch_size or (p_emb in STEMS and patch_size != 16):
            raise VitreousError(
                f"SiT: images of {size} do not divide into patches of {patch_size}; stem '{p_emb}' has patches of 16"
            )
        self.img_size, self.num_classes = size, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens, self.global_pool = 1, "token"
        self.patch_embed = Stem(p_emb, size, patch_size, in_chans, embed_dim)
        patches = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)

        blocks = []
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        for i in range(depth):
            block: Any = Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rates[i],
                norm_layer=nn.LayerNorm,
            )
            block.ls1, block.ls2 = Divide(skip_lam), Divide(skip_lam)
            blocks.append(PlainBlock(block, f"blocks.{i}", last=i == depth - 1))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim)
        self._set_heads(num_classes)
        if distillation_type == "frd":
            self._slim(blocks, stage_blocks, patches, keeping_ratio)
        init_linears(self)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    def _slim(self, blocks: list[PlainBlock], stages: tuple[int, ...], patches: int, ratio: float) -> None:
        ends = {sum(stages[:i]) - 1: max(int(patches * ratio**i), 1) for i in range(1, len(stages))}
        self.rtsm, keep = nn.ModuleList(), patches
        for i, block in enumerate(blocks):
            if i in ends:
                keep = ends[i]
                block.reducers.append(TokenSlimmingModule(self.embed_dim, keep, self.num_prefix_tokens))
            self.rtsm.append(ReverseSlimming(self.embed_dim, keep, patches) if keep < patches else nn.Identity())

    def _set_heads(self, num_classes: int) -> None:
        for name in ("head", "aux_head"):
            setattr(self, name, nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity())
        self.aux_head.requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes`; 0 leaves the class token's features."""
        if global_pool not in (None, "token"):
            raise VitreousError(f"SiT reads its class token: global_pool cannot be {global_pool!r}")
        self.num_classes = num_classes
        self._set_heads(num_classes)
        reference = self.cls_token
        for head in (self.head, self.aux_head):
            init_linears(head.to(reference.device, reference.dtype))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to `[B, 1 + tokens left, width]`, the class token first."""
        if x.ndim != 4 or tuple(x.shape[-2:]) != self.img_size:
            raise VitreousError(
                f"SiT was built for images of {self.img_size}, not {list(x.shape)}: give img_size when creating it"
            )
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return self.norm(self.blocks(self.pos_drop(x + self.pos_embed)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def convert(state: dict[str, Tensor], stages: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Official names to ours: slimming modules lie in the blocks that they follow, both linears of an MLP in a sequence."""
    ends = [sum(stages[: i + 1]) - 1 for i in range(len(stages))]
    state = {re.sub(r"^tsm\.(\d+)", lambda m: f"blocks.{ends[int(m[1])]}.reducers.0", k): v for k, v in state.items()}
    return {re.sub(r"^(rtsm\.\d+\.mlp\d)\.fc(\d)", lambda m: f"{m[1]}.{2 * int(m[2]) - 2}", k): v for k, v in state.items()}


SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=320, depth=14, num_heads=5, stage_blocks=(1, 1, 1, 11)),
    "xsmall": dict(embed_dim=384, depth=16, num_heads=6, stage_blocks=(1, 1, 1, 13)),
    "small": dict(embed_dim=384, depth=16, num_heads=6, stage_blocks=(9, 3, 2, 2)),
    "medium": dict(embed_dim=512, depth=20, num_heads=8, stage_blocks=(10, 4, 3, 3)),
    "large": dict(embed_dim=768, depth=24, num_heads=12, stage_blocks=(10, 4, 3, 7), img_size=288, p_emb="6c", skip_lam=3.0),
}


def _cfg(size: str) -> dict[str, Any]:
    side = SIZES[size].get("img_size", 224)
    return dict(
        num_classes=1000,
        input_size=(3, side, side),
        fixed_input_size=True,
        crop_pct=0.9,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="patch_embed.conv1",
        classifier="head",
    )


default_cfgs = generate_default_cfgs(
    {f"{name}_{size}": _cfg(size) for size in SIZES for name in ("sit_lvvit", "lvvit") if (name, size) != ("lvvit", "xsmall")}
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> SiT:
    family, _, size = name.rpartition("_")
    given = {"distillation_type": "frd" if family == "sit_lvvit" else None, **SIZES[size], **kwargs}
    return cast(SiT, build_model_with_cfg(SiT, name, pretrained, **given))


@register_model
def sit_lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT-T: 15.9 M parameters without the reverse modules, 1.0 GMACs, 80.1 % top-1 (published)."""
    return _create("sit_lvvit_tiny", pretrained, kwargs)


@register_model
def sit_lvvit_xsmall(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT-XS: 25.6 M parameters without the reverse modules, 1.5 GMACs, 81.2 % top-1 (published)."""
    return _create("sit_lvvit_xsmall", pretrained, kwargs)


@register_model
def sit_lvvit_small(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT-S: 25.6 M parameters without the reverse modules, 4.0 GMACs, 83.1 % top-1 (published)."""
    return _create("sit_lvvit_small", pretrained, kwargs)


@register_model
def sit_lvvit_medium(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT-M: 55.6 M parameters without the reverse modules, 8.1 GMACs, 84.2 % top-1 (published)."""
    return _create("sit_lvvit_medium", pretrained, kwargs)


@register_model
def sit_lvvit_large(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT-L at 288 pixels: 148.2 M parameters without the reverse modules, 34.4 GMACs, 85.6 % top-1 (published)."""
    return _create("sit_lvvit_large", pretrained, kwargs)


@register_model
def lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> SiT:
    """LV-ViT-T, SiT-T's teacher: 15.7 M parameters, 3.5 GMACs, 81.8 % top-1 (published)."""
    return _create("lvvit_tiny", pretrained, kwargs)


@register_model
def lvvit_small(pretrained: bool = False, **kwargs: Any) -> SiT:
    """LV-ViT-S, teacher of SiT-XS and SiT-S: 25.4 M parameters, 5.5 GMACs, 83.1 % top-1 (published)."""
    return _create("lvvit_small", pretrained, kwargs)


@register_model
def lvvit_medium(pretrained: bool = False, **kwargs: Any) -> SiT:
    """LV-ViT-M, SiT-M's teacher: 55.2 M parameters, 11.9 GMACs, 84.0 % top-1 (published)."""
    return _create("lvvit_medium", pretrained, kwargs)


@register_model
def lvvit_large(pretrained: bool = False, **kwargs: Any) -> SiT:
    """LV-ViT-L at 288 pixels, SiT-L's teacher: 147 M parameters, 56.1 GMACs, 85.3 % top-1 (published)."""
    return _create("lvvit_large", pretrained, kwargs)


for _build in (sit_lvvit_tiny, sit_lvvit_xsmall, sit_lvvit_small, sit_lvvit_medium, sit_lvvit_large):
    _size = _build.__name__.rpartition("_")[2]
    official(f"sit--{_size}", _build, partial(convert, stages=SIZES[_size]["stage_blocks"]))
for _build in (lvvit_tiny, lvvit_small, lvvit_medium, lvvit_large):
    official(f"sit--{_build.__name__}", _build, convert)
