"""SpectFormer: the first blocks filter the spectrum of the tokens, the later ones attend.

Patro, Namboodiri and Agneeswaran, "SpectFormer: Frequency and Attention is what you need in a Vision Transformer" (WACV 2025).
Facts from the official repository, badripatro/SpectFormers. The Fourier transform is a product of matrices here, which every
runtime has. The official vanilla file fixes 6 heads, and says 4 for tiny and 12 for base; neither divides base's 512 channels, so
that base has 8 here, each as wide as in the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import Attention, DropPath, Mlp, PatchEmbed, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import model_entrypoint
from timm.models.cait import ClassAttn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import DepthwiseMlp, conv_norm, irfft2, patch_grid, require_size, rfft2
from .classifier import Classifier, Pyramid, init_weights
from .official import official, publish, renamed

Norm = partial(nn.LayerNorm, eps=1e-6)
Grid = tuple[int, int]


class SpectralGatingNetwork(nn.Module):
    """Tokens `[B, h · w, C]` of the grid (h, w) convolved with one learned kernel a channel, as large as the grid (section 3.1).

    complex_weight: what multiplies the half spectrum, `[h, w // 2 + 1, C, 2]`. In float32, whatever the model's precision.
    """

    def __init__(self, channels: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.complex_weight = nn.Parameter(0.02 * torch.randn(grid[0], grid[1] // 2 + 1, channels, 2))

    def forward(self, x: Tensor) -> Tensor:
        real, imaginary = rfft2(x.mT.unflatten(2, self.grid).float())
        a, b = self.complex_weight.float().permute(3, 2, 0, 1)
        y = irfft2(a * real - b * imaginary, a * imaginary + b * real, self.grid[1])
        return y.flatten(2).mT.to(x.dtype)


class SpectralBlock(nn.Module):
    """x + mlp(norm2(filter(norm1(x)))): one residual around both; `[B, N, C]`."""

    def __init__(self, channels: int, grid: Grid, mlp_ratio: float, drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.filter = Norm(channels), SpectralGatingNetwork(channels, grid)
        self.norm2, self.mlp = Norm(channels), Mlp(channels, int(channels * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(self.filter(self.norm1(x)))))


class SpectFormer(Classifier):
    """The vanilla architecture: images `[B, C, *img_size]` to logits `[B, num_classes]`.

    alpha: how many of the `depth` blocks are spectral.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        alpha: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.img_size = cast(Grid, to_2tuple(img_size))
        grid = patch_grid(self.img_size, patch_size, "SpectFormer")
        self.patch_embed = PatchEmbed(self.img_size, patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(grid), embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.Sequential()
        for i, rate in enumerate(cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))):
            shared: dict[str, Any] = dict(
                qkv_bias=True, norm_layer=Norm, proj_drop=drop_rate, attn_drop=drop_rate, drop_path=rate
            )
            attends = i >= alpha
            self.blocks.append(
                Block(embed_dim, num_heads, mlp_ratio, **shared)
                if attends
                else SpectralBlock(embed_dim, grid, mlp_ratio, drop_rate, rate)
            )
        self.norm = Norm(embed_dim)
        self.apply(init_weights)
        trunc_normal_(self.pos_embed, std=0.02)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to `[B, N, C]`."""
        require_size(x, self.img_size, "SpectFormer")
        return self.norm(self.blocks(self.pos_drop(self.patch_embed(x) + self.pos_embed)))


class StageBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), the MLP with a depthwise convolution; tokens `[B, h · w, C]`."""

    def __init__(self, channels: int, mixer: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = Norm(channels), mixer
        self.norm2, self.mlp = Norm(channels), DepthwiseMlp(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x).mT.unflatten(2, grid)).flatten(2).mT)


class ClassBlock(nn.Module):
    """A map `[B, C, h, w]` to tokens `[B, 1 + h · w, C]`: the mean of all, as a class token, attends to all and has an MLP."""

    def __init__(self, channels: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.attn = Norm(channels), ClassAttn(channels, num_heads, qkv_bias=True)
        self.norm2, self.mlp = Norm(channels), Mlp(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mT
        token = x.mean(1, keepdim=True)
        token = token + self.attn(self.norm1(torch.cat([token, x], 1)))
        return torch.cat([token + self.mlp(self.norm2(token)), x], 1)


class Stem(nn.Sequential):
    """Images `[B, C, *img_size]` to maps `[B, width, H / 2, W / 2]` by three convolutions."""

    def __init__(self, in_chans: int, width: int, img_size: Grid) -> None:
        convs = (conv_norm(in_chans, width, 7, 2), conv_norm(width, width, 3), conv_norm(width, width, 3))
        super().__init__(*(part for conv in convs for part in (conv, nn.ReLU())))
        self.img_size = img_size

    def forward(self, input: Tensor) -> Tensor:
        require_size(input, self.img_size, "SpectFormer")
        return super().forward(input)


class Stage(nn.Module):
    """A map to a map of half the side: a convolution and a norm, blocks on tokens, and `end`."""

    def __init__(self, inputs: int, channels: int, blocks: Iterable[nn.Module], end: nn.Module) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(inputs, channels, 3, 2, 1), nn.LayerNorm(channels)
        self.blocks, self.end = nn.ModuleList(blocks), end

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        grid = (x.shape[2], x.shape[3])
        x = self.norm(x.flatten(2).mT)
        for block in self.blocks:
            x = block(x, grid)
        return self.end(x).mT.unflatten(2, grid)


class SpectFormerH(Pyramid):
    """The hierarchical architecture, two spectral stages and two of attention: `[B, C, *img_size]` to `[B, num_classes]`.

    It was trained by token labeling (Jiang et al., NeurIPS 2021), and its logits are the class token's and half of the largest
    among those that `aux_head` gives of the other tokens. Training with mixed tokens is not part of the model here.
    """

    global_pool = "token"
    aux_head: nn.Module

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_hidden_dim: int = 32,
        embed_dims: Sequence[int] = (64, 128, 320, 448),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (3, 4, 6, 3),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        size = cast(Grid, to_2tuple(img_size))
        if any(side % 8 for side in size):
            raise VitreousError(f"SpectFormer: the sides of img_size {size} must be multiples of 8")
        self.stem = Stem(in_chans, stem_hidden_dim, size)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        inputs = stem_hidden_dim
        for i, (width, heads, ratio) in enumerate(zip(embed_dims, num_heads, mlp_ratios, strict=True)):
            grid = (size[0] >> (i + 2), size[1] >> (i + 2))
            blocks = []
            for rate in rates[i]:
                mixer = SpectralGatingNetwork(width, grid) if i < 2 else Attention(width, heads, qkv_bias=True)
                blocks.append(StageBlock(width, mixer, ratio, rate))
            self.stages.append(Stage(inputs, width, blocks, nn.Identity() if i == len(depths) - 1 else Norm(width)))
            inputs = width
        self.norm = nn.Sequential(ClassBlock(embed_dims[-1], num_heads[-1], mlp_ratios[-1]), Norm(embed_dims[-1]))
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As any classifier's, the auxiliary head with it."""
        super().reset_classifier(num_classes, global_pool)
        main = self.head
        super().reset_classifier(num_classes)
        self.head, self.aux_head = main, self.head

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, **kwargs: Any) -> Any:
        """As any pyramid's, but for `norm`: the final norm is that of tokens with a class token."""
        if norm:
            raise VitreousError("SpectFormer's final norm reads tokens, no map: take the maps with norm=False")
        return super().forward_intermediates(x, indices, **kwargs)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        logits = super().forward_head(x, pre_logits)
        if pre_logits or not self.num_classes:
            return logits
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(1)


def convert_h(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: queries join keys and values, and the linears of an MLP become 1 × 1 convolutions."""
    names = {}
    for key, tensor in state.items():
        part = key.split(".")[0]
        if part.startswith("block"):
            if ".mlp.fc" in key and key.endswith("weight"):
                tensor = tensor[..., None, None]
            if ".attn.q." in key:
                key, tensor = key.replace(".q.", ".qkv."), torch.cat([tensor, state[key.replace(".q.", ".kv.")]])
            elif ".attn.kv." in key:
                continue
        elif part == "post_network" and ".attn.kv." in key:
            names[key.replace(".kv.", ".k.")], names[key.replace(".kv.", ".v.")] = tensor.chunk(2)
            continue
        names[key] = tensor
    names = renamed(
        names,
        (r"^post_network\.0\.", "norm.0."),
        (r"^norm4\.", "norm.1."),
        (r"^patch_embed1\.conv\.([036])\.", r"stem.\1.0."),
        (r"^patch_embed1\.conv\.1\.", "stem.0.1."),
        (r"^patch_embed1\.conv\.4\.", "stem.3.1."),
        (r"^patch_embed1\.conv\.7\.", "stem.6.1."),
        (r"^stem\.3\.", "stem.2."),
        (r"^stem\.6\.", "stem.4."),
        (r"dwconv\.dwconv", "dwconv"),
    )
    stage = {"patch_embed": "", "block": "blocks.", "norm": "end."}
    return {
        re.sub(r"^(patch_embed|block|norm)(\d)\.", lambda m: f"stages.{int(m[2]) - 1}.{stage[m[1]]}", k): v
        for k, v in names.items()
    }


VANILLA: dict[str, dict[str, Any]] = {
    "ti": {},
    "xs": dict(embed_dim=384, num_heads=6),
    "s": dict(embed_dim=384, num_heads=6, depth=19),
    "b": dict(embed_dim=512, num_heads=8, depth=19),
}
HIERARCHICAL: dict[str, dict[str, Any]] = {
    "s": {},
    "b": dict(stem_hidden_dim=64, embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16), depths=(3, 4, 12, 3)),
    "l": dict(stem_hidden_dim=64, embed_dims=(96, 192, 384, 512), num_heads=(3, 6, 12, 16), depths=(3, 6, 18, 3)),
}
for _name, _arguments in VANILLA.items():
    _timm = f"spectformer_vanilla_{_name}"
    publish(
        SpectFormer,
        _timm,
        _arguments,
        variant=f"spectformer--vanilla_{_name}",
        fixed_input_size=True,
        first_conv="patch_embed.proj",
    )
for _name, _arguments in HIERARCHICAL.items():
    _timm = f"spectformer_{_name}"
    _cfg: dict[str, Any] = dict(fixed_input_size=True, first_conv="stem.0.0", classifier=("head", "aux_head"))
    publish(SpectFormerH, _timm, _arguments, variant=f"spectformer--hierarchical_{_name}", convert=convert_h, **_cfg)
    for _alias in (_timm, f"h_{_name}"):
        official(f"spectformer--{_alias}", model_entrypoint(_timm), convert_h)
