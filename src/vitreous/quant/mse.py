"""MSE: the range whose grid comes nearest to the values, in the mean of squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..steps import step
from ..work import tick
from .layers import Quantizer, quant_layers
from .percentile import Histogram, clips, histograms
from .posttraining import PostTraining

# Shares of the full range: 1 down to 1/64, then the neighbourhood of the best.
COARSE = 2.0 ** -(torch.arange(25, dtype=torch.float64) / 4)
FINE = 2.0 ** (torch.arange(8, -9, -1, dtype=torch.float64) / 32)


@step("quant")
@dataclass(frozen=True)
class MSE(PostTraining):
    """Ranges with the least squared error. Nagel et al., "A White Paper on Neural Network Quantization" (2021),
    section 3.1; Choukroun et al., "Low-bit Quantization of Neural Networks for Efficient Inference" (2019).

    Both ends of an activation tensor are searched together, each over shares of the end seen in calibration: 25 × 25,
    geometric from 1 to 1/64, then 17 × 17 around the best, a tenth as far apart. The errors are those of all
    calibration images, counted in 65536 bins. Of weights both ends of a channel shrink by one share, over 25 and 17.
    The full range is among the candidates, so no tensor comes out worse than with `MinMax` on the calibration images.
    Nothing is drawn at random. Ranges on which `reduce_range` acts are not clipped: runtimes clip at 127, never at 63.

    What is quantized, and the parameters, are described at `PostTraining`.
    """

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        with torch.no_grad():
            seen = histograms(model, calibration)
            layers = quant_layers(model).values()
            for i, (name, histogram) in enumerate(seen.items()):
                quantizer = model.get_submodule(name)
                assert isinstance(quantizer, Quantizer)
                quantizer.set(*search_range(quantizer, histogram))
                tick((i + 1) / (len(seen) + len(layers)))
            for i, layer in enumerate(layers):
                layer.quant_w.set(*search_weight(layer.quant_w, layer.weight.float().flatten(1)))
                tick((len(seen) + i + 1) / (len(seen) + len(layers)))


def search_range(quantizer: Quantizer, seen: Histogram) -> tuple[Tensor, Tensor]:
    """Scale and zero point, for the values counted in `seen`, with the least squared error on the grid of `quantizer`."""
    integers = torch.arange(quantizer.low, quantizer.high + 1)
    ends, best = torch.stack((seen.low.clamp(max=0), seen.high.clamp(min=0))), (torch.ones(()), torch.ones(()))
    scale, zero_point = quantizer.grid(*ends)
    if not clips(quantizer):
        return scale, zero_point
    for shares in (COARSE, FINE):
        low, high = torch.cartesian_prod(*((b * shares).clamp(max=1) for b in best)).T
        scales, zeros = quantizer.grid(low * ends[0], high * ends[1])
        i = seen.error((integers - zeros[:, None]) * scales[:, None]).argmin()
        best, scale, zero_point = (low[i], high[i]), scales[i], zeros[i]
    return scale, zero_point


def search_weight(quantizer: Quantizer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[O]` with the least squared error for each row of `weight` `[O, I]`."""
    if not clips(quantizer):
        return quantizer.grid(*weight.aminmax(dim=1))
    found = [_search_rows(quantizer, rows) for rows in weight.split(max(1, 2**18 // weight.shape[1]))]
    return torch.cat([s for s, _ in found]), torch.cat([z for _, z in found])


def _search_rows(quantizer: Quantizer, rows: Tensor) -> tuple[Tensor, Tensor]:
    low, high = rows.aminmax(dim=1)
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for shares in (COARSE, FINE):
        centre = best
        for share in shares.tolist():
            tried = (centre * share).clamp(max=1)
            # The same as torch's fake quantization, in a fifth of its time on a processor.
            scale, zero = (v[:, None] for v in quantizer.grid(low * tried, high * tried))
            q = (rows * scale.reciprocal()).round_().add_(zero).clamp_(quantizer.low, quantizer.high).sub_(zero).mul_(scale)
            error = q.sub_(rows).square_().sum(1)
            better = error < least
            best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return quantizer.grid(low * best, high * best)
