"""As-ViT: a hierarchical vision transformer whose topology and scaling were found without training.

Chen et al., "Auto-scaling Vision Transformers without Training" (ICLR 2022). Facts from the official repository,
VITA-Group/AsViT.
`vitreous.search.nets.as_vit` has the measures that found it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple, trunc_normal_
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import require_size
from .classifier import Classifier
from .official import family, publish, renamed

WIDEST = 1024
Grid = tuple[int, int]
Genotype = str | Sequence[Sequence[int]]


def parse(genotype: Genotype) -> tuple[list[list[int]], int, int]:
    """Of "K,S,E,L|…|heads,width" each stage's kernel, splits, expansion and blocks; heads of the last stage; width of the first.

    Raises `VitreousError` where it is not of that form.
    """
    *stages, last = [p.split(",") for p in genotype.split("|")] if isinstance(genotype, str) else genotype
    if len(stages) != 4 or any(len(s) != n for s, n in zip(stages, (4, 4, 4, 4))) or len(last) != 2:
        raise VitreousError(f"{genotype!r} is no genotype: give four stages K,S,E,L and heads,width, as {SEED}")
    try:
        return [[int(n) for n in s] for s in stages], int(last[0]), int(last[1])
    except (TypeError, ValueError):
        raise VitreousError(f"{genotype!r} is no genotype: its parts are whole numbers, as {SEED}") from None


class WindowAttention(nn.Module):
    """Softmax attention within windows of `window` × `window` places of the grid; tokens `[B, h · w, C]`.

    A head is ⌊C / heads⌋ wide, whether the heads divide C or not.
    """

    def __init__(self, channels: int, heads: int, grid: Grid, window: int) -> None:
        super().__init__()
        self.heads, self.grid, self.window, inner = heads, grid, window, channels // heads * heads
        self.qkv, self.proj = nn.Linear(channels, 3 * inner), nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        (h, w), s = self.grid, self.window
        if self.window < max(h, w):
            x = x.unflatten(1, (h // s, s, w // s, s)).transpose(2, 3).flatten(3, 4).flatten(0, 2)  # [B · windows, s · s, C]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.window < max(h, w):
            y = y.unflatten(1, (s, s)).unflatten(0, (-1, h // s, w // s)).transpose(2, 3).flatten(1, 4)
        return y


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); `[B, N, C]`."""

    def __init__(self, channels: int, heads: int, grid: Grid, window: int, expansion: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(channels), WindowAttention(channels, heads, grid, window)
        self.norm2, self.mlp = nn.LayerNorm(channels), Mlp(channels, channels * expansion)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Tokens of a grid to half of it a side: what lies in each kernel × kernel, normalised, and projected; `[B, N / 4, C']`."""

    def __init__(self, channels: int, kernel: int, grid: Grid) -> None:
        super().__init__()
        self.grid, self.kernel = grid, kernel
        self.norm = nn.LayerNorm(kernel**2 * channels)
        self.reduction = nn.Linear(kernel**2 * channels, min(WIDEST, 2 * channels), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = padded(x.mT.unflatten(2, self.grid), self.kernel, 2)
        return self.reduction(self.norm(F.unfold(x, self.kernel, stride=2).mT))


def padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Maps with zeros around, so that kernels of that stride reach every place; the odd one lies right and below."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return F.pad(x, (before, after, before, after))


class PatchEmbed(nn.Module):
    """Images `[B, C, H, W]` to tokens `[B, H / 4 · W / 4, width]` by kernels that may overlap."""

    def __init__(self, in_chans: int, width: int, kernel: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_chans, width, kernel, 4), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(padded(x, self.proj.kernel_size[0], 4)).flatten(2).mT)


class Head(nn.Sequential):
    """`[B, C]` to logits by two linear layers with a tanh between."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(nn.Linear(channels, channels), nn.Tanh(), nn.Linear(channels, num_classes))


class AsViT(Classifier):
    """Images `[B, C, *img_size]` to logits `[B, num_classes]`.

    genotype: "K,S,E,L|…|heads,width", or the same as lists: of each stage the kernel of its embedding, splits a side (1:
    attention to all), expansion of the MLP and blocks; heads of the last stage, of which the earlier have an eighth, a quarter
    and a half; width of the first, which doubles from stage to stage up to 1024. There is no position embedding.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        genotype: Genotype = "8,2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|32,64",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        stages, heads, width = parse(genotype)
        widths = [min(WIDEST, width * 2**i) for i in range(4)]
        super().__init__(widths[-1], drop_rate)
        self.img_size = cast(Grid, to_2tuple(img_size))
        if any(n % 32 for n in self.img_size):
            raise VitreousError(f"AsViT: the sides of its images are multiples of 32, not {self.img_size}")
        self.patch_embed = PatchEmbed(in_chans, width, stages[0][0])
        self.patch_embed.img_size = self.img_size  # type: ignore[assignment]  # what prepares pictures reads it there
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, [s[3] for s in stages], stagewise=True))
        self.stages = nn.Sequential()
        for i, ((_, splits, expansion, _), c) in enumerate(zip(stages, widths, strict=True)):
            h, w = self.img_size[0] // (4 * 2**i), self.img_size[1] // (4 * 2**i)
            if splits > 1 and (h != w or h % splits):
                raise VitreousError(f"AsViT: a grid of {h} × {w} tokens cannot be split into {splits} × {splits} windows")
            stage = nn.Sequential(*(Block(c, heads // 2 ** (3 - i), (h, w), max(h, w) // splits, expansion, r) for r in rates[i]))
            if i < 3:
                stage.append(PatchMerging(c, stages[i + 1][0], (h, w)))
            self.stages.append(stage)
        self.norm = nn.LayerNorm(widths[-1])
        self.apply(init)
        self.reset_classifier(num_classes)

    def make_head(self, num_classes: int) -> nn.Module:
        return Head(self.num_features, num_classes)

    def tokens(self, x: Tensor) -> Tensor:
        """Images to what enters the final norm, `[B, H / 32 · W / 32, C]`, which the measures of complexity read."""
        require_size(x, self.img_size, "AsViT")
        return self.stages(self.patch_embed(x))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.tokens(x))


def init(module: nn.Module) -> None:
    """Linears from a normal of 0.02 cut at ±2, norms at one; convolutions as torch has them. For `model.apply`."""
    m: Any = module
    if isinstance(module, nn.Linear):
        trunc_normal_(m.weight, std=0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(m.weight)
        nn.init.zeros_(m.bias)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    depths = {i: 1 + max(int(m[1]) for n in state if (m := re.match(rf"layers\.{i}\.blocks\.(\d+)\.", n))) for i in range(4)}

    def merging(m: re.Match[str]) -> str:
        return f"stages.{m[1]}.{depths[int(m[1])]}."

    state = renamed(
        state,
        (r"^layers\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2."),
        (r"\.mlps\.0\.0\.", ".norm2."),
        (r"\.mlps\.0\.1\.", ".mlp."),
    )
    return {re.sub(r"^layers\.(\d)\.downsample\.", merging, k): v for k, v in state.items()}


def told(state: dict[str, Tensor]) -> dict[str, Any]:
    """Nothing: neither heads nor windows are in the weights, so `genotype` must be given."""
    return dict(genotype="unknown")


SEED, LARGE = "8,2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|32,64", "8,2,3,5|4,1,2,2|4,1,4,5|4,1,6,2|32,180"
for variant, found in (("seed", SEED), ("l", LARGE)):
    publish(
        AsViT, f"as_vit_{variant}", dict(genotype=found), variant=f"as-vit--{variant}", convert=convert,
        first_conv="patch_embed.proj", classifier="head.2", fixed_input_size=True,
    )  # fmt: skip
family("as-vit", AsViT, convert, told)
