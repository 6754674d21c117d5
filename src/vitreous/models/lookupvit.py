"""LookupViT: a few compressed tokens do the thinking, the many lookup tokens are kept up to date cheaply.

Koner et al., "LookupViT: Compressing visual information to a limited number of tokens" (ECCV 2024). There is no official
code; what the paper leaves open is decided as the docstrings here say.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import DropPath, Mlp, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import VitreousError
from .official import official


def resize_matrix(given: int, wanted: int) -> Tensor:
    """`[wanted, given]`: bilinear resizing of a line of tokens, each of the wanted ones a weighted mean of the given ones.

    The kernel widens with the step when there are fewer wanted than given ones ("antialias"), so that no token is passed over.
    A matrix, because runtimes disagree on how their resizing operators do that.
    """
    step = given / wanted
    centres = (torch.arange(wanted) + 0.5) * step
    distance = (torch.arange(given) + 0.5 - centres[:, None]).abs() / max(step, 1.0)
    weights = (1 - distance).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


class BidirectionalCrossAttention(nn.Module):
    """Multi-head bidirectional cross-attention: one map, read in both directions.

    `gather` lets the M compressed tokens look up the N lookup tokens, `send` gives the news back along the same map,
    transposed and normalised again over the compressed tokens, for which it needs no queries and keys of its own.
    """

    def __init__(self, dim: int, num_heads: int, two_way: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if two_way:
            self.v_back, self.proj_back = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def gather(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, M, C]` and `[B, N, C]` to what the compressed tokens gain `[B, M, C]`, and the map `[B, heads, M, N]`."""
        q, (k, v) = self._heads(self.q(compressed)), (self._heads(t) for t in self.kv(lookup).chunk(2, -1))
        probs = (q * self.scale @ k.mT).softmax(-1)
        return self.proj((probs @ v).transpose(1, 2).flatten(2)), probs

    def send(self, compressed: Tensor, probs: Tensor) -> Tensor:
        """What the lookup tokens gain, `[B, N, C]`."""
        # A lookup token that nobody looked at has a column of almost nothing, which must not become a division by zero.
        back = (probs / probs.sum(2, keepdim=True).clamp_min(1e-6)).mT
        return self.proj_back((back @ self._heads(self.v_back(compressed))).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class LookupBlock(nn.Module):
    """Compressed tokens `[B, M, C]` and lookup tokens `[B, N, C]` to the same.

    Compressed tokens look up, then pass a full transformer block; lookup tokens get the result back and pass an MLP whose
    hidden layer is half as wide as the tokens (a 1/8 of the usual). So a block costs (3NM + 2M²)·C + (4N + 15M)·C² MACs.
    `last`: nothing reads the lookup tokens after the last block, so that it does not update them.
    """

    def __init__(self, dim: int, num_heads: int, drop_path: float, last: bool) -> None:
        super().__init__()
        self.last = last
        self.norm1, self.norm_lookup = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.cross = BidirectionalCrossAttention(dim, num_heads, two_way=not last)
        self.drop_path = DropPath(drop_path)
        self.full = Block(dim, num_heads, qkv_bias=True, drop_path=drop_path, norm_layer=cast(Any, nn.LayerNorm))
        if not last:
            self.norm_sent, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
            self.mlp_lookup = Mlp(dim, dim // 2)

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        gained, probs = self.cross.gather(self.norm1(compressed), self.norm_lookup(lookup))
        compressed = self.full(compressed + self.drop_path(gained))
        if self.last:
            return compressed, lookup
        lookup = lookup + self.drop_path(self.cross.send(self.norm_sent(compressed), probs))
        return compressed, lookup + self.drop_path(self.mlp_lookup(self.norm2(lookup)))


class LookupViT(nn.Module):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`.

    Patches with their learned positions are the lookup tokens; resized bilinearly to the grid `compress` (rows, columns)
    they are the compressed tokens, which therefore need no parameters of their own: `model.compress = (3, 3)` chooses
    another number at any time, and a model trained with several (a random one for each batch, section 3.4) serves them all.
    The classes are read from the mean of the compressed tokens. Raises VitreousError for a grid that is empty or finer than
    the patches.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        compress: int | tuple[int, int] = (5, 5),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.embed_dim, self.num_features, self.head_hidden_size = num_classes, embed_dim, embed_dim, embed_dim
        self.num_prefix_tokens, self.global_pool = 0, "avg"
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.grid = cast(tuple[int, int], self.patch_embed.grid_size)
        self.compress = compress
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], embed_dim))
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        self.blocks = nn.ModuleList(LookupBlock(embed_dim, num_heads, r, i == depth - 1) for i, r in enumerate(rates))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        trunc_normal_(self.pos_embed, std=0.02)

    @property
    def compress(self) -> tuple[int, int]:
        """Rows and columns of the compressed tokens."""
        return self._compress

    @compress.setter
    def compress(self, grid: int | tuple[int, int]) -> None:
        wanted = (grid, grid) if isinstance(grid, int) else tuple(grid)
        h, w = self.grid
        if len(wanted) != 2 or not (1 <= wanted[0] <= h and 1 <= wanted[1] <= w):
            raise VitreousError(f"LookupViT: compress must be rows and columns from (1, 1) to {(h, w)}, not {grid}")
        self._compress = cast(tuple[int, int], wanted)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes`; 0 leaves the pooled features."""
        if global_pool not in (None, "avg"):
            raise VitreousError(f"LookupViT averages its compressed tokens: global_pool cannot be {global_pool!r}")
        self.num_classes = num_classes
        new = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head = new.to(self.pos_embed.device, self.pos_embed.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the compressed tokens `[B, rows · columns, C]`, normalised."""
        lookup = self.patch_embed(x) + self.pos_embed
        (h, w), (rows, columns) = self.grid, self.compress
        down, across = (resize_matrix(n, m).to(lookup) for n, m in ((h, rows), (w, columns)))
        lines = across @ lookup.unflatten(1, (h, w))  # [B, h, columns, C]
        compressed = (down @ lines.flatten(2)).unflatten(2, (columns, -1)).flatten(1, 2)
        for block in self.blocks:
            compressed, lookup = block(compressed, lookup)
        return self.norm(compressed)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x.mean(1))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


SIZES: dict[str, dict[str, int]] = {
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}

default_cfgs = generate_default_cfgs(
    {
        f"lookupvit_{size}_patch16_224": dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            fixed_input_size=True,
            crop_pct=0.9,
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            first_conv="patch_embed.proj",
            classifier="head",
        )
        for size in SIZES
    }
)


def _create(size: str, pretrained: bool, kwargs: dict[str, Any]) -> LookupViT:
    return cast(
        LookupViT, build_model_with_cfg(LookupViT, f"lookupvit_{size}_patch16_224", pretrained, **{**SIZES[size], **kwargs})
    )


@register_model
def lookupvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT of the width of ViT-S/16, 5 × 5 compressed tokens."""
    return _create("small", pretrained, kwargs)


@register_model
def lookupvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT of the width of ViT-B/16, 5 × 5 compressed tokens: half the MACs of ViT-B/16."""
    return _create("base", pretrained, kwargs)


@register_model
def lookupvit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT of the width of ViT-L/16, 5 × 5 compressed tokens."""
    return _create("large", pretrained, kwargs)


for _build in (lookupvit_small_patch16_224, lookupvit_base_patch16_224, lookupvit_large_patch16_224):
    official(f"lookupvit--{_build.__name__}", _build)
