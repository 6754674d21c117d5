"""One scale for a LayerNorm's output whose channels differ widely: the fine scales move into the layers around it.

Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers" (ICCV 2023), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .calibration import Watch, search, set_grids, watch, weight_grid
from .layers import FLOOR, Quantizer, QuantLinear, quant_layers
from .posttraining import norm_readers


def channel_grids(seen: Watch, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[C]` of each channel; zero points may lie outside of 0 … 2^bits − 1."""
    levels = 2**bits - 1
    # A channel that hardly moves must not blow up the weights of the next layer.
    floor = (1e-4 * (seen.high - seen.low).mean() / levels).clamp_min(FLOOR)

    def grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.maximum((high - low) / levels, floor)
        return scale, (-low / scale).round()

    return grid(seen.low, seen.high) if bits == 8 else search(seen.samples, grid, 0, levels)


def reparameterize(
    norm: nn.Module, layers: list[QuantLinear], scale: Tensor, zero_point: Tensor, shared: Tensor | None = None
) -> None:
    """Give all channels of a LayerNorm's output one scale and zero point, without changing what `layers` compute.

    With s̃ (`shared`, the mean of s when None) and z̃, the mean of z, r1 = s/s̃ and r2 = z − z̃: the LayerNorm's γ and β become
    γ/r1 and (β + s·r2)/r1, the next W and b become r1·W and b − W(s·r2). In double precision, for β and s·r2 may cancel.
    """
    assert isinstance(norm, nn.LayerNorm) and isinstance(layers[0].quant_x, Quantizer)
    s, z = scale.double(), zero_point.double()
    shared = s.mean() if shared is None else shared.double()
    shared_zero = z.mean().round().clamp(0, layers[0].quant_x.high)
    r1, shift = s / shared, s * (z - shared_zero)
    norm.weight.copy_(norm.weight.double() / r1)
    norm.bias.copy_((norm.bias.double() + shift) / r1)
    for layer in layers:
        w = layer.weight.double()
        layer.bias.copy_(layer.bias.double() - w @ shift)
        layer.weight.copy_(w * r1)
        assert isinstance(layer.quant_x, Quantizer)
        layer.quant_x.set(shared, shared_zero)


@torch.no_grad()
def fit_reparameterized(
    model: nn.Module, images: Tensor, grids: Callable[[Watch, list[QuantLinear]], tuple[Tensor, Tensor, Tensor | None]]
) -> dict[str, Watch]:
    """Set all uniform grids of a model, those of LayerNorm outputs by `reparameterize`; returns what each quantizer saw.

    grids: of what a LayerNorm gave and the layers that read it, scale and zero point of each channel and the shared scale.
    """
    readers = norm_readers(model)
    by_channel = {name for inputs in readers.values() for name in inputs}
    watches = watch(model, images, by_channel, sample=True)
    for norm, inputs in readers.items():
        layers = list(inputs.values())
        reparameterize(model.get_submodule(norm), layers, *grids(watches[next(iter(inputs))], layers))
    set_grids(model, {name: seen for name, seen in watches.items() if name not in by_channel})
    for layer in quant_layers(model).values():
        layer.quant_w.set(*weight_grid(layer.weight, layer.quant_w))
    return watches
