"""LRP-QViT: layers get bits by how much of the answer comes through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from ..relevance import relevance
from ..steps import step
from ..work import tick
from .calibration import Watch, weight_grid
from .layers import FakeQuantizer, LogSqrt2, Quantizer, QuantLinear
from .posttraining import PostTraining, Read
from .reparameterization import channel_grids, fit_reparameterized

IMAGES = 32  # of the calibration images, how many are explained
TOGETHER = 2  # of them in one pass, which keeps all that their backward pass needs
WIDEST = (1.0, 0.99, 0.95, 0.9)  # shares of a LayerNorm's channels whose scale is kept
ROWS = 512  # tokens on which the shares are compared


@step("quant")
@dataclass(frozen=True)
class LRPQViT(PostTraining):
    """Ranjan & Savakis, "LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise Relevance Propagation",
    2024 (arXiv 2401.11243).

    mixed: below 8 bits, every layer and every attention product gets one bit more, as many as asked for, or one less, for
        its weight and its input alike: of all ways that need no more bytes of weights and no more bit operations than
        `weights` and `activations` everywhere, the one with the least sum of relevance times 4^(−bits), the power of the
        rounding noise. A layer's relevance is the
        share of the predicted class's score that comes through it (`vitreous.relevance`; of a model without classifier,
        of its features' squared norm), averaged over calibration images. The patch embedding still reads 8-bit images.
        False is the paper's fixed-bit variant, and what models get whose blocks are not plain.

    LayerNorm outputs are quantized as in RepQ-ViT, each channel by its own scale that then moves into the layers around,
    but the widest channels are clipped: their scales, which blow up a few columns of the next weights, are cut to one
    that 90, 95, 99 or 100 % of the channels stay below, whichever gives the least squared error of what these layers
    compute. All else is as in RepQ: softmax on powers of √2, percentile ranges below 8 bits, exact ones at 8.

    The authors published no code, and only what the paper says of itself was at hand: relevance by LRP decides on the
    bits, and outliers are clipped for each channel of LayerNorm outputs. The candidate bits, what is minimised within
    which budgets, and the choice of the clipping are ours.

    What is quantized, and the other parameters, are described at `PostTraining`.
    """

    mixed: bool = True

    def softmax_quantizer(self, bits: int) -> FakeQuantizer:
        return LogSqrt2(bits) if bits < 8 else Quantizer(bits)

    def allot(self, model: nn.Module, calibration: Tensor, layers: dict[str, Read]) -> dict[str, tuple[int, int]]:
        changes = [d for d in (-1, 0, 1) if all(2 <= bits + d <= 8 for bits in (self.weights, self.activations))]
        if not self.mixed or 1 not in changes or not read(model).plain:
            return {}
        try:
            scores = layer_relevance(model, calibration[:IMAGES])
        except (VitreousError, RuntimeError) as error:  # autocast inside the model mixes precisions, in which nothing is followed
            raise VitreousError(f"{self.name} cannot weigh the layers of this model: {error}; or set mixed=False") from None
        units = _units(model, calibration[:1], layers)
        chosen = allocate(
            [sum(scores.get(name, 0.0) for name in u.names) for u in units],
            [u.weights for u in units],
            [u.operations for u in units],
            (self.weights, self.activations),
            changes,
        )
        bits: dict[str, tuple[int, int]] = {}
        for unit, change in zip(units, chosen, strict=True):
            usual = (self.weights if unit.weights else self.activations, self.activations)
            bits |= {name: (usual[0] + change, usual[1] + change) for name in unit.names if change}
        return bits

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        fit_reparameterized(model, calibration, lambda seen, layers: (*clipped_grids(seen, layers), None))


def layer_relevance(model: nn.Module, images: Tensor) -> dict[str, float]:
    """The share of the explained score that comes through each layer and attention product, mean over images."""
    sums: dict[str, float] = {}
    device, anatomy = next(model.parameters()).device, read(model)
    for i, part in enumerate(images.split(TOGETHER)):
        for name, shares in relevance(model, part.to(device), anatomy=anatomy).layers.items():
            sums[name] = sums.get(name, 0.0) + float(shares.sum()) / len(images)
        tick((i + 1) * TOGETHER / len(images))
    return sums


@dataclass
class Unit:
    """What must have the same bits: a product, a layer, or the layers that read one LayerNorm."""

    names: list[str]
    weights: int  # how many numbers are stored; 0 for a product
    operations: int  # multiplications for one image


def _units(model: nn.Module, image: Tensor, layers: dict[str, Read]) -> list[Unit]:
    rows: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(layer: Any, _: Any, out: Tensor) -> None:
            rows[name] = out.numel() // len(layer.weight)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(count(name)) for name in layers]
    try:
        with torch.no_grad():
            model(image.to(next(model.parameters())))
    finally:
        for handle in handles:
            handle.remove()
    units: dict[str, Unit] = {}
    for name, (_, norm) in layers.items():
        numbers = model.get_parameter(f"{name}.weight").numel()
        unit = units.setdefault(norm or name, Unit([], 0, 0))
        unit.names.append(name)
        unit.weights += numbers
        unit.operations += numbers * rows[name]
    for block in read(model).blocks:
        attention = block.attention
        tokens = rows[f"{attention.name}.{attention.proj}"]
        operations = tokens * tokens * (attention.heads or 1) * (attention.head_dim or 1)
        for product in ("qk", "av"):
            name = f"{attention.name}.{product}"
            units[name] = Unit([name], 0, operations)
    return list(units.values())


def allocate(
    scores: list[float], weights: list[int], operations: list[int], usual: tuple[int, int], changes: list[int]
) -> list[int]:
    """Of `changes` to the `usual` bits one for each unit: the least Σ score · 4^(−change) within both budgets.

    The budgets are what the usual bits of weight and activation need everywhere: bits of weights, and bit operations, a
    multiplication of w and a bits being w · a. Solved exactly, as an integer programme of one binary a unit and change.
    """
    w, a = usual
    n, d = len(scores), np.array(changes, dtype=float)
    # A product has two activations; a layer a weight and an activation.
    cost = np.array([(w if stored else a) * a for stored in weights])
    costs = np.array([((w if stored else a) + d) * (a + d) for stored in weights])
    done = np.array(operations, dtype=float) / sum(operations)
    stored = np.array(weights, dtype=float) / max(sum(weights), 1)
    one_each = np.kron(np.eye(n), np.ones(len(d)))
    limit = scipy.optimize.LinearConstraint
    found = scipy.optimize.milp(
        np.kron(np.array(scores, dtype=float), 4.0**-d),
        integrality=np.ones(n * len(d)),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            limit(one_each, 1, 1),
            limit(np.kron(stored, d), -np.inf, 1e-9),
            limit((done[:, None] * costs).ravel(), -np.inf, float(done @ cost) + 1e-9),
        ],
        options={"mip_rel_gap": 1e-4, "node_limit": 20_000},
    )
    if found.x is None:
        return [0] * n
    return [int(d[i]) for i in found.x.reshape(n, len(d)).argmax(1)]


def clipped_grids(seen: Watch, layers: list[QuantLinear]) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[C]` of each channel of a LayerNorm's output, those of the widest channels clipped below 8 bits.

    `layers` read it, with a quantizer of the same bits. A clipped channel loses as much at its lower as at its upper end.
    """
    bits = layers[0].quant_x.bits
    scale, zero_point = channel_grids(seen, bits)
    if bits == 8:
        return scale, zero_point
    levels = 2**bits - 1
    middle = (levels / 2 - zero_point) * scale
    x = seen.samples[:: max(1, len(seen.samples) // ROWS)]
    wanted = [F.linear(x, layer.weight) for layer in layers]
    best, least = (scale, zero_point), torch.inf
    for share in WIDEST:
        s = scale.clamp(max=torch.quantile(scale, share))
        z = (levels / 2 - middle / s).round()
        given = (((x / s).round() + z).clamp(0, levels) - z) * s
        error = 0.0
        for layer, y in zip(layers, wanted, strict=True):
            r1 = s / s.mean()  # what the channels' scales do to the weights, see `reparameterize`
            w = layer.weight * r1
            grid = weight_grid(w, layer.quant_w)
            error += float((F.linear(given / r1, _on_grid(w, *grid, layer.quant_w)) - y).square().sum())
        if error < least:
            best, least = (s, z), error
    return best


def _on_grid(w: Tensor, scale: Tensor, zero_point: Tensor, q: Quantizer) -> Tensor:
    s, z = scale[:, None], zero_point[:, None]
    return (((w / s).round() + z).clamp(q.low, q.high) - z) * s
