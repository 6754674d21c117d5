"""Sparsifiner: a small predictor says which tokens each query may attend to, before attention is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..anatomy.parts import emit, project
from ..anatomy.positions import Turn
from ..blocks import PlainAttention, Tokens, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step

# The official configuration: a sixth of the tokens as basis vectors, of which a query uses 8; half of a head's channels.
FEWER_TOKENS, FEWER_CHANNELS, COEFFICIENTS, BASIS_THRESHOLD = 6, 2, 8, 0.02


class ConnectivityPredictor(nn.Module):
    """Queries and keys `[B, heads, N, d]` to who may attend to whom, `[B, heads, N, N]` bool, the same weights for all heads.

    Keys are projected down to a few (`down`), a softmax of each query against them gives the coefficients of a learned basis
    (`up`), both made sparse: the 8 largest coefficients, the basis entries above a threshold. Their product ranks the keys of
    each query, of which the `keep` best are connected. Prefix tokens attend to all; as keys they are ranked like the others.
    As in the official code, what the softmax reads is scaled by the number of heads, and not by their width.
    """

    def __init__(self, tokens: int, head_dim: int, heads: int, prefix: int, keep: int) -> None:
        super().__init__()
        self.tokens, self.heads, self.prefix, self.keep = tokens, heads, prefix, keep
        rank, channels = max(1, tokens // FEWER_TOKENS), max(1, head_dim // FEWER_CHANNELS)
        self.down_q, self.down_k = nn.Linear(head_dim, channels), nn.Linear(head_dim, channels)
        self.down, self.up = nn.Parameter(torch.empty(tokens, rank)), nn.Parameter(torch.empty(tokens, rank))
        nn.init.trunc_normal_(self.down, std=0.02)
        nn.init.trunc_normal_(self.up, std=0.02)

    def approximation(self, q: Tensor, k: Tensor) -> Tensor:
        """The low-rank guess of the attention map `[B, heads, N, N]`, dense: what is trained towards the map itself."""
        return self._coefficients(q, k) @ self.up.mT

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        weights = self._coefficients(q, k)
        best = weights.topk(min(COEFFICIENTS, weights.shape[-1])).values[..., -1:]
        basis = F.threshold(self.up.abs(), BASIS_THRESHOLD, 0.0)
        scores = weights.where(weights >= best, 0.0) @ basis.mT
        # Where the sparse product is 0 for more than it may drop, the first win, in every runtime.
        place = torch.arange(self.tokens, device=scores.device)
        scores = scores - place * 1e-6
        connected = torch.zeros_like(scores).scatter(-1, scores.topk(self.keep).indices, 1.0) > 0
        return connected | (place < self.prefix)[:, None]

    def _coefficients(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = self.down_q(q), self.down_k(k)
        return (q * self.heads**-0.5 @ (k.mT @ self.down)).softmax(-1)


class SparseAttention(PlainAttention):
    """Plain attention over the connections that a predictor allows; a dense product under a mask, as runtimes execute it.

    `watched`, when set, is shown pairs of the predictor's guess and the map it should be, and nothing is masked: so the
    predictor is trained.
    """

    def __init__(self, attn: PlainAttention, tokens: int, prefix: int, budget: float) -> None:
        super().__init__(attn)
        self.operands = attn.operands
        heads = cast(int, self.num_heads)
        head_dim = cast(nn.Linear, self.proj).in_features // heads
        self.predictor = ConnectivityPredictor(tokens, head_dim, heads, prefix, math.ceil(budget * tokens))
        self.predictor.to(cast(nn.Linear, self.proj).weight)
        self.watched: list[tuple[Tensor, Tensor]] | None = None

    def forward(
        self, x: Tensor, bias: Tensor | None = None, look: bool = False, fuse: Any = None, turn: Turn | None = None
    ) -> Any:
        """As in `PlainAttention`. Raises VitreousError for another number of tokens than the predictor was made for."""
        if x.shape[1] != self.predictor.tokens:
            raise VitreousError(
                f"Sparsifiner predicts the connections of {self.predictor.tokens} tokens and was given {x.shape[1]}: put steps "
                "that shorten the sequence before it, and use the image size that the model was made for"
            )
        full = self.predictor.keep >= self.predictor.tokens
        if fuse is not None or (full and self.watched is None):
            return super().forward(x, bias, look, fuse, turn)
        q, k, v = project(self, x, turn)
        y = emit(self, self._mix(self._probabilities(q, k, bias), v), x)
        return (y, q, k) if look else y

    def _probabilities(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        if self.watched is not None:
            probs = super()._probabilities(q, k, bias)
            self.watched.append((self.predictor.approximation(q.detach(), k.detach()), probs.detach()))
            return probs
        if self.predictor.keep < self.predictor.tokens:
            closed = torch.zeros_like(q[..., :1]).masked_fill(~self.predictor(q, k), -torch.inf)
            bias = closed if bias is None else bias + closed
        return super()._probabilities(q, k, bias)


@step("tokens")
@dataclass(frozen=True)
class Sparsifiner(Step):
    """Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers" (CVPR 2023).

    In every block each query attends to `ceil(budget·N)` tokens of its own, chosen for each image and head by a low-rank
    predictor (section 3.2). Class, distillation and register tokens attend to all; who attends to them is predicted.

    The predictor is learned: a new one chooses at random, from a fixed seed, until `learn.connectivity_loss` and then
    `learn.sparsifiner_distillation` have trained it. After `tokens.EViT` it works on the tokens that EViT leaves, in the order
    in which that leaves them. Exports to every format, but no runtime here multiplies sparse maps: the mask alone saves no
    time, and the published saving is one of counted operations. `budget=1` is the identity.
    """

    plans: ClassVar[dict[str, Any]] = {"tokens": list[int]}

    budget: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise VitreousError(f"tokens.Sparsifiner: budget must lie in (0, 1], not {self.budget}")

    def refuse_before(self, following: Step) -> str:
        return "the predictors know each token by its place: shorten the sequence before" if following.family == "tokens" else ""

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        """`tokens`: how many tokens enter each block, which earlier steps may have changed."""
        anatomy = read(model)
        blocks = plain_blocks(model, self.name)
        grid = anatomy.require_grid(self.name)
        reference = next(blocks[0].parameters())
        x = torch.randn(1, anatomy.prefix + grid[0] * grid[1], cast(int, anatomy.width)).to(reference)
        tokens = []
        with torch.no_grad():
            for block in blocks:
                tokens.append(Tokens.of(x).x.shape[1])
                x = block(x)
        return {"tokens": tokens}

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        prefix = read(model).prefix
        for block, tokens in zip(plain_blocks(model, self.name), plan["tokens"], strict=True):
            block.attn = SparseAttention(cast(PlainAttention, block.attn), tokens, prefix, self.budget)
