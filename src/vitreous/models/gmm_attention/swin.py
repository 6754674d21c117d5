"""GMM-Swin: a Swin Transformer whose windows have the mask of `gmm_attention` (Li and Zhang, 2024).

Facts from the official repository, CatworldLee/Gaussian-Mixture-Mask-Attention. Scores are masked before the bias of relative
positions is added; unlike the paper's Swin, patches have absolute positions as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from ...errors import VitreousError
from ...mixers import require_size
from ..classifier import Pyramid, init_weights
from ..official import renamed
from .vit import GaussianMixtureMask, computed, gaussian, publish_both

Handed = tuple[Tensor, Tensor]  # a map [B, H, W, C], and the Gaussian of a window, which all blocks share


class GaussianMaskWindowAttention(WindowAttention):
    """Self-attention in windows `[B · windows, N, C]`: scaled scores × Gaussian mixture + bias of relative positions.

    mask: `[windows, N, N]`, added to keep apart what only a shift has brought together. base: the `gaussian` of a window.
    """

    def __init__(self, dim: int, num_heads: int, kernels: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.mask = GaussianMixtureMask(num_heads, kernels)

    def forward(self, x: Tensor, mask: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        if base is None:
            raise VitreousError("GaussianMaskWindowAttention needs the Gaussian of its window as base: `gaussian(side)`")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * self.scale @ k.mT * self.mask(base) + self._get_rel_pos_bias()
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
        x = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class WindowBlock(SwinTransformerBlock):
    """Swin's block on a map `[B, H, W, C]` of whole windows."""

    def __init__(self, dim: int, side: int, num_heads: int, window: int, shift: int, kernels: int, **kwargs: Any) -> None:
        super().__init__(dim, (side, side), num_heads, window_size=window, shift_size=shift, **kwargs)
        self.attn = GaussianMaskWindowAttention(dim, num_heads, kernels, window_size=window)

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        (shift, _), (_, height, width, _) = self.shift_size, x.shape
        y = self.norm1(x)
        y = y.roll((-shift, -shift), (1, 2)) if shift else y
        y = self.attn(window_partition(y, self.window_size).flatten(1, 2), self.attn_mask, base)
        y = window_reverse(y.unflatten(1, self.window_size), self.window_size, height, width)
        y = y.roll((shift, shift), (1, 2)) if shift else y
        x = x + self.drop_path1(y)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Images `[B, C, img_size, img_size]` to a map `[B, H, W, width]` of normalised patches and their positions."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, width: int, window: int) -> None:
        super().__init__()
        self.size = (img_size, img_size)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, width, nn.LayerNorm, flatten=False, output_fmt="NHWC")
        side = img_size // patch_size
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, side**2, width), std=0.02))
        self.mask = nn.Parameter(gaussian(window), requires_grad=False)

    def forward(self, x: Tensor) -> Handed:
        require_size(x, self.size, "GMM-Swin")
        x = self.patch_embed(x)
        return x + self.pos_embed.unflatten(1, x.shape[1:3]), self.mask


class Stage(nn.Module):
    """Patches merged 2 × 2, but for the first stage, then blocks, every other of which shifts its windows by half."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[WindowBlock]) -> None:
        super().__init__()
        self.downsample, self.blocks = downsample, nn.ModuleList(blocks)

    def forward(self, handed: Handed) -> Handed:
        x, base = handed
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x, base)
        return x, base


class GMMSwin(Pyramid):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`; windows must fill the map of every stage."""

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 100,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 6, 4),
        num_heads: Sequence[int] = (3, 6, 12),
        window_size: int = 4,
        mlp_ratio: float = 2.0,
        num_kernals: int = 5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(widths, [patch_size * 2**i for i in range(len(depths))], drop_rate)
        self.stem = Stem(img_size, patch_size, in_chans, embed_dim, window_size)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, (width, heads) in enumerate(zip(widths, num_heads, strict=True)):
            side, over = divmod(img_size, patch_size * 2**i)
            if over or side % window_size:
                raise VitreousError(
                    f"GMM-Swin: stage {i} cuts images of {img_size} pixels into patches of {patch_size * 2**i}, and these into "
                    f"windows of {window_size} × {window_size}, which do not fit: choose another img_size or window_size"
                )
            # As in Swin, where one window is the whole map nothing is shifted.
            half = window_size // 2 if side > window_size else 0
            blocks = [
                WindowBlock(width, side, heads, window_size, half * (j % 2), num_kernals, mlp_ratio=mlp_ratio, drop_path=rate)
                for j, rate in enumerate(rates[i])
            ]
            self.stages.append(Stage(PatchMerging(width // 2) if i else nn.Identity(), blocks))
        self.norm = LayerNorm2d(widths[-1], eps=1e-5)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def as_map(self, x: Tensor | tuple[Any, ...]) -> Tensor:
        return x[0].permute(0, 3, 1, 2)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours; a stage merges patches before its blocks instead of after them."""
    tables = (".relative_position_index", ".attn_mask")
    return renamed(
        computed({name: tensor for name, tensor in state.items() if not name.endswith(tables)}),
        (r"^(mask|patch_embed\..*)$", r"stem.\1"),
        (r"^absolute_pos_embed$", "stem.pos_embed"),
        *((rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(2)),
        (r"^layers\.", "stages."),
    )


publish_both(GMMSwin, "swin", convert, dict(patch_size=2), dict(patch_size=4), maps=3, first_conv="stem.patch_embed.proj")
