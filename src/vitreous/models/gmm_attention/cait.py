"""GMM-CaiT: a CaiT whose patch layers have the mask of `gmm_attention` (Li and Zhang, 2024).

Facts from the official repository, CatworldLee/Gaussian-Mixture-Mask-Attention. Its CaiT is not quite the paper's (Touvron et
al., 2021), nor timm's: heads of 64 channels whatever the width; heads are mixed without biases, in the class layers too; these
read patches alone, not normalised, where CaiT's read the class token among normalised ones. The mask comes before the mixing.
The README's 5.1 M parameters are those of "cait-tiny".
"""

from __future__ import annotations

import torch
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from ...mixers import MetaBlock, require_size
from ..classifier import Classifier, init_weights
from ..official import renamed
from .vit import NAMES, GaussianMixtureMask, computed, gaussian, patches, publish_both


class TalkingHeadsAttention(nn.Module):
    """Attention of tokens `[B, N, C]` to themselves, or to a `context` `[B, M, C]`, whose heads are mixed around the softmax.

    Shazeer et al., "Talking-Heads Attention", 2020. kernels: of the mask on the scaled scores, whose `gaussian` is then given; 0
    for no mask.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, kernels: int = 0) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, head_dim**-0.5
        width = num_heads * head_dim
        self.q, self.kv = nn.Linear(dim, width, bias=False), nn.Linear(dim, 2 * width, bias=False)
        self.mix_heads_pre_attn = nn.Parameter(torch.randn(num_heads, num_heads))
        self.mix_heads_post_attn = nn.Parameter(torch.randn(num_heads, num_heads))
        self.mask = GaussianMixtureMask(num_heads, kernels) if kernels else None
        self.proj = nn.Linear(width, dim)

    def forward(self, x: Tensor, base: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv(x if context is None else context)
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.mT * self.scale
        if self.mask is not None and base is not None:
            scores = scores * self.mask(base)
        attention = torch.einsum("bhij,hg->bgij", scores, self.mix_heads_pre_attn).softmax(-1)
        x = torch.einsum("bhij,hg->bgij", attention, self.mix_heads_post_attn) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class GMMCaiT(Classifier):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`.

    depth, cls_depth: layers of the patches, and of the class token behind them, which alone it changes. mlp_dim: hidden width.
    """

    global_pool = "token"

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 100,
        embed_dim: int = 192,
        depth: int = 24,
        cls_depth: int = 2,
        num_heads: int = 4,
        head_dim: int = 64,
        mlp_dim: int = 384,
        num_kernals: int = 5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.img_size = (img_size, img_size)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        side = img_size // patch_size
        self.pos_embed = nn.Parameter(torch.randn(1, side**2, embed_dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.mask = nn.Parameter(gaussian(side), requires_grad=False)

        def block(i: int, kernels: int) -> MetaBlock:
            attention = TalkingHeadsAttention(embed_dim, num_heads, head_dim, kernels)
            scale = 0.1 if i < 18 else 1e-5 if i < 24 else 1e-6  # CaiT's section 2
            return MetaBlock(embed_dim, attention, Mlp(embed_dim, mlp_dim), nn.LayerNorm, scale, drop_path_rate)

        self.blocks = nn.ModuleList(block(i, num_kernals) for i in range(depth))
        self.blocks_token_only = nn.ModuleList(block(i, 0) for i in range(cls_depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to `[B, 1 + N, C]`, the class token first."""
        require_size(x, self.img_size, "GMM-CaiT")
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, self.mask)
        token = self.cls_token.repeat(x.shape[0], 1, 1)  # a view would stop torch from counting operations
        for block in self.blocks_token_only:
            token = block(token, None, x)
        return self.norm(torch.cat([token, x], 1))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours."""
    names = renamed(
        computed(state),
        (r"\.fn\.(fn|norm)\.", r".\1."),
        (r"^mlp_head\.0\.", "norm."),
        *NAMES,
        (r"\.layers\.(\d+)\.0\.scale$", r".blocks.\1.ls1.gamma"),
        (r"\.layers\.(\d+)\.1\.scale$", r".blocks.\1.ls2.gamma"),
        (r"^patch_transformer\.blocks\.", "blocks."),
        (r"^cls_transformer\.blocks\.", "blocks_token_only."),
    )
    names["patch_embed.proj.weight"] = patches(names["patch_embed.proj.weight"])
    return {name: tensor.flatten() if name.endswith(".gamma") else tensor for name, tensor in names.items()}


for _name, _width in (("cait", 192), ("cait-tiny", 108)):
    _cifar, _tinyimagenet = (dict(embed_dim=_width, patch_size=_patch) for _patch in (4, 8))
    publish_both(GMMCaiT, _name, convert, _cifar, _tinyimagenet, first_conv="patch_embed.proj")
