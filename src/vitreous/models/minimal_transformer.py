"""Transformers with parts left out. Bermeitinger, Hrycej, Pavone, Kath, Handschuh, "Reducing the Transformer Architecture to a
Minimum" (2024).

The paper has no official code. The sizes are those of an independent implementation (the repository
Abdennacer-Badaoui/Reducing_the_Transformer_Architecture_to_a_Minimum): width 64, patches of 7 pixels for MNIST and of 8 for
CIFAR-10, learned positions, a class token. Norms stand before each part, and an MLP is four times as wide, as in ViT.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import require_size
from .classifier import Classifier, init_weights
from .official import publish


class ReducedAttention(nn.Module):
    """Attention on tokens `[B, N, C]` with fewer matrices.

    similarity: "qk", x W_q W_kᵀ xᵀ, as usual; "collapsed", x W_qk xᵀ with a single C × C matrix, in one head all that the product
        can be; "symmetric", x L Lᵀ xᵀ with L lower triangular: half a matrix, and two tokens are alike in both directions.
    value: W_v and W_o; without them each token becomes a mean of the tokens themselves.
    """

    places: Tensor
    lower: Tensor

    def __init__(self, width: int, heads: int, similarity: str, value: bool) -> None:
        super().__init__()
        if similarity not in ("qk", "collapsed", "symmetric"):
            raise VitreousError(f"ReducedAttention: similarity must be qk, collapsed or symmetric, not {similarity!r}")
        if heads > 1 and (similarity == "collapsed" or not value):
            raise VitreousError("ReducedAttention: matrices collapse or are omitted in a single head only: set num_heads=1")
        self.heads, part = heads, width // heads
        if similarity == "qk":
            self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        elif similarity == "collapsed":
            self.q, self.k = nn.Linear(width, width), nn.Identity()
        else:
            self.factor = nn.Parameter(trunc_normal_(torch.empty(heads, part * (part + 1) // 2), std=part**-0.5))
            lower = torch.ones(part, part).tril()
            self.register_buffer("lower", lower, persistent=False)
            self.register_buffer("places", (lower.flatten().cumsum(0).long() - 1).view(part, part), persistent=False)
        self.symmetric = similarity == "symmetric"
        self.v, self.proj = (nn.Linear(width, width), nn.Linear(width, width)) if value else (nn.Identity(), nn.Identity())

    def split(self, x: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, heads, N, C / heads]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.symmetric:
            q = k = self.split(x) @ (self.factor[:, self.places] * self.lower)
        else:
            q, k = self.split(self.q(x)), self.split(self.k(x))
        x = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ self.split(self.v(x))
        return self.proj(x.transpose(1, 2).flatten(2))


class ReducedBlock(nn.Module):
    """x + attention(norm1(x)), then, if it has an MLP, x + mlp(norm2(x)); tokens `[B, N, C]`."""

    def __init__(self, width: int, attn: nn.Module, mlp: bool, drop: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), attn
        self.norm2, self.mlp = (nn.LayerNorm(width), Mlp(width, 4 * width, drop=drop)) if mlp else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x if self.mlp is None or self.norm2 is None else x + self.mlp(self.norm2(x))


class MinimalTransformer(Classifier):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`; `similarity` and `value` as in `ReducedAttention`."""

    global_pool = "token"

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 8,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 64,
        depth: int = 6,
        num_heads: int = 1,
        mlp: bool = False,
        similarity: str = "qk",
        value: bool = True,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.img_size, self.embed_dim, self.num_prefix_tokens = (img_size, img_size), embed_dim, 1
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim), std=0.02))
        self.pos_drop = nn.Dropout(drop_rate)
        attention = (ReducedAttention(embed_dim, num_heads, similarity, value) for _ in range(depth))
        self.blocks = nn.Sequential(*(ReducedBlock(embed_dim, attn, mlp, drop_rate) for attn in attention))
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens `[B, 1 + N, C]`, the class token first."""
        require_size(x, self.img_size, "MinimalTransformer")
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)], 1)
        return self.norm(self.blocks(self.pos_drop(x + self.pos_embed)))


REDUCTIONS = {
    "unchanged": dict(),
    "wqk": dict(similarity="collapsed"),
    "wqk_nowvwo": dict(similarity="collapsed", value=False),
    "symmetry": dict(similarity="symmetric"),
}
# heads, MLP, what is reduced: the paper's comparisons, each with 6 and with 12 blocks
TRIED = (
    (1, True, "unchanged"),
    (4, True, "unchanged"),
    (1, True, "wqk_nowvwo"),
    (1, False, "unchanged"),
    (4, False, "unchanged"),
    (1, False, "symmetry"),
    (4, False, "symmetry"),
    (1, False, "wqk"),
    (1, False, "wqk_nowvwo"),
)
for _data, _size, _patch, _channels in (("mnist", 28, 7, 1), ("cifar10", 32, 8, 3)):
    for _depth in (6, 12):
        for _heads, _mlp, _reduction in TRIED:
            _name = f"{_data}_{_depth}_{_heads}_{'mlp' if _mlp else 'nomlp'}_{_reduction}"
            publish(
                MinimalTransformer,
                f"minimal_transformer_{_name}",
                dict(
                    REDUCTIONS[_reduction],
                    img_size=_size,
                    patch_size=_patch,
                    in_chans=_channels,
                    depth=_depth,
                    num_heads=_heads,
                    mlp=_mlp,
                ),
                variant=f"minimal-transformer--{_name}",
                size=_size,
                num_classes=10,
                input_size=(_channels, _size, _size),
                fixed_input_size=True,
                crop_pct=1.0,
                first_conv="patch_embed.proj",
            )
