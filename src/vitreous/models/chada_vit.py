"""ChAda-ViT: images with any number of channels, padded and masked. Bourriez et al., "ChAda-ViT: Channel Adaptive Attention for
Joint Representation Learning of Heterogeneous Microscopy Images" (CVPR 2024).

Facts from the official repository, nicoboou/chadavit. Where images have different numbers of channels, they are padded to the
most that one of them has, there always to 10; what is padded is masked, so that the outputs are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from timm.layers import Attention, Mlp, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import VitreousError
from ..mixers import resample_position
from .classifier import Classifier, init_weights
from .official import official, publish, renamed


class Block(nn.Module):
    """Tokens `[B, N, D]`: x = norm1(x + attention(norm1(x))), then norm2(x + mlp(x)).

    The official code reads attention's input through the norm that follows it, so that `norm1` works twice. Its rates of
    drop path are rates of dropout.
    """

    def __init__(self, width: int, heads: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, qkv_bias=True, attn_drop=drop, proj_drop=drop)
        self.mlp = Mlp(width, hidden, act_layer=nn.ReLU, drop=drop)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.norm1(x + self.attn(self.norm1(x), mask))
        return self.norm2(x + self.mlp(x))


class ChAdaViT(Classifier):
    """Images `[B, C, H, W]`, or images of different channels, to logits `[B, num_classes]`; published without a head, so that it
    gives the class token.

    C: 1 to `max_number_channels`. H and W: any multiples of `patch_size`; the position embedding, one for all channels, is
    resampled where they are not `img_size`.
    """

    global_pool = "token"

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 2,
        hidden_dim: int = 2048,
        max_number_channels: int = 10,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        if in_chans > max_number_channels:
            raise VitreousError(f"ChAdaViT: max_number_channels must be at least in_chans, {in_chans}, not {max_number_channels}")
        self.patch_size, self.max_channels = patch_size, max_number_channels
        self.embed_dim, self.num_prefix_tokens = embed_dim, 1
        self.token_learner = nn.Conv2d(1, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.channel_token = nn.Parameter(trunc_normal_(torch.empty(1, max_number_channels, 1, embed_dim), std=0.02))
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim), std=0.02))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, hidden_dim, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "channel_token", "pos_embed"}

    def patches(self, x: Tensor) -> Tensor:
        """Channels `[n, 1, H, W]` to their tokens `[n, h · w, D]`, with positions."""
        if x.shape[2] % self.patch_size or x.shape[3] % self.patch_size:
            raise VitreousError(f"sides {list(x.shape[2:])} do not divide into patches of {self.patch_size}")
        h, w = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        table = self.pos_embed[:, 1:]
        if h != w or h * w != table.shape[1]:
            table = resample_position(table, h, w)
        return self.token_learner(x).flatten(2).mT + table

    def padded(self, x: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Stacked channels `[sum of counts, 1, H, W]` to tokens `[B, most, h · w, D]`, and a mask of keys to add to the scores,
        `[B, 1, 1, 1 + most · h · w]`."""
        if sum(counts) != x.shape[0] or min(counts) < 1 or x.shape[1] != 1:
            raise VitreousError(
                f"list_num_channels {list(counts)} must say how many each image has of the {x.shape[0]} channels, stacked as "
                f"[channels, 1, H, W]; the input is {list(x.shape)}"
            )
        tokens = pad_sequence(list(self.patches(x).split(list(counts))), batch_first=True)
        real = torch.arange(tokens.shape[1], device=x.device) < torch.tensor(counts, device=x.device)[:, None]
        real = torch.cat([real.new_ones(len(counts), 1), real.repeat_interleave(tokens.shape[2], 1)], 1)
        mask = torch.zeros(real.shape, dtype=x.dtype, device=x.device).masked_fill(~real, -math.inf)
        return tokens, mask[:, None, None]

    def forward_features(self, x: Tensor, list_num_channels: Sequence[Sequence[int]] | None = None, index: int = 0) -> Tensor:
        """Tokens `[B, 1 + C · h · w, D]`, the class token first; of an image with fewer channels than others, the last ones are
        padding. Arguments as in `forward`."""
        if list_num_channels is None:
            tokens, mask = self.patches(x.flatten(0, 1).unsqueeze(1)).unflatten(0, (-1, x.shape[1])), None
        else:
            tokens, mask = self.padded(x, list_num_channels[index])
        if tokens.shape[1] > self.max_channels:
            raise VitreousError(
                f"an image has {tokens.shape[1]} channels, the model knows {self.max_channels}: choose among them, or create it "
                "with a larger max_number_channels"
            )
        tokens = (tokens + self.channel_token[:, : tokens.shape[1]]).flatten(1, 2)
        token = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = self.pos_drop(torch.cat([token, tokens], 1))
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def forward(self, x: Tensor, list_num_channels: Sequence[Sequence[int]] | None = None, index: int = 0) -> Tensor:
        """`list_num_channels`: for x of stacked channels `[n, 1, H, W]`, how many each image has, for several crops as in the
        official code, of which x is that of `index`; None for images `[B, C, H, W]`."""
        return self.forward_head(self.forward_features(x, list_num_channels, index))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: PyTorch's transformer layers become timm's attention and MLP."""
    state = renamed(
        state,
        (r"^token_learner\.proj\.", "token_learner."),
        (r"\.self_attn\.in_proj_", ".attn.qkv."),
        (r"\.self_attn\.out_proj\.", ".attn.proj."),
        (r"\.linear(\d)\.", r".mlp.fc\1."),
    )
    return {**state, "pos_embed": state["pos_embed"].squeeze(1)}


publish(
    ChAdaViT,
    "chada_vit_moyen",
    {},
    variant="chada-vit--moyen",
    convert=convert,
    num_classes=0,
    first_conv="token_learner",
)
for _name in ("moyen_c1_3_5", "chadavit16-moyen"):
    official(f"chada-vit--{_name}", ChAdaViT, convert)
