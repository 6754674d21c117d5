"""SoftHGNN: tokens meet in soft hyperedges. Lei et al., "SoftHGNN: Soft Hypergraph Neural Networks for General Visual
Recognition" (IJCV 2026).

Facts from the official repository, Mengqi-Lei/SoftHGNN: the layer, which fits behind any network that gives tokens, and its ViT
for small images. With sparse selection (SeS) the released training code adds its balance loss to the
printed number alone, and it has no gradient; it is not built here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import MetaBlock, require_size
from .classifier import Classifier
from .official import publish, renamed


class SoftHyperedges(nn.Module):
    """How much each token takes part in each hyperedge: `[B, N, C]` to `[B, N, edges]` (equations 3 to 7).

    A prototype of every hyperedge is moved by what the image holds, its mean and its largest token; tokens take part by their
    similarity, the mean over heads, and each hyperedge shares out 1 among them. dynamic, top_k: of the last `dynamic` hyperedges
    the `top_k` with the largest sum of similarities stay, the others are 0; all before them stay. 0 for no selection.
    """

    def __init__(self, channels: int, edges: int, num_heads: int, dynamic: int = 0, top_k: int = 0, drop: float = 0.0) -> None:
        super().__init__()
        if not 0 <= top_k <= dynamic <= edges:
            raise VitreousError(f"of {edges} hyperedges {dynamic} are dynamic, and {top_k} of those stay: this cannot be")
        self.edges, self.num_heads, self.dynamic, self.top_k = edges, num_heads, dynamic, top_k
        self.prototype_base = nn.Parameter(torch.empty(edges, channels))
        nn.init.xavier_uniform_(self.prototype_base)
        self.context_net = nn.Linear(2 * channels, edges * channels)
        self.pre_head_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        context = torch.cat((x.mean(1), x.amax(1)), 1)
        prototypes = self.prototype_base + self.context_net(context).unflatten(1, (self.edges, -1))
        # The mean over heads of their scaled products is one product over all channels.
        scale = 1 / (self.num_heads * math.sqrt(x.shape[2] // self.num_heads))
        logits = self.dropout(scale * self.pre_head_proj(x) @ prototypes.mT)
        shares = logits.softmax(1)
        if not self.dynamic:
            return shares
        fixed = self.edges - self.dynamic
        scores = logits.sum(1)[:, fixed:]
        least = scores.topk(self.top_k, 1).values[:, -1:]
        stays = torch.cat((torch.ones_like(logits[:, 0, :fixed]), (scores >= least).to(logits)), 1)
        return shares * stays.unsqueeze(1)


class SoftHGNN(nn.Module):
    """x + gate · what the hyperedges tell the tokens: messages to hyperedges, and back; `[B, N, C]` (equations 8 to 10)."""

    def __init__(self, channels: int, edges: int = 16, num_heads: int = 8, drop: float = 0.0, **selection: Any) -> None:
        super().__init__()
        self.edge_generator = SoftHyperedges(channels, edges, num_heads, drop=drop, **selection)
        self.edge_proj, self.node_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.gate = nn.Parameter(torch.tensor(1.0))
        self.gated = not selection  # with selection the released layer has a gate that it never uses

    def forward(self, x: Tensor) -> Tensor:
        shares = self.edge_generator(x)
        edges = F.gelu(self.edge_proj(shares.mT @ x))
        told = F.gelu(self.node_proj(shares @ edges))
        return x + (self.gate * told if self.gated else told)


class LocalitySelfAttention(nn.Module):
    """LSA: softmax attention with a learned temperature, in which no token sees itself; `[B, N, C]`.

    Lee, Lee and Song, "Vision Transformer for Small-Size Datasets" (2021), section 3.2.
    """

    def __init__(self, channels: int, num_heads: int, head_dim: int, drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.tensor(math.log(head_dim**-0.5)))
        self.qkv = nn.Linear(channels, 3 * num_heads * head_dim, bias=False)
        self.proj, self.drop = nn.Linear(num_heads * head_dim, channels), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        x = F.scaled_dot_product_attention(q * self.temperature.exp(), k, v, ~itself, scale=1.0)
        return self.drop(self.proj(x.transpose(1, 2).flatten(2)))


class ShiftedPatches(nn.Module):
    """SPT: patches of the image and of four copies shifted by a pixel; `[B, C, H, W]` to `[B, N, channels]` (section 3.1)."""

    def __init__(self, in_chans: int, channels: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        width = 5 * in_chans * patch_size**2
        self.norm, self.proj = nn.LayerNorm(width), nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.pad(x[..., :-1], (1, 0)), F.pad(x[..., 1:], (0, 1))
        down, up = F.pad(x[..., :-1, :], (0, 0, 1, 0)), F.pad(x[..., 1:, :], (0, 0, 0, 1))
        x, p = torch.cat((x, left, right, down, up), 1), self.patch_size
        rows, columns = x.shape[2] // p, x.shape[3] // p
        x = x.unflatten(2, (rows, p)).unflatten(4, (columns, p)).permute(0, 2, 4, 3, 5, 1)
        return self.proj(self.norm(x.flatten(3).flatten(1, 2)))


class SoftHGNNViT(Classifier):
    """A ViT for small images with SoftHGNN behind it; `[B, C, img_size, img_size]` to `[B, num_classes]`."""

    global_pool = "token"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        img_size: int = 32,
        patch_size: int = 4,
        embed_dim: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        mlp_dim: int = 512,
        edges: int = 16,
        edge_heads: int = 8,
        dynamic: int = 0,
        top_k: int = 0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim)
        self.size = (img_size, img_size)
        self.patch_embed = ShiftedPatches(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // patch_size) ** 2 + 1, embed_dim))
        self.blocks = nn.Sequential(
            *(
                MetaBlock(
                    embed_dim,
                    LocalitySelfAttention(embed_dim, num_heads, head_dim, drop_rate),
                    Mlp(embed_dim, mlp_dim, drop=drop_rate),
                    nn.LayerNorm,
                )
                for _ in range(depth)
            )
        )
        selection = dict(dynamic=dynamic, top_k=top_k) if dynamic else {}
        self.soft_hgnn = SoftHGNN(embed_dim, edges, edge_heads, drop_rate, **selection)
        self.norm = nn.LayerNorm(embed_dim)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        require_size(x, self.size, "SoftHGNN's ViT")
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)), 1) + self.pos_embed
        return self.norm(self.soft_hgnn(self.blocks(x)))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours."""
    return renamed(
        state,
        (r"^pos_embedding$", "pos_embed"),
        (r"^to_patch_embedding\.to_patch_tokens\.1\.", "patch_embed.norm."),
        (r"^to_patch_embedding\.to_patch_tokens\.2\.", "patch_embed.proj."),
        (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
        (r"^transformer\.layers\.(\d+)\.0\.fn\.to_qkv\.", r"blocks.\1.attn.qkv."),
        (r"^transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r"blocks.\1.attn.proj."),
        (r"^transformer\.layers\.(\d+)\.0\.fn\.", r"blocks.\1.attn."),
        (r"^transformer\.layers\.(\d+)\.1\.norm\.", r"blocks.\1.norm2."),
        (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.0\.", r"blocks.\1.mlp.fc1."),
        (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.3\.", r"blocks.\1.mlp.fc2."),
        (r"^soft_hgnn\.(edge|node)_proj\.0\.", r"soft_hgnn.\1_proj."),
        (r"^mlp_head\.0\.", "norm."),
        (r"^mlp_head\.1\.", "head."),
    )


SES = dict(dynamic=32, top_k=16, edges=48)
for _name, _arguments in {
    "vit_cifar": dict(),
    "vit_ses_cifar": SES,
    "vit_ses_tiny": dict(embed_dim=128, depth=2, head_dim=32, edges=28, dynamic=24, top_k=6),
}.items():
    publish(
        SoftHGNNViT,
        f"softhgnn_{_name}",
        _arguments,
        variant=f"softhgnn--{_name}",
        convert=convert,
        size=32,
        num_classes=10,
    )
