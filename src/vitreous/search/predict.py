"""How long a recipe will take, from what was measured: so many milliseconds for each kind of work in its blocks."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from ..blocks import Tokens, plain_blocks, shared_copy
from ..prune.curves import TILE

FIELDS = ("tokens", "left", "width", "heads", "qk", "v", "hidden")
HELD = 0.02  # how much a weight is held to where it began, against one measured time
STREAM = 4  # the kind of work that what was not seen yet is taken to cost as much as
START = 0.1  # share of the time of what is no product, until something is known


def shape(model: nn.Module, x: Tensor) -> np.ndarray:
    """Of each plain block of `model` on images `x`: tokens that enter it, and its MLP, width, heads, width of all queries, of
    all values, of the hidden layer; `[blocks, 7]`."""
    model = shared_copy(model)
    blocks = plain_blocks(model, "predicting latency")
    rows = np.zeros((len(blocks), len(FIELDS)))
    handles = []
    for row, block in zip(rows, blocks, strict=True):
        attn = cast(Any, block.attn)
        values = attn.proj.in_features
        fused = getattr(attn, "qkv", None)
        row[3:6] = attn.num_heads, values if fused is not None else attn.q_proj.out_features, values
        last = [m for m in cast(nn.Module, block.mlp).modules() if isinstance(m, nn.Linear)][-1]
        row[6] = last.in_features

        def entered(_: nn.Module, args: tuple[Any, ...], row: np.ndarray = row) -> None:
            row[[0, 2]] = Tokens.of(args[0]).x.shape[1:]

        def passed(_: nn.Module, args: tuple[Any, ...], row: np.ndarray = row) -> None:
            row[1] = args[0].shape[1]

        handles += [block.register_forward_pre_hook(entered), cast(nn.Module, block.mlp).register_forward_pre_hook(passed)]
    with torch.no_grad():
        model(x[:1])
    return rows


def joined(whole: np.ndarray, by: dict[str, np.ndarray]) -> np.ndarray:
    """The shape when several axes are changed at once: of each axis what it changes, and the rest of `whole`."""
    made = whole.copy()
    for axis, fields in {"tokens": [0, 1], "heads": [3, 4, 5], "mlp": [6]}.items():
        if axis in by:
            made[:, fields] = by[axis][:, fields]
    return made


def work(rows: np.ndarray) -> np.ndarray:
    """What there is to do, by kind: projections, MLP, products of attention, softmax, what is done to each number of the
    residual stream, tokens given up, and a constant; multiply-accumulates and numbers, each a sum over the blocks."""
    n, m, c, h, q, v, u = rows.T
    after = np.append(n[1:], m[-1])
    lost = (n - m) + np.maximum(m - after, 0)
    kinds = (n * c * 2 * (q + v), 2 * m * c * u, n * n * (q + v), h * n * n, n * c + m * (c + u), (lost > 0) * n * c)
    return np.array([*(k.sum() for k in kinds), 1.0])


def counted_power(rows: np.ndarray) -> float:
    """What the layers of the blocks take by LPViT's model (`prune.lpvit.power`)."""
    _, _, c, _, q, v, u = rows.T
    return float((c * (2 * q + v + u) * (c // TILE) + c * v * (v // TILE) + c * u * (u // TILE)).sum() / TILE**2)


class Predictor:
    """Milliseconds of a kind of model (a runtime with its precision) by non-negative least squares of the relative error on
    all that was measured of it, held to where it began: to the times of the same runtime in floats, or to the products alone.
    """

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[np.ndarray, float]]] = {}

    def learn(self, kind: str, rows: np.ndarray, ms: float) -> None:
        self.seen.setdefault(kind, []).append((work(rows), ms))

    def __call__(self, kind: str, rows: np.ndarray, like: str) -> float | None:
        """None where nothing was measured of `kind`, nor of `like`, its nearest relative."""
        weights = self._weights(kind, like)
        return None if weights is None else float(work(rows) @ weights)

    def _weights(self, kind: str, like: str) -> np.ndarray | None:
        seen = self.seen.get(kind, [])
        if not seen:
            return self._weights(like, like) if like != kind else None
        x, t = np.stack([s for s, _ in seen]), np.array([ms for _, ms in seen])
        related = None if like == kind else self._weights(like, like)
        if related is None:
            products = x[0, :3].sum()
            shares = np.where(np.arange(len(x[0])) < 3, (1 - START) * x[0] / products, START / (len(x[0]) - 3))
            start = t[0] * shares / np.where(x[0] > 0, x[0], x[0, STREAM])
        else:
            start = related * np.median(t / (x @ related))
        size = np.where(x.any(0), x.mean(0), x[:, STREAM].mean()) / t.mean()
        hold = np.diag(HELD**0.5 * size)
        found, _ = scipy.optimize.nnls(np.vstack([x / t[:, None], hold]), np.append(np.ones(len(t)), hold @ start))
        return found
