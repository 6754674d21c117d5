"""Monarch Mixer: products with Monarch matrices along the sequence and along the channels. Fu et al., "Monarch Mixer: A Simple
Sub-Quadratic GEMM-Based Architecture" (NeurIPS 2023).

Facts from the official repository, HazyResearch/m2, which has the BERT alone; the ViT here is ours, from the paper's text.
Along the sequence a Fourier transform and back are the two Monarch matrices, and what is learned is an implicit filter; along
the channels a single block-diagonal matrix. As released, the short convolution sees only what comes before, also where the long
one looks both ways.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from torch import Tensor, nn

from ..mixers import MetaBlock, block_diagonal, require_size
from ..mixers.implicit import Places, Sine, decay_rates, filter_network, long_convolution
from .classifier import Classifier, init_weights
from .official import official, publish


class LongFilter(nn.Module):
    """Channels convolved over the whole sequence, `[B, C, length]`, with filters of their own, plus `bias` times themselves.

    bidirectional: a second filter for what comes after; its first weight is for the next place.
    """

    deltas: Tensor

    def __init__(self, channels: int, length: int, bidirectional: bool, places: int, width: int, omega: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(channels))
        self.pos_emb = Places(length, places)
        sine = Sine(width, omega)
        self.implicit_filter = filter_network(places, width, channels, sine)
        self.implicit_filter_rev = filter_network(places, width, channels, sine) if bidirectional else None
        self.register_buffer("deltas", decay_rates(channels), persistent=False)

    def kernel(self) -> Tensor:
        """`[C, 2 · length]`, whose last places stand for those after."""
        window = (-self.pos_emb.t * self.deltas).exp()
        ahead = (self.implicit_filter(self.pos_emb.z) * window)[0].T
        if self.implicit_filter_rev is None:
            return F.pad(ahead, (0, ahead.shape[1]))
        return torch.cat((ahead, (self.implicit_filter_rev(self.pos_emb.z) * window)[0].T.flip(1)), 1)

    def forward(self, x: Tensor) -> Tensor:
        y = long_convolution(x.unsqueeze(2), self.kernel().unsqueeze(1)).squeeze(2)
        return y + self.bias[:, None] * x


class SequenceMixer(nn.Module):
    """A gated long convolution of tokens `[B, length, C]`: x₂ · longconv(x₁ · v), and with `residual` + longconv(input)."""

    def __init__(self, channels: int, length: int, bidirectional: bool = True, residual: bool = True, **kwargs: Any) -> None:
        super().__init__()
        self.filter_fn = LongFilter(channels, length, bidirectional, **kwargs)
        self.filter_fn2 = LongFilter(channels, length, bidirectional, **kwargs) if residual else None
        self.in_linear, self.out_linear = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.short_filter = nn.Conv1d(3 * channels, 3 * channels, 3, groups=3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        first, second, v = self.short_filter(F.pad(self.in_linear(x).mT, (2, 0))).chunk(3, 1)
        y = self.filter_fn(v * first) * second
        if self.filter_fn2 is not None:
            y = y + self.filter_fn2(x.mT)
        return self.out_linear(y.mT)


class BlockdiagLinear(nn.Module):
    """A linear layer whose matrix is `nblocks` blocks; `[…, inputs]` to `[…, outputs]`."""

    def __init__(self, inputs: int, outputs: int, nblocks: int) -> None:
        super().__init__()
        # Blocks start as those of a dense matrix would, times √nblocks: a unit has that many fewer inputs.
        self.weight = nn.Parameter(torch.empty(nblocks, outputs // nblocks, inputs // nblocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        trunc_normal_(self.weight, std=0.02 * nblocks**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return block_diagonal(x, self.weight).flatten(-2) + self.bias


class BlockdiagMlp(nn.Module):
    """An MLP of block-diagonal layers; `[…, C]`."""

    def __init__(self, channels: int, hidden: int, nblocks: int) -> None:
        super().__init__()
        self.up, self.down = BlockdiagLinear(channels, hidden, nblocks), BlockdiagLinear(hidden, channels, nblocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class ReleasedLayer(nn.Module):
    """The parts of the released BERT alone: y = mixer(x), then y + MLP(y); maps `[B, C, H, W]` to tokens `[B, H · W, C]`."""

    def __init__(self, channels: int, nblocks: int, mlp_ratio: float = 4.0, **kwargs: Any) -> None:
        super().__init__()
        self.mixer, self.mlp = SequenceMixer(channels, **kwargs), BlockdiagMlp(channels, int(channels * mlp_ratio), nblocks)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(x.flatten(2).mT)
        return y + self.mlp(y)


class MonarchMixerViT(Classifier):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`: a ViT without attention, class token and dense MLPs.

    nblocks: of the MLPs. places, width, omega: of the filters (`mixers.implicit`).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        nblocks: int = 4,
        mlp_ratio: float = 4.0,
        places: int = 5,
        width: int = 64,
        omega: float = 10.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.size = (img_size, img_size)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        tokens = cast(int, self.patch_embed.num_patches)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        trunc_normal_(self.pos_embed, std=0.02)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(
                MetaBlock(
                    embed_dim,
                    SequenceMixer(embed_dim, tokens, places=places, width=width, omega=omega),
                    BlockdiagMlp(embed_dim, int(embed_dim * mlp_ratio), nblocks),
                    norm,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                )
                for i in range(depth)
            )
        )
        self.norm = norm(embed_dim)
        init_weights(self.patch_embed.proj)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        require_size(x, self.size, "Monarch Mixer")
        return self.norm(self.blocks(self.patch_embed(x) + self.pos_embed))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: what the constructor computes is left out."""
    kept = {k: v for k, v in state.items() if not k.endswith((".pos_emb.t", ".modulation.deltas"))}
    return {f"mlp.{k}" if k.startswith(("up.", "down.")) else k: v for k, v in kept.items()}


publish(MonarchMixerViT, "m2_vit_b", {}, variant="monarch-mixer--m2_vit_b", first_conv="patch_embed.proj")
official(
    "monarch-mixer--causal",
    partial(ReleasedLayer, 12, 2, length=25, bidirectional=False, residual=False, places=3, width=8, omega=1.0),
    convert,
)
_both_ways = partial(ReleasedLayer, 16, 4, length=36, places=5, width=16, omega=10.0)
official("monarch-mixer--bidirectional_residual", _both_ways, convert)
official("monarch-mixer--bidirectional_plain", partial(_both_ways, residual=False), convert)
