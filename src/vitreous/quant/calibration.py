"""Look at what passes the quantizers of a model, and choose their grids."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from .layers import FLOOR, FakeQuantizer, LogSqrt2, Quantizer, quant_layers

BATCH = 32  # images at a time
SAMPLES = 2**20  # values kept of one tensor, over all calibration images
PERCENTILES = (0.999, 0.9999, 0.99999)

Grid = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Watch:
    """What one quantizer saw over calibration: the range, and a uniform sample of `keep` rows a batch.

    A row is a single value, or with `by_channel` a vector of the last dimension: `low` and `high` are `[G]`, `samples`
    `[S, G]`, with G = 1 or the number of channels.
    """

    def __init__(self, name: str, by_channel: bool, keep: int) -> None:
        self.name, self.by_channel, self.keep = name, by_channel, keep
        self.low = self.high = torch.zeros(0)
        self.parts: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        rows = x.detach().float().reshape(-1, x.shape[-1] if self.by_channel else 1)
        low, high = rows.amin(0), rows.amax(0)  # aminmax over the first dimension takes ten times as long
        if not torch.isfinite(high - low).all():
            raise VitreousError(
                f"'{self.name}' is given NaN or infinity on the calibration images: check the transform and the weights"
            )
        seen = len(self.low) > 0
        self.low = torch.minimum(self.low, low) if seen else low
        self.high = torch.maximum(self.high, high) if seen else high
        keep = -(-self.keep // rows.shape[1])  # rounded up: a sample must not be empty
        if len(rows) > keep:
            rows = rows[torch.randint(len(rows), (keep,)).to(rows.device)]
        self.parts.append(rows.clone())

    @property
    def samples(self) -> Tensor:
        return torch.cat(self.parts)


def watch(model: nn.Module, images: Tensor, by_channel: Iterable[str] = (), sample: bool = False) -> dict[str, Watch]:
    """Run the float model on the calibration images `[N, C, H, W]`; what each activation quantizer saw, by its name.

    With `sample`, values are kept for a search where the grid has fewer than 8 bits: a whole tensor, or a million
    drawn by torch's generator, which `Step.apply` seeds. Raises `VitreousError` naming the layer when an activation
    holds NaN or infinity.
    """
    quantizers = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantizer)}
    batches = images.split(BATCH)
    weights, channels = {f"{n}.quant_w" for n in quant_layers(model)}, set(by_channel)
    watches = {}
    for name in quantizers.keys() - weights:
        keep = SAMPLES // len(batches) if sample and quantizers[name].bits < 8 else 0
        watches[name] = Watch(name.removesuffix(".quant_x"), name in channels, keep)
    parameter = next(model.parameters())
    try:
        for name, quantizer in quantizers.items():
            quantizer.watcher = watches.get(name, lambda x: None)
        with torch.no_grad():
            for batch in batches:
                model(batch.to(parameter))
    finally:
        for quantizer in quantizers.values():
            quantizer.watcher = None
    return watches


def search(x: Tensor, grid: Grid, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[G]` for each column of `x` `[S, G]`: of three percentile ranges the least squared error.

    As in the official code of RepQ-ViT; the paper does not say. `grid` turns a range into scale and zero point, and
    integers are clipped to `low` … `high`.
    """
    shares = x.new_tensor([*(1 - p for p in PERCENTILES), *PERCENTILES])
    found = []
    for part in x.split(max(1, 2**23 // len(x)), dim=1):  # torch.quantile takes at most 2^24 values
        quantiles = torch.quantile(part, shares, dim=0)
        best = torch.full_like(quantiles[0], torch.inf)
        scale, zero = torch.ones_like(best), torch.zeros_like(best)
        for i in range(len(PERCENTILES)):
            s, z = grid(quantiles[i], quantiles[i + len(PERCENTILES)])
            q = ((part / s).round() + z).clamp(low, high)
            error = ((q - z) * s - part).square().mean(0)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, s, scale)
            zero = torch.where(better, z, zero)
        found.append((scale, zero))
    return torch.cat([s for s, _ in found]), torch.cat([z for _, z in found])


def search_log(x: Tensor, quantizer: LogSqrt2) -> Tensor:
    """The scale of a `LogSqrt2`: of three upper percentiles of `x` the one with the least squared error."""
    candidates = torch.quantile(x.flatten(), x.new_tensor(PERCENTILES)).clamp_min(FLOOR)
    return min(candidates, key=lambda s: float((quantizer.on_grid(x, s) - x).square().mean()))


def set_grids(model: nn.Module, watches: dict[str, Watch]) -> None:
    """Set the uniform quantizers, and those on powers of √2, that saw `watches`, each with one range for its tensor.

    Ranges are exact at 8 bits and searched below; softmax fills 0 … 1. Other kinds of quantizers are left to the method.
    """
    for name, seen in watches.items():
        quantizer = model.get_submodule(name)
        if isinstance(quantizer, LogSqrt2):
            quantizer.scale.copy_(search_log(seen.samples, quantizer))
        elif isinstance(quantizer, Quantizer) and name.endswith(".operands.probs"):
            quantizer.set(torch.tensor(1 / quantizer.high), torch.tensor(0))
        elif isinstance(quantizer, Quantizer) and quantizer.bits == 8:
            quantizer.set(*quantizer.grid(seen.low, seen.high))
        elif isinstance(quantizer, Quantizer):
            quantizer.set(*search(seen.samples, quantizer.grid, quantizer.low, quantizer.high))


def weight_grid(weight: Tensor, q: Quantizer) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each output channel: exact ranges at 8 bits, searched ones below."""
    w = weight.float().flatten(1).T
    return q.grid(*w.aminmax(dim=0)) if q.bits == 8 else search(w, q.grid, q.low, q.high)
