"""DependencyViT: tokens send to their parents instead of gathering, and a tree of patches can be read from who sends to whom.

Ding et al., "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention" (CVPR 2023). The official
repository holds no code. What the paper's abstract and figures leave open follows the implementation proposed to timm in its
pull request 2062, whose author read the appendix, unless a docstring here says otherwise.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from timm.layers import DropPath, LayerScale, Mlp, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..errors import VitreousError
from .official import official

TEMPERATURE = 0.1  # of the head selector's softmax
LITE = {2: 0.84, 5: 0.68, 8: 0.52, 11: 0.36}  # block, counted from 1: share of the patches that it leaves


class ReversedAttention(nn.Module):
    """Attention whose maps are turned round: a child's softmax over possible parents says where its own value *goes*.

    The head selector shares each child's message out among the heads (a sharp softmax), the message controller says how much
    of it is sent at all (a sigmoid). That factor is multiplied over the layers, so that a token which fell silent stays so.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.head_selector = nn.Linear(dim, num_heads, bias=False)
        self.message_controller = Mlp(dim, dim // 2, 1, bias=False)

    def forward(self, x: Tensor, sent: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[B, N, C]`, and the share of its message that each still sends `[B, N, 1]`, to the same."""
        forth, gate, v, sent = self._parts(x, sent)
        y = forth.mT @ (v * gate)  # a parent adds up what its children send; nothing normalises over the children
        return self.proj(y.transpose(1, 2).flatten(2)), sent

    def messages(self, x: Tensor, sent: Tensor) -> Tensor:
        """The soft dependency mask, summed over heads: `[B, child, parent]`. A row sums to what that child still sends."""
        forth, gate, _, _ = self._parts(x, sent)
        return (forth * gate).sum(1)

    def _parts(self, x: Tensor, sent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        forth = (q * self.scale @ k.mT).softmax(-1)  # [B, heads, child, parent]
        sent = sent * self.message_controller(x).sigmoid()
        gate = (self.head_selector(x) / TEMPERATURE).softmax(-1) * sent  # [B, child, heads]
        return forth, gate.mT[..., None], v, sent


class DependencyBlock(nn.Module):
    """A pre-norm block around reversed attention; between attention and MLP it leaves `keep` tokens, if that is set."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, keep: int | None) -> None:
        super().__init__()
        self.keep = keep
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = ReversedAttention(dim, num_heads), Mlp(dim, 4 * dim)
        self.ls1, self.ls2 = LayerScale(dim, 1e-6), LayerScale(dim, 1e-6)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, sent: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, N, C]`, `[B, N, 1]` as in the attention, and the patch that each token is, `[B, N]`; to the same of fewer."""
        y, sent = self.attn(self.norm1(x), sent)
        x = x + self.drop_path(self.ls1(y))
        if self.keep is not None and self.keep < x.shape[1]:
            # Leaves are the tokens that (almost) stopped sending; whoever stays, stays in order.
            index = sent[..., 0].topk(self.keep, sorted=False).indices.sort().values
            x, sent = (t.gather(1, index[..., None].expand(-1, -1, t.shape[2])) for t in (x, sent))
            place = place.gather(1, index)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x)))), sent, place


class DependencyViT(nn.Module):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`, without a class token.

    Classes are read from the mean of the tokens weighted by what they still send, for the message ends up in the root. The
    weights are normalised here: products of twelve sigmoids are too small for 16 bits. `lite` prunes leaves.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 12,
        lite: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.embed_dim, self.num_features, self.head_hidden_size = num_classes, embed_dim, embed_dim, embed_dim
        self.num_prefix_tokens, self.global_pool = 0, "avg"
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        n = self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, n, embed_dim))
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        keeps = [max(1, int(LITE[i] * n)) if lite and i in LITE else None for i in range(1, depth + 1)]
        self.blocks = nn.ModuleList(DependencyBlock(embed_dim, num_heads, r, k) for r, k in zip(rates, keeps, strict=True))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        trunc_normal_(self.pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes`; 0 leaves the pooled features."""
        if global_pool not in (None, "avg"):
            raise VitreousError(f"DependencyViT averages its tokens by what they send: global_pool cannot be {global_pool!r}")
        self.num_classes = num_classes
        new = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head = new.to(self.pos_embed.device, self.pos_embed.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the tokens that are left `[B, N, C]`, times their weights, whose mean is 1."""
        x = self.patch_embed(x) + self.pos_embed
        sent = torch.ones_like(x[..., :1])
        place = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        for block in self.blocks:
            x, sent, place = block(x, sent, place)
        return self.norm(x) * (sent / sent.mean(1, keepdim=True).clamp_min(1e-12))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x.mean(1))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def dependency_tree(model: nn.Module, x: Tensor) -> np.ndarray:
    """The parent of every patch of images `x` `[B, C, H, W]`: `[B, N]` int64, −1 for the root.

    Messages from child to parent are added up over layers and heads, a child's row is read as probabilities of its parents,
    and the tree is the likeliest one: the maximum spanning arborescence (Chu & Liu 1965, Edmonds 1967). In a Lite model a
    pruned patch has the messages from before it was pruned. Raises VitreousError for a model without reversed attention.
    """
    if not isinstance(model, DependencyViT):
        raise VitreousError(f"dependency_tree reads reversed attention, and {type(model).__name__} has none: use a dependencyvit")
    total = x.new_zeros(len(x), model.pos_embed.shape[1], model.pos_embed.shape[1])
    images = torch.arange(len(x), device=x.device)[:, None, None]

    def add(block: nn.Module, given: tuple[Tensor, Tensor, Tensor], _: object) -> None:
        tokens, sent, place = given
        b = cast(DependencyBlock, block)
        total[images, place[:, :, None], place[:, None, :]] += b.attn.messages(b.norm1(tokens), sent).to(total)

    training, hooks = model.training, [b.register_forward_hook(cast(Any, add)) for b in model.blocks]
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return np.stack([likeliest_tree(t) for t in total.double().cpu().numpy()])


def likeliest_tree(messages: np.ndarray) -> np.ndarray:
    """The likeliest tree for messages `[child, parent]` ≥ 0: the parent of each node `[N]`, −1 for the root."""
    n = len(messages)
    logs = np.log(np.maximum(messages / np.maximum(messages.sum(1, keepdims=True), 1e-30), 1e-12))
    # Node 0 stands above the root. Being its child costs more than any tree, so that there is one root.
    score = np.full((n + 1, n + 1), -np.inf)
    score[1:, 1:], score[1:, 0] = logs, -1e6
    np.fill_diagonal(score, -np.inf)
    return _arborescence(score)[1:] - 1


def _arborescence(score: np.ndarray) -> np.ndarray:
    """Chu-Liu-Edmonds on `[child, parent]` scores, node 0 at the top: the parents of the maximum spanning arborescence.

    networkx finds the same one; for 196 patches it takes half a minute, and this a twentieth of a second.
    """
    parent = score.argmax(1)
    parent[0] = 0
    cycle = _cycle(parent)
    if cycle is None:
        return parent
    # The cycle becomes one node, the last. Who becomes its child picks a member; its own parent takes a member's place.
    outside = np.setdiff1d(np.arange(len(score)), cycle)
    m = len(outside)
    smaller = np.full((m + 1, m + 1), -np.inf)
    smaller[:m, :m] = score[np.ix_(outside, outside)]
    member = cycle[score[np.ix_(outside, cycle)].argmax(1)]
    smaller[:m, m] = score[outside, member]
    gain = score[np.ix_(cycle, outside)] - score[cycle, parent[cycle]][:, None]
    smaller[m, :m] = gain.max(0)
    found = _arborescence(smaller)
    parent[outside] = np.where(found[:m] == m, member, outside[np.minimum(found[:m], m - 1)])
    parent[cycle[gain[:, found[m]].argmax()]] = outside[found[m]]
    parent[0] = 0
    return parent


def _cycle(parent: np.ndarray) -> np.ndarray | None:
    """The nodes of one cycle, or None; node 0 is its own parent and no cycle."""
    seen = np.zeros(len(parent), dtype=int)
    for start in range(1, len(parent)):
        node = start
        while node and not seen[node]:
            seen[node] = start
            node = parent[node]
        if node and seen[node] == start:
            nodes = [node]
            while parent[nodes[-1]] != node:
                nodes.append(parent[nodes[-1]])
            return np.array(nodes)
    return None


SIZES = {"tiny": 192, "small": 384}

default_cfgs = generate_default_cfgs(
    {
        f"dependencyvit_{lite}{size}": dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            fixed_input_size=True,
            crop_pct=0.9,
            interpolation="bicubic",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            first_conv="patch_embed.proj",
            classifier="head",
        )
        for size in SIZES
        for lite in ("", "lite_")
    }
)


def _create(size: str, lite: bool, pretrained: bool, kwargs: dict[str, Any]) -> DependencyViT:
    name = f"dependencyvit_{'lite_' if lite else ''}{size}"
    return cast(
        DependencyViT, build_model_with_cfg(DependencyViT, name, pretrained, **{"embed_dim": SIZES[size], "lite": lite, **kwargs})
    )


@register_model
def dependencyvit_tiny(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """DependencyViT-T: the width of DeiT-T, 12 heads."""
    return _create("tiny", False, pretrained, kwargs)


@register_model
def dependencyvit_small(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """DependencyViT-S: the width of DeiT-S, 12 heads."""
    return _create("small", False, pretrained, kwargs)


@register_model
def dependencyvit_lite_tiny(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """DependencyViT-Lite-T: prunes another 16 % of the patches in the blocks 2, 5, 8 and 11."""
    return _create("tiny", True, pretrained, kwargs)


@register_model
def dependencyvit_lite_small(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """DependencyViT-Lite-S: prunes another 16 % of the patches in the blocks 2, 5, 8 and 11."""
    return _create("small", True, pretrained, kwargs)


for _build in (dependencyvit_tiny, dependencyvit_small, dependencyvit_lite_tiny, dependencyvit_lite_small):
    official(f"dependencyvit--{_build.__name__}", _build)
