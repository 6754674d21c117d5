"""MPCViT: heads with or without a ReLU softmax, as the cost of computing on secret shares allows.

Zeng et al., "MPCViT: Searching for Accurate and Efficient MPC-Friendly Vision Transformer with Heterogeneous Attention" (ICCV
2023). Facts from the official repository, PKU-SEC-Lab/mpcvit. `learn.MPCSearch` learns which heads need one, `prune.MPCHeads`
decides.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ..mixers import patch_grid, require_size
from .classifier import Classifier, init_weights
from .official import publish, renamed

EPS = 1e-5


class HeterogeneousAttention(nn.Module):
    """Heads of `alpha` · ReLU softmax + (1 − `alpha`) · scaling (equation 4); tokens `[B, N, C]`.

    On scores s: ReLU softmax is relu(s) / (Σ relu(s) + 1e-5), scaling s / N. While they are searched each head has an `alpha`
    `[1, heads, 1, 1]` of its own; then it is 1 or 0.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (channels // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * channels, bias=False), nn.Linear(channels, channels)
        self.alpha = Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * self.scale
        positive = F.relu(scores)
        map = self.alpha * positive / (positive.sum(-1, keepdim=True) + EPS) + (1 - self.alpha) * scores / x.shape[1]
        return self.proj((map @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """h = norm2(x + attn(norm1(x))), then h + MLP(h): the residual stream itself is normalised; `[B, N, C]`.

    beta: of each token, with `linear_gelu` (MPCViT+): β · GELU(x) + (1 − β) · x, and β · y + (1 − β) · relu(y) behind the MLP.
    """

    def __init__(self, channels: int, heads: int, hidden: int, drop_path: float, tokens: int | None) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(channels), HeterogeneousAttention(channels, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.beta = Parameter(torch.ones(1, tokens, 1), requires_grad=False) if tokens else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(x + self.drop_path(self.attn(self.norm1(x))))
        y = self.fc1(x)
        if self.beta is None:
            return x + self.drop_path(self.fc2(F.gelu(y)))
        y = self.fc2(self.beta * F.gelu(y) + (1 - self.beta) * y)
        return x + self.drop_path(self.beta * y + (1 - self.beta) * F.relu(y))


class MPCViT(Classifier):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`."""

    global_pool = "token"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        linear_gelu: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.img_size = cast(tuple[int, int], to_2tuple(img_size))
        grid = patch_grid(self.img_size, patch_size, "MPCViT")
        tokens = grid[0] * grid[1] + 1
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.patch_embed.img_size = self.img_size  # type: ignore[assignment]  # what prepares pictures reads it there
        self.cls_token = Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = Parameter(torch.zeros(1, tokens, embed_dim))
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        hidden, counted = int(embed_dim * mlp_ratio), tokens if linear_gelu else None
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, hidden, r, counted) for r in rates))
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(init_weights)
        trunc_normal_(self.pos_embed, std=0.2)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to tokens `[B, 1 + N, C]`, the class token first."""
        require_size(x, self.img_size, "MPCViT")
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.norm(self.blocks(x))


def heads_of(model: nn.Module) -> list[HeterogeneousAttention]:
    """Its attention modules; none where it is another model."""
    return [m for m in model.modules() if isinstance(m, HeterogeneousAttention)]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(
        {k: v.float() for k, v in state.items()},
        (r"^tokenizer\.conv_layers\.0\.0\.", "patch_embed."),
        (r"^classifier\.class_emb$", "cls_token"),
        (r"^classifier\.positional_emb$", "pos_embed"),
        (r"^classifier\.fc\.", "head."),
        (r"^classifier\.", ""),
        (r"\.norm1\.", ".norm2."),
        (r"\.pre_norm\.", ".norm1."),
        (r"\.self_attn\.", ".attn."),
        (r"\.linear(\d)\.", r".fc\1."),
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "vit_7_4_32_heads": {},
    "vit_7_4_32_search": {},
    "vit_7_4_32_plus": dict(linear_gelu=True),
    "vit_9_12_64_heads": dict(img_size=64, num_classes=200, embed_dim=192, depth=9, num_heads=12),
}
for variant, given in VARIANTS.items():
    side, classes = given.get("img_size", 32), given.get("num_classes", 10)
    publish(
        MPCViT, f"mpc{variant}", given, variant=f"mpcvit--{variant}", convert=convert, size=side, num_classes=classes,
        first_conv="patch_embed", fixed_input_size=True,
    )  # fmt: skip
