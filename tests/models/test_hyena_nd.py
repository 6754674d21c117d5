"""What Hyena N-D adds: gated convolutions over the whole map, in one quadrant or in four directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitreous import VitreousError
from vitreous.mixers.implicit import long_convolution
from vitreous.models.hyena_nd import HyenaOperator, MapFilter


def seen(operator: HyenaOperator, row: int, column: int) -> Tensor:
    """The places that the answer at one place depends on, beyond what the 3 × 3 convolution alone brings."""
    nn.init.zeros_(operator.short_filter.weight)
    operator.short_filter.weight.data[..., 1, 1] = 1
    x = torch.randn(1, 6, 6, 8, dtype=torch.double, requires_grad=True)
    operator.double()(x)[0, row, column].square().sum().backward()
    assert x.grad is not None
    return x.grad.abs().sum(-1)[0] > 1e-12


def test_the_transform_is_the_direct_convolution() -> None:
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 3, 5, 5), torch.randn(3, 5, 5)
    direct = nn.functional.conv2d(nn.functional.pad(x, (4, 0, 4, 0)), kernel.flip(1, 2).unsqueeze(1), groups=3)
    ours = long_convolution(x, nn.functional.pad(kernel, (0, 5, 0, 5)))
    torch.testing.assert_close(ours, direct, rtol=1e-4, atol=1e-5)


def test_a_quadrant_and_all_directions() -> None:
    torch.manual_seed(0)
    quadrant = seen(HyenaOperator(8, 6), 2, 3)
    assert quadrant[:3, :4].all() and not quadrant[3:].any() and not quadrant[:, 4:].any()
    for direction in ("4dir", "4dirp"):
        assert seen(HyenaOperator(8, 6, direction=direction), 2, 3).all()
    both = seen(HyenaOperator(8, 6, order=3, direction="seq", window=False), 2, 3)
    assert both.all()  # down and to the right first, and from there up and to the left
    with pytest.raises(VitreousError, match="direction one of"):
        HyenaOperator(8, 6, direction="diagonal")


def test_filters_are_functions_of_the_place() -> None:
    """A product of two has rank 1, one network for both has more; the window makes what is far away small."""
    torch.manual_seed(0)
    filters = {joint: MapFilter(2, 12, 3, 16, 1.0, joint, window=False)() for joint in (False, True)}
    second = {joint: torch.linalg.svdvals(f)[:, 1] / torch.linalg.svdvals(f)[:, 0] for joint, f in filters.items()}
    assert (second[False] < 1e-5).all() and (second[True] > 1e-3).all()
    fallen = MapFilter(2, 12, 3, 16, 1.0, True, window=True)()
    assert (fallen[:, -1, -1].abs() < 0.01 * fallen[:, 0, 0].abs()).all()
