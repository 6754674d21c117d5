"""MoH: attention heads as experts, chosen for each token. Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head
Attention" (2024), here on TransNeXt: Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers" (CVPR 2024).

Facts from the official repository, SkyworkAI/MoH. Position offsets are computed from the maps' sides when the model runs, so
that it takes other images than those of `img_size`, which the official code asks for. As there, all heads are computed and
those that were not chosen are multiplied by zero: the heads spared make the model no faster.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import MetaBlock
from .classifier import Pyramid, init_weights
from .official import publish, renamed


class HeadRouter(nn.Module):
    """Tokens `[B, N, C]` to a weight for every head, `[B, N, heads]` (equations 5 and 6).

    The first `shared` heads always serve. Of the others, each token has the `routed` with the largest scores; with none
    routed, all heads are shared. As in the official code, the weights of a kind add up to the number of heads that serve,
    times its share in the balance of both kinds, which adds up to 2; the paper has no such factors.
    """

    def __init__(self, channels: int, heads: int, shared: int, routed: int) -> None:
        super().__init__()
        self.n_shared, self.n_routed = shared, routed
        self.shared = nn.Linear(channels, shared, bias=False)
        if routed:
            self.routed = nn.Linear(channels, heads - shared, bias=False)
            self.balance = nn.Linear(channels, 2, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the heads that are not shared, and 1 where a token chose one, else 0; `[B, N, heads - shared]` both."""
        scores = self.routed(x).softmax(-1)
        return scores, torch.zeros_like(scores).scatter(-1, scores.topk(self.n_routed, -1).indices, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared(x).softmax(-1) * self.n_shared
        if not self.n_routed:
            return shared
        scores, chosen = self.route(x)
        routed = scores * chosen
        routed = routed / routed.sum(-1, keepdim=True) * self.n_routed
        a1, a2 = (self.balance(x).softmax(-1) * 2).chunk(2, -1)
        return torch.cat([shared * a1, routed * a2], -1)


@contextmanager
def load_balance(model: nn.Module) -> Iterator[list[Tensor]]:
    """The load balance loss (equation 7) of every layer that routes, a scalar for each time that it runs inside.

    It is smallest where tokens use all heads evenly. Official training adds 0.01 times the mean over layers:
    `with load_balance(model) as losses: loss = criterion(model(x), y)`, then `+ 0.01 * torch.stack(losses).mean()`.
    """
    losses: list[Tensor] = []

    def note(router: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        scores, chosen = cast(HeadRouter, router).route(inputs[0])
        losses.append((chosen.mean((0, 1)) * scores.mean((0, 1))).mean() * scores.shape[-1] ** 2)

    routers = [m for m in model.modules() if isinstance(m, HeadRouter) and m.n_routed]
    handles = [router.register_forward_hook(note) for router in routers]
    try:
        yield losses
    finally:
        for handle in handles:
            handle.remove()


class CosineAttention(nn.Module):
    """Attention of every position to every other on maps `[B, C, H, W]`, its heads weighed by a router.

    TransNeXt's: cosine similarity, a learned embedding added to the queries, a learned temperature times the
    logarithm of the number of keys, and a bias that an MLP reads off the distance on a logarithmic scale, in units of an
    eighth of `side`, the maps' side in pretraining.
    """

    reduction = 1

    def __init__(self, channels: int, heads: int, shared: int, routed: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(heads, 1, channels // heads), std=0.02))
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.position = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads))
        self.router = HeadRouter(channels, heads, shared, routed)
        self.proj = nn.Linear(channels, channels)

    def split(self, x: Tensor) -> Tensor:
        """`[B, N, n · d]` to `[B, n, N, d]`."""
        return x.unflatten(-1, (-1, self.query_embedding.shape[-1])).transpose(1, 2)

    def position_bias(self, h: int, w: int, like: Tensor) -> Tensor:
        """`[heads, h · w, keys]`; a key lies in the middle of the `reduction`² positions that it pools."""
        r, device = self.reduction, like.device
        axes, index = [], []
        for n in (h, w):
            steps = torch.arange(2 * n - r, device=device) - (n - r) - (r - 1) / 2
            axes.append((steps / (self.side - 1) * 8).to(like))
            index.append(torch.arange(n, device=device)[:, None] - torch.arange(0, n, r, device=device) + n - r)
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        bias = self.position(offsets.sign() * (offsets.abs() + 1).log2() / 3)
        pairs = index[0][:, None, :, None] * (2 * w - r) + index[1][None, :, None, :]
        return bias.T[:, pairs.reshape(h * w, -1)]

    def weighed(self, x: Tensor, tokens: Tensor, h: int) -> Tensor:
        """What the heads give, `[B, heads, N, d]`, times the router's weights for the tokens; a map `[B, C, H, W]`."""
        x = x.transpose(1, 2) * self.router(tokens).unsqueeze(-1)
        return self.proj(x.flatten(2)).mT.unflatten(2, (h, -1))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        tokens = x.flatten(2).mT
        q = F.normalize(self.split(self.q(tokens)), dim=-1) + self.query_embedding
        k, v = self.split(self.kv(tokens)).chunk(2, 1)
        q = q * F.softplus(self.temperature) * math.log(h * w)
        scores = q @ F.normalize(k, dim=-1).mT + self.position_bias(h, w, x)
        return self.weighed(scores.softmax(-1) @ v, tokens, h)


class AggregatedAttention(CosineAttention):
    """Attention of every position to its 3 × 3 neighbours and to the map pooled by `reduction`, in one softmax.

    TransNeXt's. The neighbours have also learned tokens that the query attends to without a softmax.
    """

    def __init__(self, channels: int, heads: int, shared: int, routed: int, side: int, reduction: int) -> None:
        super().__init__(channels, heads, shared, routed, side)
        self.reduction = reduction
        self.sr, self.norm = nn.Conv2d(channels, channels, 1), nn.LayerNorm(channels)
        self.local_bias = nn.Parameter(trunc_normal_(torch.empty(heads, 9), std=0.0004))
        self.learnable_tokens = nn.Parameter(trunc_normal_(torch.empty(heads, channels // heads, 9), std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, 9))

    @staticmethod
    def neighbours(x: Tensor, h: int) -> Tensor:
        """`[B, n, N, d]` to `[B, n, N, d, 9]`, zeros beyond the border."""
        x = F.pad(x.mT.unflatten(-1, (h, -1)), (1, 1, 1, 1))
        w = x.shape[-1] - 2
        shifted = [x[..., i : i + h, j : j + w].flatten(-2).mT for i in range(3) for j in range(3)]
        return torch.stack(shifted, -1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        tokens = x.flatten(2).mT
        pooled = self.norm(F.avg_pool2d(F.gelu(self.sr(x)), self.reduction).flatten(2).mT)
        k_pool, v_pool = self.split(self.kv(pooled)).chunk(2, 1)
        k, v = self.split(self.kv(tokens)).chunk(2, 1)
        k, v = self.neighbours(F.normalize(k, dim=-1), h), self.neighbours(v, h)

        inside = self.neighbours(x.new_ones(1, 1, h * w, 1), h).squeeze(-2)
        normal = F.normalize(self.split(self.q(tokens)), dim=-1)
        keys = inside.sum(-1, keepdim=True) + pooled.shape[1]
        q = (normal + self.query_embedding) * F.softplus(self.temperature) * keys.log()
        local = ((q.unsqueeze(-2) @ k).squeeze(-2) + self.local_bias.unsqueeze(1)).masked_fill(inside == 0, -math.inf)
        distant = q @ F.normalize(k_pool, dim=-1).mT + self.position_bias(h, w, x)
        local, distant = torch.cat([local, distant], -1).softmax(-1).split([9, pooled.shape[1]], -1)

        local = local + normal @ self.learnable_tokens + self.learnable_bias
        return self.weighed((v @ local.unsqueeze(-1)).squeeze(-1) + distant @ v_pool, tokens, h)


class ConvGlu(nn.Module):
    """TransNeXt's convolutional GLU on maps `[B, C, H, W]`: half of what `fc1` gives, through a depthwise 3 × 3 and a GELU,
    gates the other half."""

    def __init__(self, channels: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2 * hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.fc1(x).chunk(2, 1)
        return self.drop(self.fc2(self.drop(F.gelu(self.dwconv(gate)) * x)))


class MoHTransNeXt(Pyramid):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`; H and W multiples of 32.

    shared_head, routed_head: heads of each stage that serve every token, and those that a token chooses among the others.
    pretrain_size: pixels a side of the images that position offsets are relative to.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (72, 144, 288, 576),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        shared_head: Sequence[int] = (3, 6, 3, 4),
        routed_head: Sequence[int] = (0, 0, 6, 12),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        depths: Sequence[int] = (5, 5, 22, 5),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        pretrain_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(embed_dims):
            embed = nn.Conv2d(in_chans, width, 3 if i else 7, 2 if i else 4, 1 if i else 3)
            heads, side = (width, num_heads[i], shared_head[i], routed_head[i]), pretrain_size // 4 // 2**i
            blocks = [
                MetaBlock(
                    width,
                    CosineAttention(*heads, side) if sr_ratios[i] == 1 else AggregatedAttention(*heads, side, sr_ratios[i]),
                    ConvGlu(width, int(2 * width * mlp_ratios[i] / 3), drop_rate),
                    partial(LayerNorm2d, eps=1e-6),
                    drop_path=rate,
                )
                for rate in rates[i]
            ]
            parts: dict[str, nn.Module] = {
                "embed": nn.Sequential(embed, LayerNorm2d(width, eps=1e-5)),
                "blocks": nn.Sequential(*blocks),
                "norm": LayerNorm2d(width, eps=1e-6),
            }
            self.stages.append(nn.Sequential(OrderedDict(parts)))
            in_chans = width
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        if x.shape[2] % 32 or x.shape[3] % 32:
            raise VitreousError(f"MoH-TransNeXt takes images whose sides are multiples of 32, not {list(x.shape[2:])}")
        return super().forward_features(x)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: `qkv` becomes `q` and `kv`, and the linears of an MLP 1 × 1 convolutions."""
    parts = {r"patch_embed{}\.proj": "embed.0", r"patch_embed{}\.norm": "embed.1", r"block{}": "blocks", r"norm{}": "norm"}
    stages = [(rf"^{name.format(i + 1)}\.", f"stages.{i}.{part}.") for i in range(4) for name, part in parts.items()]
    names = {}
    for key, tensor in state.items():
        if ".attn.qkv." in key:
            width = tensor.shape[0] // 3
            names[key.replace(".qkv.", ".q.")], tensor = tensor[:width], tensor[width:]
            key = key.replace(".qkv.", ".kv.")
        if re.search(r"\.mlp\.fc\d\.weight$", key):
            tensor = tensor[:, :, None, None]
        names[key] = tensor
    return renamed(
        names,
        *stages,
        (r"mlp\.dwconv\.dwconv", "mlp.dwconv"),
        (r"cpb_fc1", "position.0"),
        (r"cpb_fc2", "position.2"),
        (r"relative_pos_bias_local", "local_bias"),
        (r"attn\.wg\.", "attn.router.routed."),
        (r"attn\.wg_0\.", "attn.router.balance."),
        (r"attn\.wg_1\.", "attn.router.shared."),
    )


SMALL = dict(embed_dims=(72, 144, 288, 576), num_heads=(3, 6, 12, 24), depths=(5, 5, 22, 5))
BASE = dict(embed_dims=(96, 192, 384, 768), num_heads=(4, 8, 16, 32), depths=(5, 5, 23, 5))
VARIANTS = {
    "transnext_small_75": dict(SMALL, shared_head=(3, 6, 3, 4), routed_head=(0, 0, 6, 12)),
    "transnext_small_80": dict(SMALL, shared_head=(3, 6, 3, 8), routed_head=(0, 0, 6, 12)),
    "transnext_base_50": dict(BASE, shared_head=(2, 2, 2, 4), routed_head=(2, 4, 6, 8)),
    "transnext_base_75": dict(BASE, shared_head=(4, 8, 4, 5), routed_head=(0, 0, 8, 16)),
}
for _name, _arguments in VARIANTS.items():
    publish(MoHTransNeXt, f"moh_{_name}", _arguments, variant=f"moh--{_name}", convert=convert, first_conv="stages.0.embed.0")
