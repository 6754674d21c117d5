"""What A2Mamba adds: the maps of local attention aggregate the states of a scan, so that these look both ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitreous.mixers import neighbourhoods
from vitreous.models.a2mamba import A2SSM, MASS


def still(x: Tensor) -> Tensor:
    return x


def reached(layer: A2SSM, aggregate: tuple, place: tuple[int, int]) -> Tensor:
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    nn.init.zeros_(layer.conv2d.weight)
    layer.conv2d.weight.data[:, :, 2, 2] = 1
    layer(x, aggregate)[(0, slice(None), *place)].sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().sum(0) > 0


def test_states_see_ahead_by_attention_alone() -> None:
    """In raster order a place knows those before it; aggregated over 3 × 3 neighbours, also a row and a place ahead."""
    torch.manual_seed(0)
    layer = A2SSM(8, 2)
    places = neighbourhoods(6, 6, 3, torch.device("cpu"))[0]
    mean = lambda h: h[:, :, places].mean(-2)
    alone, with_maps = reached(layer, (still, still), (2, 2)), reached(layer, (mean, mean), (2, 2))
    order = torch.arange(36).reshape(6, 6)
    assert torch.equal(alone, order <= 14)  # 2 · 6 + 2
    assert torch.equal(with_maps, order <= 21)  # 3 · 6 + 3


def test_the_second_half_reads_what_the_first_gave() -> None:
    """One value moved in the first half of the heads moves the second too, never the other way round."""
    torch.manual_seed(0)
    mass = MASS(8, 2, 3, (6, 6)).eval()
    gave: dict[str, Tensor] = {}
    for name in ("near", "far"):
        getattr(mass, name).register_forward_hook(lambda _, __, out, name=name: gave.__setitem__(name, out[0]))
    angle, x = torch.ones(2), torch.randn(1, 8, 6, 6)

    def values(channel: int | None) -> tuple[Tensor, Tensor]:
        bias = torch.zeros(24)
        if channel is not None:
            bias[16 + channel] = 1  # of the values alone
        mass.qkv.bias = nn.Parameter(bias)
        mass(x, angle)
        return gave["near"], gave["far"]

    (near, far), (near1, far1), (near2, far2) = values(None), values(0), values(4)
    assert not torch.allclose(near, near1) and not torch.allclose(far, far1)
    assert torch.equal(near, near2) and not torch.allclose(far, far2)


def test_dilation_of_rows_and_columns() -> None:
    rows = neighbourhoods(9, 6, 3, torch.device("cpu"), (3, 2))[0]
    assert rows[0].tolist() == [6 * r + c for r in (0, 3, 6) for c in (0, 2, 4)]
