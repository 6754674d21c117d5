"""ViT-ResNAS: a vision transformer of three stages, found in a supernet that runs many networks in one batch.

Liao, Karaman and Sze, "Searching for Efficient Multi-Stage Vision Transformers" (2021). Facts from the official repository,
yilunliao/vit-search. `learn.MultiArchitecture` trains the supernet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import conv_norm, require_size
from .classifier import Classifier
from .official import family, official, publish, renamed

EPS = 1e-6
PATCH = 14


@dataclass(frozen=True)
class Sizes:
    """How much of the net each image of a batch runs through; numbers `[B]` each: widths of the three stages, and of each block
    heads, hidden units, and whether it is there (1 or 0)."""

    widths: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    present: tuple[Tensor, ...]


def prefix(count: Tensor, size: int) -> Tensor:
    """`[B]` numbers to masks `[B, 1, size]` that are true at the first so many."""
    return (torch.arange(size, device=count.device) < count[:, None])[:, None]


def masked_layer_norm(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """Layer norm over the channels that `mask` `[B, 1, C]` keeps, zero elsewhere; `x` `[B, N, C]` is zero there already. Mean and
    variance are divided by the number kept, so that it is the norm of the smaller network."""
    kept = mask.sum(-1, keepdim=True)
    mean = x.sum(-1, keepdim=True) / kept
    variance = (x * x).sum(-1, keepdim=True) / kept - mean * mean
    return ((x - mean) / (variance + eps).sqrt() * weight + bias) * mask


class Norm(nn.LayerNorm):
    """LayerNorm of all channels, or of those that a mask keeps."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x) if mask is None else masked_layer_norm(x, mask, self.weight, self.bias)


class Attention(nn.Module):
    """Softmax attention whose heads are `head_dim` wide, whatever the width of the tokens; `[B, N, C]`."""

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.qkv, self.proj = nn.Linear(channels, 3 * inner), nn.Linear(inner, channels)

    def forward(self, x: Tensor, count: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        if count is not None:
            y = y * prefix(count, self.heads)[..., None]
        return self.proj(y.flatten(2))


class Block(nn.Module):
    """Pre-norm attention and MLP; `[B, N, C]`."""

    def __init__(self, channels: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = Norm(channels), Attention(channels, heads, head_dim)
        self.norm2, self.fc1, self.fc2 = Norm(channels), nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None, sizes: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        heads, hidden, present = sizes if sizes is not None else (None, None, None)
        there = None if mask is None or present is None else mask * present[:, None, None]
        y = self.attn(self.norm1(x, mask), heads)
        x = x + (y if there is None else y * there)
        y = F.gelu(self.fc1(self.norm2(x, mask)))
        y = self.fc2(y if hidden is None else y * prefix(hidden, y.shape[2]))
        return x + (y if there is None else y * there)


class ResidualReduction(nn.Module):
    """Tokens `[B, 1 + N, C]` to `[B, 1 + N / 4, C']`: a strided convolution of the normalised patches and a linear layer for the
    class token, beside which an average of 2 × 2 passes by, channels that it lacks filled with zeros (section 3.2)."""

    def __init__(self, side: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.side, self.norm = side, Norm(inputs)
        self.patch_reduce = nn.Conv2d(inputs, outputs, 3, 2, 1)
        self.token_transform = nn.Linear(inputs, outputs)
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side // 4, outputs))
        trunc_normal_(self.pos_embed, std=0.02)
        self.wider = outputs - inputs

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        as_map = lambda t: t[:, 1:].mT.unflatten(2, (self.side, self.side))
        passed = torch.cat([x[:, :1], F.avg_pool2d(as_map(x), 2).flatten(2).mT], 1)
        x = self.norm(x, mask)
        patches = self.patch_reduce(as_map(x)).flatten(2).mT + self.pos_embed
        return torch.cat([self.token_transform(x[:, :1]), patches], 1) + F.pad(passed, (0, self.wider))


class Stem(nn.Module):
    """Images to patches of 14 × 14 by three convolutions with a shortcut, and a last one; `[B, N, C]`."""

    def __init__(self, in_chans: int, middle: int, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            conv_norm(in_chans, middle, 3, 2),
            conv_norm(middle, middle, 3),
            conv_norm(middle, middle, 3),
        )
        self.proj = nn.Conv2d(middle, width, PATCH // 2, PATCH // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return self.proj(x + F.relu(self.conv3(F.relu(self.conv2(x))))).flatten(2).mT


class ViTResNAS(Classifier):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`.

    widths, head_dims, depths: of the three stages. heads, hidden: of each block. middle: channels of the stem. With `sizes` each
    image of the batch runs through a network of its own, smaller one. `patch_head` reads the patches, in training alone.
    """

    global_pool = "token"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        widths: Sequence[int] = (176, 352, 704),
        head_dims: Sequence[int] = (32, 48, 64),
        depths: Sequence[int] = (5, 6, 5),
        heads: Sequence[int] = (),
        hidden: Sequence[int] = (),
        middle: int = 24,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(widths[-1], drop_rate)
        height, width = cast(tuple[int, int], to_2tuple(img_size))
        if height != width or height % (4 * PATCH):
            raise VitreousError(f"ViTResNAS: images are squares, their side a multiple of {4 * PATCH}, not {height} × {width}")
        if not len(heads) == len(hidden) == sum(depths) or not len(widths) == len(head_dims) == len(depths) == 3:
            raise VitreousError("ViTResNAS: give three widths, head widths and depths, and heads and hidden units of every block")
        self.img_size, side = (height, width), height // PATCH
        self.patch_embed = Stem(in_chans, middle, widths[0])
        self.patch_embed.img_size = self.img_size  # type: ignore[assignment]  # what prepares pictures reads it there
        self.cls_token = nn.Parameter(torch.zeros(1, 1, widths[0]))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, widths[0]))
        self.stages, self.reductions, n = nn.ModuleList(), nn.ModuleList(), 0
        for i, (width, d, depth) in enumerate(zip(widths, head_dims, depths, strict=True)):
            blocks = (Block(width, h, d, m) for h, m in zip(heads[n : n + depth], hidden[n : n + depth], strict=True))
            self.stages.append(nn.ModuleList(blocks))
            n += depth
            if i < 2:
                self.reductions.append(ResidualReduction(side // 2**i, width, widths[i + 1]))
        self.norm = Norm(widths[-1])
        self.patch_head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        self.reset_classifier(num_classes)

    @property
    def widths(self) -> list[int]:
        """Channels of the stages."""
        return [blocks[0].norm1.normalized_shape[0] for blocks in self.staged]

    @property
    def staged(self) -> list[list[Any]]:
        """The blocks of each stage."""
        return [list(cast(Any, stage)) for stage in self.stages]

    @property
    def removable(self) -> list[bool]:
        """Of each block whether a smaller network may leave it out: every second of a stage."""
        return [i % 2 == 1 for blocks in self.staged for i in range(len(blocks))]

    def forward_features(self, x: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Images to tokens `[B, 1 + N, C]`, the class token first."""
        require_size(x, self.img_size, "ViTResNAS")
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        mask, n = None, 0
        for i, stage in enumerate(self.staged):
            if i:
                x = self.reductions[i - 1](x, mask)
            if sizes is not None:
                mask = prefix(sizes.widths[i], x.shape[2])
                x = x * mask
            for block in stage:
                x = block(x, mask, None if sizes is None else (sizes.heads[n], sizes.hidden[n], sizes.present[n]))
                n += 1
        return self.norm(x, mask)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    reductions = sorted(int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.patch_reduce\.weight", k)))

    def place(m: re.Match[str]) -> str:
        i = int(m[1])
        stage = sum(r < i for r in reductions)
        return f"reductions.{stage}." if i in reductions else f"stages.{stage}.{i - (reductions[stage - 1] + 1 if stage else 0)}."

    state = renamed(
        state,
        (r"^tokens$", "cls_token"),
        (r"^cls_head\.", "head."),
        (r"^patch_embed\.conv_proj\.", "patch_embed.proj."),
        (r"^patch_embed\.conv(\d)\.conv\.", r"patch_embed.conv\1.0."),
        (r"^patch_embed\.conv(\d)\.bn\.", r"patch_embed.conv\1.1."),
        (r"\.mlp\.fc(\d)\.", r".fc\1."),
    )
    return {re.sub(r"^blocks\.(\d+)\.", place, k): v for k, v in state.items()}


def told(state: dict[str, Tensor]) -> dict[str, Any]:
    """With which `ViTResNAS` has such weights, of heads 32, 48 and 64 wide as its searches have them."""
    stages = [sorted({int(k.split(".")[2]) for k in state if k.startswith(f"stages.{i}.")}) for i in range(3)]
    blocks = [(d, f"stages.{i}.{n}") for i, d in enumerate((32, 48, 64)) for n in stages[i]]
    return dict(
        img_size=PATCH * math.isqrt(state["pos_embed"].shape[1] - 1),
        widths=[len(state[f"stages.{i}.0.norm1.weight"]) for i in range(3)],
        depths=[len(s) for s in stages],
        heads=[len(state[f"{at}.attn.qkv.weight"]) // (3 * d) for d, at in blocks],
        hidden=[len(state[f"{at}.fc1.weight"]) for _, at in blocks],
        middle=len(state["patch_embed.conv1.0.weight"]),
    )


TINY: dict[str, Any] = dict(
    heads=(3, 3, 3, 4, 4, 10, 8, 8, 8, 10, 10, 10, 10, 10, 8, 8),
    hidden=(704, 576, 640, 576, 704, 1408, 1408, 1280, 1408, 1280, 1024, 2560, 1792, 2816, 2816, 2560),
)
SMALL: dict[str, Any] = dict(
    widths=(220, 440, 880),
    depths=(6, 6, 5),
    heads=(5, 5, 7, 5, 5, 5, 10, 10, 10, 10, 12, 12, 16, 12, 16, 12, 14),
    hidden=(880, 880, 800, 720, 720, 720, 1760, 1440, 1920, 1600, 1600, 1440, 3200, 3200, 2880, 2240, 2560),
)
MEDIUM: dict[str, Any] = dict(
    widths=(240, 640, 880),
    depths=(7, 7, 6),
    heads=(7, 6, 7, 8, 7, 8, 6, 10, 14, 14, 16, 14, 16, 16, 16, 10, 16, 12, 16, 14),
    hidden=(960, 960, 800, 960, 880, 880, 800, 1120, 1760, 1920, 1760, 1440, 1760, 1920, 3200, 3840, 3840, 3200, 3520, 3520),
)
for size, shape in (("tiny", TINY), ("small", SMALL), ("medium", MEDIUM)):
    publish(
        ViTResNAS, f"vit_resnas_{size}", shape, variant=f"vit-resnas--resnas_{size}", convert=convert,
        first_conv="patch_embed.conv1.0", classifier=("head", "patch_head"), fixed_input_size=True,
    )  # fmt: skip
# The network by hand that the paper compares with.
BY_HAND: dict[str, Any] = dict(
    widths=(192, 384, 768), head_dims=(64, 64, 64), depths=(4, 4, 4), heads=[n for n in (3, 6, 12) for _ in range(4)],
    hidden=[4 * c for c in (192, 384, 768) for _ in range(4)],
)  # fmt: skip
official("vit-resnas--res_tiny_reference", partial(ViTResNAS, **BY_HAND), convert)
family("vit-resnas", ViTResNAS, convert, told)
