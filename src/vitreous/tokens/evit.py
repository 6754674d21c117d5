"""EViT: keep the patches that the class token attends to, fuse the rest into one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import PlainBlock, Reduction, Tokens, note, places, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step


class KeepByClassAttention(nn.Module):
    """`[B, P + N, C]` to `[B, P + ceil(keep·N) + 1, C]`: P prefix tokens, the attentive patches, one fused token."""

    def __init__(self, keep: float, prefix: int, class_token: bool, fuse: bool) -> None:
        super().__init__()
        self.keep, self.prefix, self.class_token, self.fuse = keep, prefix, class_token, fuse

    def forward(self, tokens: Tokens, q: Tensor, k: Tensor, bias: Tensor | None, block: PlainBlock) -> Tokens:
        x, size, p = tokens.x, tokens.size, self.prefix
        n = x.shape[1] - p
        left = math.ceil(self.keep * n)
        if left >= n:
            return tokens
        # Only the class token's row of the attention map is needed, so the fused kernel can do the rest.
        rows = q[:, :, :1] if self.class_token else q
        if bias is not None and self.class_token:
            bias = bias[:, :, :1]
        scores = rows * cast(float, block.attn.scale) @ k.mT
        scores = (scores if bias is None else scores + bias).softmax(-1).mean((1, 2))[:, p:]  # [B, N]
        order = scores.argsort(1, descending=True)
        sorted_x = x[:, p:].gather(1, order[..., None].expand(-1, -1, x.shape[2]))
        parts = [x[:, :p], sorted_x[:, :left]]
        if self.fuse:
            weight = scores.gather(1, order[:, left:])
            parts.append(weight[:, None].to(x.dtype) @ sorted_x[:, left:])
        if size is not None:
            s = size[:, p:].gather(1, order[..., None])
            sizes = [size[:, :p], s[:, :left]] + ([s[:, left:].sum(1, keepdim=True)] if self.fuse else [])
            size = torch.cat(sizes, 1)
        note(block, lambda: self._reduction(order, scores, left, block.name))
        place = tokens.place
        if place is not None:
            standing = place[:, p:].gather(1, order[:, : left + self.fuse])
            place = torch.cat([place[:, :p], standing], 1)
        return Tokens(torch.cat(parts, 1), size, place)

    def _reduction(self, order: Tensor, scores: Tensor, left: int, layer: str) -> Reduction:
        b, n = order.shape
        place = torch.empty_like(order).scatter_(1, order, torch.arange(n, device=order.device).expand(b, n))
        first = torch.arange(self.prefix, device=order.device).expand(b, -1)
        into = torch.cat([first, place.clamp_max(left) + self.prefix], 1)
        weight = torch.ones_like(into, dtype=scores.dtype)
        gone = into == left + self.prefix
        weight[:, self.prefix :] = torch.where(gone[:, self.prefix :], scores if self.fuse else 0.0 * scores, 1.0)
        tokens = self.prefix + left + 1  # without fusing, the last row is empty
        return Reduction(layer, into, weight, tokens if self.fuse else tokens - 1, rest=left + self.prefix)


@step("tokens")
@dataclass(frozen=True)
class EViT(Step):
    """Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations" (ICLR 2022).

    In the blocks `at` (default: after a quarter, a half and three quarters of the depth, the paper's 3, 6, 9 of 12), the
    `ceil(keep·N)` patches with the highest class-token attention, averaged over heads, stay (section 3.2, eq. 3); the others
    become one token, their sum weighted by that attention (eq. 5, not normalised, as in the official code). Register and
    distillation tokens always stay. A model without a class token is scored by the attention that all tokens pay. Where attention
    knows places, the fused token stands where the most attended of its parts stood.

    Needs no training and no data; deployable: exports with a fixed number of tokens. `keep=1` is the identity.
    """

    keep: float = 0.7
    at: tuple[int, ...] | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise VitreousError(f"tokens.EViT: keep must lie in (0, 1], not {self.keep}")

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        anatomy = read(model)
        blocks = plain_blocks(model, self.name)
        depth = len(blocks)
        at = places(self, depth, (depth // 4, depth // 2, 3 * depth // 4))
        for i in at:
            if len(blocks[i].reducers):
                raise VitreousError(f"{self.name}: block {i} already shortens its tokens; choose other blocks with at=")
            blocks[i].reducers.append(KeepByClassAttention(self.keep, anatomy.prefix, anatomy.class_token, self.fuse))
