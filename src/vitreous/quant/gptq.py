"""Second-order rounding: what rounding a weight does to the outputs is made good by the weights still to be rounded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError
from .calibration import BATCH
from .layers import Quantizer

DAMPING = 0.01  # share of the mean diagonal that is added to the Hessian's (section 3.3, step 3)
BLOCK = 128  # columns rounded before the others are told (section 3.3, step 2)


def second_order_rounding(weight: Tensor, hessian: Tensor, quantizer: Quantizer) -> Tensor:
    """`weight` `[O, I]` on the grid of `quantizer`, rounded such that the layer's outputs change least.

    Frantar, Ashkboos, Hoefler & Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers" (ICLR 2023), section 3.3. Columns are rounded one after the other, and the error of each is fed to
    those that are left through the Cholesky factor of the damped inverse Hessian. The grid is given and stays.

    hessian: `[I, I]`, XᵀX of the layer's inputs in any scale; see `input_grams`.
    quantizer: one scale and zero point for each output `[O]`, or for each group of a row, `[O · groups]`.

    Departures: columns come in the order of falling Hessian diagonal, which the official code calls act-order (the
    paper takes them as they come); inputs that are always 0 keep their weights, rounded to nearest, where the official
    code sets them to 0, for images beyond the calibration may use them. The factor is computed in float64 at once from
    the Hessian instead of from its inverse.

    Raises `VitreousError` when the shapes do not fit or the Hessian holds NaN or infinity.
    """
    outputs, inputs = weight.shape
    if hessian.shape != (inputs, inputs) or quantizer.scale.numel() % outputs:
        what = f"weight {tuple(weight.shape)}, Hessian {tuple(hessian.shape)} and {quantizer.scale.numel()} scales"
        raise VitreousError(f"second-order rounding cannot use {what}: give [O, I], [I, I] and a multiple of O scales")
    if not torch.isfinite(hessian).all():
        raise VitreousError("the Hessian of a layer holds NaN or infinity: check the calibration images and the weights")
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order].double()).to(weight.device, torch.float32)

    def each(parameter: Tensor) -> Tensor:
        """`[I, O]` from one value for each output or group; columns are rows here, which lie together in memory."""
        rows = parameter.float().reshape(outputs, -1)
        return rows.repeat_interleave(inputs // rows.shape[1], dim=1).T[order].contiguous()

    scale, zero = each(quantizer.scale), each(quantizer.zero_point)
    low, high = max(quantizer.low, -quantizer.limit), min(quantizer.high, quantizer.limit)
    w = weight.detach().float().T[order].contiguous()
    rounded = torch.empty_like(w)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = torch.empty_like(w[start:end])
        for i in range(start, end):
            q = ((w[i] / scale[i]).round_() + zero[i]).clamp_(low, high)
            rounded[i] = (q - zero[i]) * scale[i]
            errors[i - start] = (w[i] - rounded[i]) / factor[i, i]
            w[i + 1 : end] -= factor[i, i + 1 : end, None] * errors[i - start]
        w[end:] -= factor[start:end, end:].T @ errors
    return rounded[order.argsort()].T.contiguous().to(weight.dtype)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with UᵀU = (H + damping)⁻¹.

    H read backwards is L·Lᵀ, so H is R·Rᵀ with R, L turned around, upper triangular: U is the inverse of R.
    """
    diagonal = hessian.diagonal()
    damping = DAMPING * diagonal.mean()
    dead = torch.where(diagonal > 0, 0.0, 1.0)  # the scale of a row without neighbours does not matter
    damped = hessian + torch.diag(dead + damping)
    r = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)


class InputGram:
    """The mean of x·xᵀ `[I, I]` over all rows x that it is shown, in memory that does not grow with them."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.total, self.rows = name, torch.zeros(size, size), 0

    def __call__(self, rows: Tensor) -> None:
        """rows: `[..., I]`."""
        x = rows.detach().float().flatten(0, -2)
        if not torch.isfinite(x).all():
            raise VitreousError(
                f"'{self.name}' is given NaN or infinity on the calibration images: check the transform and the weights"
            )
        with torch.autocast(x.device.type, enabled=False):  # of the model's own
            self.total = self.total.to(x.device) + x.T @ x
        self.rows += len(x)

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.rows, 1)


def input_grams(model: nn.Module, names: Iterable[str], images: Tensor) -> dict[str, Tensor]:
    """XᵀX / rows `[I, I]` of the inputs of the linear layers and convolutions called `names`, over images `[N, C, H, W]`.

    The model runs as it is: of a layer that quantizes its input, the quantized input is taken. A convolution's input
    is its unfolded patches, as its weight flattened to `[O, I]`. A layer that does not run gets zeros, with which
    `second_order_rounding` rounds to nearest. Raises `VitreousError` naming the layer when inputs hold NaN or infinity.
    """
    grams, hooks = {}, []
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        gram = grams[name] = InputGram(name, layer.weight[0].numel())
        quantizer = getattr(layer, "quant_x", None)

        def see(x: Tensor, layer: nn.Linear | nn.Conv2d = layer, gram: InputGram = gram) -> None:
            gram(patches(layer, x) if isinstance(layer, nn.Conv2d) else x)

        def see_input(_: nn.Module, given: tuple[Tensor, ...], see: Any = see) -> None:
            see(given[0])

        def see_output(_: nn.Module, given: Any, out: Tensor, see: Any = see) -> None:
            see(out)

        hooks.append(
            layer.register_forward_pre_hook(see_input) if quantizer is None else quantizer.register_forward_hook(see_output)
        )
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            for batch in images.split(BATCH):
                model(batch.to(parameter))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gram.mean for name, gram in grams.items()}


def patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`[B, L, I]`: what each output position of a convolution without groups reads."""
    padding = 0 if conv.padding == "valid" else conv.padding
    assert conv.groups == 1 and not isinstance(padding, str)
    return F.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride).mT  # pyright: ignore[reportArgumentType]
