"""Semantic tokens (STViT): a few cluster centers, pooled in space and refined by attention, go on in place of the patches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..anatomy import read
from ..anatomy.parts import branch, emit, project
from ..anatomy.positions import Turn
from ..blocks import PlainAttention, PlainBlock, Reduction, Tokens, note, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step


class WindowPooling(nn.Module):
    """What enters the first block, `[B, P + h·w, C]`, as queries, tokens (both `[B, P + windows, C]`) and patches.

    Each window gives one mean, weighted by a softmax within the window of a depthwise 3 × 3 convolution, LayerNorm, GELU and a
    projection to one score.
    """

    window: Tensor

    def __init__(self, dim: int, grid: tuple[int, int], windows: tuple[int, int], prefix: int) -> None:
        super().__init__()
        self.grid, self.windows, self.prefix = grid, windows[0] * windows[1], prefix
        conv, score = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Conv2d(dim, 1, 1, bias=False)
        for weight in (conv.weight, score.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(cast(Tensor, conv.bias))
        self.score = nn.Sequential(conv, LayerNorm2d(dim), nn.GELU(), score)
        rows, columns = (torch.tensor(deal(n, m)) for n, m in zip(grid, windows, strict=True))
        self.register_buffer("window", (rows[:, None] * windows[1] + columns).flatten(), persistent=False)

    def forward(self, x: Tensor, block: PlainBlock) -> tuple[Tensor, Tensor, Tensor]:
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        if patches.shape[1] != len(self.window):
            raise VitreousError(
                f"tokens.SemanticTokens: {patches.shape[1]} patches enter block '{block.name}', which pools {len(self.window)}: "
                "keep to the image size, and let no other step shorten the tokens before"
            )
        score = self.score(patches.mT.unflatten(-1, self.grid)).flatten(2)  # [B, 1, h·w]
        own = self.window == torch.arange(self.windows, device=x.device)[:, None]
        weights = torch.where(own, score, float("-inf")).softmax(-1)  # [B, windows, h·w]
        note(block, lambda: self._reduction(weights, block.name))
        tokens = torch.cat([prefix, weights @ patches], 1)
        return tokens, tokens, patches

    def _reduction(self, weights: Tensor, layer: str) -> Reduction:
        p = self.prefix
        into = torch.cat([torch.arange(p, device=weights.device), self.window + p]).expand(len(weights), -1)
        weight = torch.cat([weights.new_ones(len(weights), p), weights.sum(1)], 1)
        return Reduction(layer, into, weight, p + self.windows)


class Centers(nn.Module):
    """What enters the second block, `[B, P + M + N, C]`, as queries, tokens (both `[B, P + M, C]`) and patches.

    The queries are the tokens with learned centers added, the same for every image (the paper's G).
    """

    def __init__(self, tokens: int, dim: int, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, tokens, dim), std=0.02))

    def forward(self, x: Tensor, block: PlainBlock) -> tuple[Tensor, Tensor, Tensor]:
        tokens, patches = x.tensor_split([self.prefix + self.weight.shape[1]], 1)
        query = torch.cat([tokens[:, : self.prefix], tokens[:, self.prefix :] + self.weight], 1)
        return query, tokens, patches


def deal(n: int, windows: int) -> list[int]:
    """The window of each of `n` places: of equal size, those at both borders cut, as 3, 4, 4, 3 for 14 places and 4 windows."""
    size = -(-n // windows)
    first = (size * windows - n) // 2
    dealt = [(i + first) // size for i in range(n)]
    return dealt if len(set(dealt)) == windows else [i * windows // n for i in range(n)]


def arrange(tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of `tokens` windows that suit the grid best: as nearly square as its patches allow."""
    shapes = [(r, tokens // r) for r in range(1, tokens + 1) if tokens % r == 0 and r <= grid[0] and tokens // r <= grid[1]]
    if not shapes:
        raise VitreousError(
            f"tokens.SemanticTokens: {tokens} windows do not fit a grid of {grid[0]} × {grid[1]} patches: choose a "
            "number of tokens that is a product of at most these"
        )
    return min(shapes, key=lambda s: abs(math.log(grid[0] / s[0] / (grid[1] / s[1]))))


class CenterAttention(PlainAttention):
    """The attention that it replaces, with the first `rows` tokens as queries and all others as keys."""

    def __init__(self, attn: PlainAttention, rows: int) -> None:
        super().__init__(attn)
        self.operands, self.rows = attn.operands, rows

    def forward(
        self, x: Tensor, bias: Tensor | None = None, look: bool = False, fuse: Any = None, turn: Turn | None = None
    ) -> Any:
        """`[B, rows + M, C]` to `[B, rows, C]`."""
        n = self.rows
        q, k, v = project(self, x, turn)
        q, k, v = q[:, :, :n], k[:, :, n:], v[:, :, n:]
        bias = None if bias is None else bias[:, :, :n, n:]
        if self.operands is None:
            p = self._drop_rate()
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=cast(float, self.scale))
        else:
            mixed = self._mix(self._probabilities(q, k, bias), v)
        return emit(self, mixed, x[:, :n])


class SemanticBlock(PlainBlock):
    """A plain block whose queries are prefix and semantic tokens, and whose keys are these and the patches.

    Its one reducer makes queries, tokens and patches of what enters. The first of two blocks hands the patches on behind its
    tokens, `[B, P + M + N, C]`, and the second drops them.
    """

    def __init__(self, block: PlainBlock, entry: WindowPooling | Centers, rows: int) -> None:
        super().__init__(block, block.name, block.last)
        self.attn = CenterAttention(cast(PlainAttention, self.attn), rows)
        self.reducers.append(entry)

    def forward(self, x: Tensor | Tokens, *mask: Any, **given: Any) -> Tensor | Tokens:
        entered = Tokens.of(x)
        query, tokens, patches = self.reducers[0](entered.x, self)
        place = self._places(entered)
        _, turn, bias = self.entering(Tokens(entered.x, place=place), *mask, **given)
        y = self.attn(cast(nn.Module, self.norm1)(torch.cat([query, tokens, patches], 1)), bias, turn=turn)
        y = query + branch(self, 1, y)
        y = y + branch(self, 2, cast(nn.Module, self.mlp)(cast(nn.Module, self.norm2)(y)))
        if isinstance(self.reducers[0], WindowPooling):
            y = torch.cat([y, patches], 1)
        return Tokens(y, place=None if place is None else place[:, query.shape[1] :][:, : y.shape[1]]).handed_on(self.last)

    def _places(self, entered: Tokens) -> Tensor | None:
        """Where queries, tokens and patches stand `[B, …]`: a semantic token in the middle of its window."""
        if cast(PlainAttention, self.attn).position is None:
            return None
        entry, b = self.reducers[0], entered.x.shape[0]
        if isinstance(entry, WindowPooling):
            patches = torch.arange(len(entry.window), device=entered.x.device)
            own = entry.window == torch.arange(entry.windows, device=entered.x.device)[:, None]
            middle = torch.stack([patches[row][int(row.sum()) // 2] for row in own])
            tokens = torch.cat([torch.arange(entry.prefix, device=entered.x.device), middle + entry.prefix])
            return torch.cat([tokens, tokens, patches + entry.prefix]).expand(b, -1)
        place = cast(Tensor, entered.place)
        return torch.cat([place[:, : cast(CenterAttention, self.attn).rows], place], 1)


@step("tokens")
@dataclass(frozen=True)
class SemanticTokens(Step):
    """Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View" (CVPR 2023): STViT.

    From block `at` on (default: after a third of the depth) only `tokens` semantic tokens, and the prefix tokens, are left.
    Two blocks generate them with their own weights, as in the paper's DeiT variant:

    - block `at`: the patches are pooled, by learned weights, in `tokens` windows; these centers attend to themselves and to all
      patches;
    - block `at + 1`: learned centers, the same for every image, are added, and they attend again, to themselves and to the same
      patches.

    All later blocks see semantic tokens alone. With 16 tokens from block 4 on DeiT-S is left with 2.0 of its 4.6 GMACs, as
    published ("nearly 60 %" less).

    **Learned parts**, the pooling's scores and the added centers, start small and seeded: the step begins as mean pooling. It is
    meant to be trained, and `fit` does not: the published models were trained from scratch.

    The code of the DeiT variant was never released. What its authors showed of it (changsn/STViT-R, issue 4) is the pooling in
    4 × 4 windows over the padded 14 × 14 grid; ours convolves the whole grid before it is cut into windows. The rest follows the
    released Swin variant, with the residual that it leaves out: patches are not updated while they are attended to. Which
    block to start from, and that prefix tokens attend like semantic ones, is our reading.

    Deployable: exports with a fixed number of tokens. It works on the whole grid: no token step may come in an
    earlier block, and none may follow.
    """

    tokens: int = 16
    at: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise VitreousError(f"{self.name}: tokens must be 1 or more, not {self.tokens}")

    def refuse_before(self, following: Step) -> str:
        return "a few semantic tokens are left, and no patches to choose from" if following.family == "tokens" else ""

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        anatomy = read(model)
        blocks = plain_blocks(model, self.name)
        grid = anatomy.require_grid(self.name)
        at = len(blocks) // 3 if self.at is None else self.at
        if not 0 <= at <= len(blocks) - 2:
            raise VitreousError(
                f"{self.name} needs two blocks to make its tokens in, and the model has blocks 0 to {len(blocks) - 1}: "
                f"block {at} cannot be the first of them"
            )
        if shortened := [i for i in range(at + 2) if len(blocks[i].reducers)]:
            raise VitreousError(
                f"{self.name}: block {shortened[0]} already shortens the tokens, and block {at} needs the whole grid: apply it "
                "before other token steps, or choose an earlier block with at="
            )
        windows, prefix = arrange(self.tokens, grid), anatomy.prefix
        pooling = WindowPooling(cast(int, anatomy.width), grid, windows, prefix)
        for block, entry in zip(blocks[at:], (pooling, Centers(self.tokens, cast(int, anatomy.width), prefix)), strict=False):
            reference = next(block.parameters())
            new = SemanticBlock(block, entry, prefix + self.tokens).to(reference.device, reference.dtype)
            parent, _, child = block.name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
