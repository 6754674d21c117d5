"""Percentile: give up the rarest activations, so that the others get finer steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..steps import step
from .calibration import BATCH, Watch, watch
from .layers import FakeQuantizer, Quantizer, quant_layers
from .posttraining import PostTraining

BINS = 2**16


@step("quant")
@dataclass(frozen=True)
class Percentile(PostTraining):
    """Activation ranges that hold all but 1 − `share` of the values on either side. McKinstry et al., "Discovering
    Low-Precision Networks Close to Full-Precision Networks for Efficient Embedded Inference" (2018); compared with other
    ranges by Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation" (2020).

    Weights keep their whole range in each output channel, as in the latter. There the percentile is of absolute values,
    for symmetric grids; here each end has its own, for most of ours have a zero point.

    The percentiles are those of all calibration images, to 1/65536 of the tensor's range: a first pass finds the range,
    a second counts. Memory does not grow with the images. Ranges on which `reduce_range` acts are not clipped: runtimes
    clip at 127, never at 63.

    What is quantized, and the other parameters, are described at `PostTraining`.
    """

    share: float = 0.99999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 < self.share <= 1:
            raise VitreousError(f"{self.name}: share must be above 0.5 and at most 1, as in 0.99999, not {self.share}")

    def fit(self, model: nn.Module, calibration: Tensor | None) -> None:
        assert calibration is not None
        with torch.no_grad():
            for name, seen in histograms(model, calibration).items():
                quantizer = model.get_submodule(name)
                assert isinstance(quantizer, Quantizer)
                quantizer.set(*quantizer.grid(*seen.ends(self.share if clips(quantizer) else 1.0)))
            for layer in quant_layers(model).values():
                layer.quant_w.set(*layer.quant_w.grid(*layer.weight.float().flatten(1).aminmax(dim=1)))


def clips(quantizer: Quantizer) -> bool:
    """Whether what lies outside of the range that `quantizer` is given comes back as its end."""
    return quantizer.limit == quantizer.high


class Histogram:
    """How many values of a tensor fell into each of `BINS` equal parts of `low` … `high` (float64 scalars)."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low.double().cpu(), high.double().cpu()
        span = torch.maximum(self.high - self.low, 1e-6 * torch.maximum(self.low.abs(), self.high.abs()))
        self.width = span.clamp_min(1e-12) / BINS  # something constant still needs bins
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.sums: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        low, top = float(self.low), float(self.low + BINS * self.width)
        for part in x.detach().flatten().split(2**24):  # what histc counts exactly, in float32
            self.counts += torch.histc(part.float().clamp(low, top), BINS, low, top).cpu()

    def ends(self, share: float) -> tuple[Tensor, Tensor]:
        """The ends that leave at most 1 − `share` of the values outside, on each side."""
        needed = share * self.counts.sum()
        above = int((self.counts.cumsum(0) < needed).sum()) + 1
        below = int((self.counts.flip(0).cumsum(0) < needed).sum()) + 1
        return (
            torch.maximum(self.low + (BINS - below) * self.width, self.low),
            torch.minimum(self.low + above * self.width, self.high),
        )

    def error(self, levels: Tensor) -> Tensor:
        """Mean squared distance `[K]` of the values to the nearest of `levels` `[K, L]`, which ascend."""
        if self.sums is None:
            x = self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width
            moments = torch.stack((self.counts, self.counts * x, self.counts * x * x))
            self.sums = torch.cat((moments.new_zeros(3, 1), moments.cumsum(1)), dim=1)
        between = ((levels[:, 1:] + levels[:, :-1]) / 2 - self.low) / self.width
        edges = nn.functional.pad(between.round().clamp(0, BINS), (1, 0))
        edges = nn.functional.pad(edges, (0, 1), value=BINS).long()
        count, first, second = (s[edges].diff(dim=1) for s in self.sums)
        squares = second - 2 * levels * first + levels.square() * count
        return squares.sum(1).clamp_min(0) / self.sums[0, -1]


def histograms(model: nn.Module, images: Tensor, seen: dict[str, Watch] | None = None) -> dict[str, Histogram]:
    """Of each activation quantizer, by its name, a histogram of what it is given in the float model on `[N, C, H, W]`.

    seen: their ranges, where they are known.
    """
    seen = watch(model, images) if seen is None else seen
    found = {name: Histogram(one.low.amin(), one.high.amax()) for name, one in seen.items()}
    quantizers = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantizer)}
    parameter = next(model.parameters())
    try:
        for name, quantizer in quantizers.items():
            quantizer.watcher = found.get(name, lambda x: None)
        with torch.no_grad():
            for batch in images.split(BATCH):
                model(batch.to(parameter))
    finally:
        for quantizer in quantizers.values():
            quantizer.watcher = None
    return found
