"""Dilated convolution with learnable spacings (DCLS): a large kernel of a few weights that learn where they stand.

Khalfaoui-Hassani, Pellegrini and Masquelier, "Dilated convolution with learnable spacings" (ICLR 2023), in one to three
dimensions; the triangles and Gaussians are of "Dilated Convolution with Learnable Spacings: beyond bilinear interpolation"
(2023) and of Khalfaoui-Hassani's thesis (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError

VERSIONS = ("v0", "v1", "max", "gauss")


def spaced_kernel(
    weight: Tensor,
    positions: Tensor,
    size: Sequence[int],
    version: str = "v0",
    sigma: Tensor | None = None,
    released: bool = False,
) -> Tensor:
    """The dense kernel `[out, in, *size]` of K weights `[out, in, K]` at `positions` `[dims, out, in, K]`, 0 being its middle.

    version: how a weight is shared out among the places around it. "v0", the paper's: linearly between the two nearest on each
    axis; what falls outside is lost. "v1": the same, but what is inside sums to the weight. "max": triangles of half-width
    1 + |sigma|, normalised. "gauss": exp(−(place − position)² / 2s²), s = |sigma| + 0.27, normalised. `sigma` is as `positions`.

    The order of the axes in `positions` is that of the released code, so that its checkpoints load: rows first in "v0" (in three
    dimensions the first, the last, the middle axis), the last axis first in all others. `released` also puts the middle of each
    axis where the released code has it, which where the sides differ is the middle of another axis.
    """
    dims = len(size)
    order = ((0,), (0, 1), (0, 2, 1))[dims - 1] if version == "v0" else tuple(reversed(range(dims)))
    shares: list[Tensor] = [weight] * dims  # of each axis: [out, in, K, size of the axis]
    for i, axis in enumerate(order):
        place = torch.arange(size[axis], device=weight.device, dtype=weight.dtype)
        at = (positions[i] + (size[i] if released else size[axis]) // 2).unsqueeze(-1)
        if version == "v0":
            first = at.floor()
            part = at - first
            shares[axis] = torch.where(place == first, 1 - part, torch.where(place == first + 1, part, 0.0))
        elif version == "v1":
            shares[axis] = (1 - (place - at).abs()).relu()
        else:
            wide = cast(Tensor, sigma)[i].abs().unsqueeze(-1)
            if version == "max":
                shares[axis] = (1 + wide - (place - at).abs()).relu()
            else:
                shares[axis] = (-0.5 * ((place - at) / (wide + 0.27)) ** 2).exp()
    if version != "v0":  # the sum over the whole kernel is the product of the sums over its axes
        weight = weight / (torch.stack([s.sum(-1) for s in shares]).prod(0) + 1e-7)
    letters = "xyz"[:dims]
    return torch.einsum(f"oik,{','.join(f'oik{a}' for a in letters)}->oi{letters}", weight, *shares)


class DCLS(nn.Module):
    """A convolution whose kernel of `size` has `count` weights at learned positions; `[B, in, *map]` to `[B, out, *map]`.

    The number of sides in `size` says in how many dimensions. `weight [out, in / groups, count]`, `P` and `SIG`
    `[dims, out, in / groups, count]` have the released names; layers may share one `P` and `SIG`. In training positions are
    brought back inside of the kernel, and so are after every step. Positions want five times the learning rate and no weight
    decay.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        count: int,
        size: Sequence[int],
        groups: int = 1,
        stride: int = 1,
        bias: bool = True,
        version: str = "v0",
    ) -> None:
        super().__init__()
        self.size, self.groups, self.stride, self.version = tuple(size), groups, stride, version
        shape = (outputs, inputs // groups, count)
        self.weight = nn.Parameter(torch.empty(shape))
        self.P = nn.Parameter(torch.empty(len(self.size), *shape))
        # The released initialisation: sigma is 0.5 in "gauss", and triangles are as wide as in "v1".
        wide = torch.full((len(self.size), *shape), 0.23 if version == "gauss" else 0.0)
        self.SIG = nn.Parameter(wide) if version in ("max", "gauss") else None
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.normal_(self.P, std=0.5)
        self.bring_inside()
        if self.bias is not None:
            bound = (shape[1] * count) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def bring_inside(self) -> None:
        for axis, side in zip(self.P.data, self.size, strict=True):
            axis.clamp_(-(side // 2), side // 2)

    def kernel(self) -> Tensor:
        """`[out, in / groups, *size]`; constant once trained, so that runtimes fold it into an ordinary convolution."""
        return spaced_kernel(self.weight, self.P, self.size, self.version, self.SIG)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.bring_inside()
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.size) - 1]
        return convolve(x, self.kernel(), self.bias, self.stride, [side // 2 for side in self.size], groups=self.groups)


def repulsion(model: nn.Module) -> Tensor:
    """The mean, over all `P` of a model, of how far its weights stand within a distance of 1 of each other: a scalar.

    Section 3.2 of the paper (2023): the square of it is added to the loss from epoch 21 on. Raises VitreousError without any `P`.
    """
    found = list({id(m.P): m.P for m in model.modules() if isinstance(m, DCLS)}.values())
    if not found:
        raise VitreousError(f"{type(model).__name__} has no learnable spacings: open one that has, or add them with adapt.DCLS")
    total = found[0].new_zeros(())
    for positions in found:
        p = positions.flatten(1, 2).permute(1, 2, 0)  # [out · in, count, dims]
        close = (1 - torch.cdist(p, p)).triu(1).clamp(min=0)
        count = p.shape[1]
        total = total + 2 * close.sum() / (count * (count - 1) * p.shape[0])
    return total / len(found)
