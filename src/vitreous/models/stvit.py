"""STViT-R: Swin whose third stage works on semantic tokens and restores the image from them.

Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View" (CVPR 2023). Facts from the official
repository, changsn/STViT-R.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerStage,
    get_relative_position_index,
    window_partition,
    window_reverse,
)
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from ..errors import VitreousError
from .official import official

CYCLE = 6  # blocks from image tokens to semantic tokens and back
KEYS, STRIDE = 10, 4  # side and stride, in patches, of the overlapping windows that semantic tokens are refined by
Pair = tuple[int, int]


class ConvStem(nn.Module):
    """Images `[B, C, H, W]` to patches `[B, H/4, W/4, width]`: two 3 × 3 convolutions of stride 2 with BatchNorm, hard swish."""

    def __init__(self, img_size: int | Pair, patch_size: int, in_chans: int, embed_dim: int, **unused: Any) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        kind: dict[str, Any] = dict(kernel_size=3, stride=2, act_layer=nn.Hardswish)
        self.conv1 = ConvNormAct(in_chans, embed_dim // 2, **kind)
        self.conv2 = ConvNormAct(embed_dim // 2, embed_dim, **kind)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[-2:]) != self.img_size:
            raise VitreousError(
                f"STViT was built for images of {self.img_size}, not {list(x.shape)}: give img_size when creating it"
            )
        return self.conv2(self.conv1(x)).permute(0, 2, 3, 1)


class CrossAttention(nn.Module):
    """Queries from `x` `[B, N, C]`, keys and values from `y` `[B, M, C]`; a relative bias where both are one `grid`."""

    index: Tensor | None

    def __init__(self, dim: int, heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float, grid: Pair | None) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if grid is not None:
            offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
            self.relative_position_bias_table = nn.Parameter(trunc_normal_(torch.zeros(offsets, heads), std=0.02))
        self.register_buffer("index", None if grid is None else get_relative_position_index(*grid), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if self.index is None else self.relative_position_bias_table[self.index].permute(2, 0, 1)
        dropped = self.attn_drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


class CrossBlock(nn.Module):
    """A pre-norm block with layer scale whose keys may be other tokens: `[B, N, C]`, `[B, M, C]` to `[B, N, C]`.

    bias: the grid of the tokens, for a relative position bias. local: `(grid, window)`, to attend within windows of it.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop: float,
        attn_drop: float,
        drop_path: float,
        bias: Pair | None = None,
        local: tuple[Pair, Pair] | None = None,
    ) -> None:
        super().__init__()
        self.local = local
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, heads, qkv_bias, attn_drop, drop, bias)
        self.ls1 = LayerScale(dim, init_values=1e-5)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.ls2 = LayerScale(dim, init_values=1e-5)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        if self.local is None:
            h = self.attn(h, h if y is None else self.norm1(y))
        else:
            grid, window = self.local
            h = window_partition(h.unflatten(1, grid), window).flatten(1, 2)
            h = window_reverse(self.attn(h, h).unflatten(1, window), window, *grid).flatten(1, 2)
        return self.feed(x + self.drop_path(self.ls1(h)))

    def feed(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Generate(CrossBlock):
    """Image tokens `[B, H, W, C]` to semantic tokens `[B, rows · columns, C]`: `pooled` a side in each window.

    A window's tokens start as its adaptive maxima and attend to themselves and to a larger window around it.
    """

    def __init__(self, *args: Any, grid: Pair, window: Pair, pooled: int, conv_pos: bool, shortcut: bool) -> None:
        super().__init__(*args)
        dim = self.norm1.normalized_shape[0]
        self.grid, self.window, self.pooled, self.shortcut = grid, window, pooled, shortcut
        self.conv_pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if conv_pos else None
        larger = tuple((side - KEYS) // STRIDE + 1 for side in grid)
        if larger != (windows := (grid[0] // window[0], grid[1] // window[1])) or min(windows) < 1:
            raise VitreousError(
                f"STViT: the {grid[0]} × {grid[1]} patches of its third stage make {windows} windows of {window}, but {larger} "
                f"of {KEYS} at a stride of {STRIDE}: choose img_size and window_size that agree, as 224 with 7 or 256 with 8"
            )

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        centers = self._pool(window_partition(x, self.window))
        if self.conv_pos is not None:
            centers = centers + self.conv_pos(centers.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        centers = centers.flatten(1, 2)  # [B · windows, pooled², C]
        keys = self.norm1(torch.cat([centers, self._surroundings(x)], 1))
        found = self.ls1(self.attn(keys[:, : self.pooled**2], keys))
        found = centers + self.drop_path(found) if self.shortcut else found
        side = (self.pooled, self.pooled)
        rows, columns = (self.grid[i] // self.window[i] * self.pooled for i in (0, 1))
        return self.feed(window_reverse(found.unflatten(1, side), side, rows, columns).flatten(1, 2))

    def _pool(self, x: Tensor) -> Tensor:
        """Adaptive max pooling of axes 1 and 2, by slices of constant size so that every runtime has the operators."""
        for axis in (1, 2):
            n, m = x.shape[axis], self.pooled
            bins = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
            x = torch.stack([x.narrow(axis, start, end - start).amax(axis) for start, end in bins], axis)
        return x

    def _surroundings(self, x: Tensor) -> Tensor:
        corners = [(i, j) for i in range(0, self.grid[0] - KEYS + 1, STRIDE) for j in range(0, self.grid[1] - KEYS + 1, STRIDE)]
        return torch.stack([x[:, i : i + KEYS, j : j + KEYS].flatten(1, 2) for i, j in corners], 1).flatten(0, 1)


class SemanticStage(nn.Module):
    """A Swin stage in cycles of six blocks; `[B, H, W, C]` in and out, as Swin's.

    A Swin block; semantic tokens generated; refined by all image tokens and themselves; two blocks among themselves, the first
    within windows; and the image tokens restored by attending to them.
    """

    def __init__(self, stage: SwinTransformerStage, rates: list[float], flags: dict[str, bool], pooled: int, **kind: Any) -> None:
        super().__init__()
        if stage.depth % CYCLE:
            raise VitreousError(f"STViT: the third stage works in cycles of {CYCLE} blocks, {stage.depth} are not whole cycles")
        swin = cast(Any, stage.blocks)
        grid, window = cast(Pair, stage.output_resolution), cast(Pair, swin[0].window_size)
        self.grid, self.grad_checkpointing = grid, False
        side, tokens = (pooled, pooled), (grid[0] // window[0] * pooled, grid[1] // window[1] * pooled)
        self.downsample, self.blocks = stage.downsample, nn.ModuleList()
        width = (swin[0].dim, kind["heads"], kind["mlp_ratio"], kind["qkv_bias"], kind["drop"], kind["attn_drop"])
        for i, rate in enumerate(rates):
            role = i % CYCLE
            if role == 0:
                block = swin[i]
            elif role == 1:
                names = dict(conv_pos=flags["use_conv_pos"], shortcut=flags["shortcut"])
                block = Generate(*width, rate, grid=grid, window=window, pooled=pooled, **names)
            elif role == 3:
                block = CrossBlock(*width, rate, bias=side if flags["relative_pos"] else None, local=(tokens, side))
            else:
                block = CrossBlock(*width, rate, bias=tokens if flags["relative_pos"] and role == 4 else None)
            self.blocks.append(block)
        shape = (1, tokens[0] * tokens[1], swin[0].dim)
        self.centers = nn.Parameter(trunc_normal_(torch.zeros(shape), std=0.02)) if flags["use_global"] else None

    def forward(self, x: Tensor) -> Tensor:
        x = s = self.downsample(x)
        for i, block in enumerate(self.blocks):
            role, image = i % CYCLE, x.flatten(1, 2)
            if role == 0:
                x = block(x)
            elif role == 1:
                s = block(x)
            elif role == 2:
                query = s if self.centers is None or i > CYCLE else s + self.centers
                s = block(query, torch.cat([s, image], 1))
            elif role < 5:
                s = block(s)
            else:
                x = block(image, s).unflatten(1, self.grid)
        return x


class STViT(SwinTransformer):
    """timm's Swin with a convolutional stem and a `SemanticStage` third: images `[B, C, H, W]` to logits `[B, num_classes]`.

    The official flags, all off in the published models: `use_global` adds learned centers to the first cycle's semantic tokens,
    `use_conv_pos` a depthwise convolution to pooled tokens, `relative_pos` a relative position bias among semantic tokens,
    `shortcut` a residual around generation. `sample_window_size` is the side of the pooled tokens in a window.

    Dense features: timm's `features_only=True` and `forward_intermediates`, the third stage restored to its full grid.
    """

    def __init__(
        self,
        *,
        use_global: bool = False,
        use_conv_pos: bool = False,
        relative_pos: bool = False,
        shortcut: bool = False,
        sample_window_size: int = 3,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        **kwargs: Any,
    ) -> None:
        shared: dict[str, Any] = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias)
        drops = dict(proj_drop_rate=proj_drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        super().__init__(embed_layer=cast(Any, ConvStem), depths=depths, num_heads=num_heads, **shared, **drops, **kwargs)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))[2]
        flags = dict(use_global=use_global, use_conv_pos=use_conv_pos, relative_pos=relative_pos, shortcut=shortcut)
        kind: dict[str, Any] = dict(heads=num_heads[2], drop=proj_drop_rate, attn_drop=attn_drop_rate, **shared)
        third = cast(SwinTransformerStage, self.layers[2])
        self.layers[2] = SemanticStage(third, rates, flags, sample_window_size, **kind)
        for m in self.layers[2].modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        raise VitreousError("STViT's windows belong to its image size: create it again with img_size and window_size")


RENAMED = {
    r"^patch_embed\.proj\.0\.c\.": "patch_embed.conv1.conv.",
    r"^patch_embed\.proj\.0\.bn\.": "patch_embed.conv1.bn.",
    r"^patch_embed\.proj\.2\.c\.": "patch_embed.conv2.conv.",
    r"^patch_embed\.proj\.2\.bn\.": "patch_embed.conv2.bn.",
    r"\.layer_scale_(\d)$": r".ls\1.gamma",
    r"\.conv_pos\.proj\.0\.": ".conv_pos.",
    r"\.semantic_token2$": ".centers",
    r"^head\.": "head.fc.",
}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: patches merge at the start of a stage, as in timm. What constructors compute is not stored."""
    ours = {}
    for name, tensor in state.items():
        if name.endswith(("relative_position_index", "attn_mask")):
            continue
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        for theirs, new in RENAMED.items():
            name = re.sub(theirs, new, name)
        ours[name] = tensor
    return ours


SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2),
    "tiny_c24": dict(
        embed_dim=96, depths=(2, 2, 6, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.2, img_size=256, window_size=8
    ),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.4),
    "large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), drop_path_rate=0.2),
}


def _cfg(size: str) -> dict[str, Any]:
    side = SIZES[size].get("img_size", 224)
    return dict(
        num_classes=1000,
        input_size=(3, side, side),
        fixed_input_size=True,
        pool_size=(side // 32, side // 32),
        crop_pct=0.9,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="patch_embed.conv1.conv",
        classifier="head.fc",
    )


default_cfgs = generate_default_cfgs({f"stvit_r_swin_{size}": _cfg(size) for size in SIZES})


def _create(size: str, pretrained: bool, kwargs: dict[str, Any]) -> STViT:
    features = dict(flatten_sequential=True, out_indices=(0, 1, 2, 3))
    given = {**SIZES[size], **kwargs}
    return cast(STViT, build_model_with_cfg(STViT, f"stvit_r_swin_{size}", pretrained, feature_cfg=features, **given))


@register_model
def stvit_r_swin_tiny(pretrained: bool = False, **kwargs: Any) -> STViT:
    """From the repository's Swin-T configuration; no checkpoint or figure was published."""
    return _create("tiny", pretrained, kwargs)


@register_model
def stvit_r_swin_tiny_c24(pretrained: bool = False, **kwargs: Any) -> STViT:
    """From the repository's Swin-T configuration with 24 channels a head, 256 pixels, windows of 8; never published trained."""
    return _create("tiny_c24", pretrained, kwargs)


@register_model
def stvit_r_swin_small(pretrained: bool = False, **kwargs: Any) -> STViT:
    """STViT-R-Swin-S: 49.6 M parameters, 5.8 GMACs, 82.7 % top-1 (published; Swin-S: 8.7 GMACs, 83.0 %)."""
    return _create("small", pretrained, kwargs)


@register_model
def stvit_r_swin_base(pretrained: bool = False, **kwargs: Any) -> STViT:
    """STViT-R-Swin-B: 83.2 % top-1 (published; Swin-B: 83.5 %)."""
    return _create("base", pretrained, kwargs)


@register_model
def stvit_r_swin_large(pretrained: bool = False, **kwargs: Any) -> STViT:
    """From the repository's Swin-L configuration; no checkpoint or figure was published."""
    return _create("large", pretrained, kwargs)


for _name, _build in {
    "r_swin_t": stvit_r_swin_tiny,
    "r_swin_t_c24": stvit_r_swin_tiny_c24,
    "r_swin_s": stvit_r_swin_small,
    "r_swin_b": stvit_r_swin_base,
    "r_swin_l": stvit_r_swin_large,
}.items():
    official(f"stvit--{_name}", _build, convert)
