"""Log-polar images: turned and enlarged ones are shifted ones, and a network that begins with them."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from support import small_vit
from torch import Tensor

import vitreous as vt
from vitreous import VitreousError
from vitreous.adapt import Foveate
from vitreous.mixers.log_polar import LogPolar


def scene(side: int, turn: float = 0.0, zoom: float = 1.0) -> Tensor:
    """A smooth picture, `turn` radians clockwise and enlarged about its middle."""
    at = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    u, v = (math.cos(turn) * x + math.sin(turn) * y) / zoom, (-math.sin(turn) * x + math.cos(turn) * y) / zoom
    return (torch.sin(5 * u + 1) * torch.cos(4 * v) + u)[None, None]


def test_a_turned_image_is_rolled_by_places() -> None:
    retina, x = LogPolar(0.1, radii=12, angles=24), torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(retina(x.rot90(-1, (2, 3))), retina(x).roll(6, 3), rtol=1e-4, atol=1e-4)  # clockwise
    whole, turned = retina(scene(200)), retina(scene(200, turn=2 * math.pi * 5 / 24))
    assert (turned - whole.roll(5, 3)).abs().max() < 0.01 < (turned - whole).abs().max() / 10


def test_an_enlarged_image_moves_outward_by_rings() -> None:
    retina = LogPolar(0.1, radii=13, angles=24)
    whole, enlarged = retina(scene(200)), retina(scene(200, zoom=0.1 ** (-2 / 12)))
    assert (enlarged[:, :, 2:] - whole[:, :, :-2]).abs().max() < 0.01 < (enlarged - whole).abs().max() / 10


def test_a_ring_is_a_ring_and_its_size_falls_to_the_middle() -> None:
    at = (torch.arange(256) + 0.5) / 128 - 1
    distance = (at[:, None] ** 2 + at**2).sqrt()[None, None]
    rings = LogPolar(2**-4, radii=5, angles=32)(distance)[0, 0]
    assert (rings[:-1].amax(1) - rings[:-1].amin(1)).max() < 0.01
    torch.testing.assert_close(rings[:-1].mean(1), 2.0 ** torch.arange(-4, 0), atol=0.01, rtol=0.01)


def test_it_looks_where_it_is_told() -> None:
    retina, x = LogPolar(0.01, radii=4, angles=8), torch.zeros(2, 1, 20, 30)
    x[0, 0, 4, 7] = 1
    there = torch.tensor([[7.5 / 30 * 2 - 1, 4.5 / 20 * 2 - 1], [0.0, 0.0]])
    found = retina(x, there)
    assert found[0, 0, 0].min() > 0.8 and not found[1].any()
    assert retina(x).shape == (2, 1, 4, 8) and LogPolar()(x).shape == x.shape
    with pytest.raises(VitreousError, match="innermost ring"):
        LogPolar(inner=1.5)


@pytest.mark.parametrize("name", ["vit", "test_resnet", "test_convnext"])
def test_any_network_reads_it_and_learns(name: str) -> None:
    model = small_vit() if name == "vit" else timm.create_model(name, num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    small = vt.slim(model, Foveate())
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(LogPolar()(x)))
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in model.parameters())
    small.train()(x).sum().backward()
    assert next(small.parameters()).grad is not None


def test_what_it_refuses() -> None:
    with pytest.raises(VitreousError, match="no convolution"):
        vt.slim(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)), Foveate())
    with pytest.raises(VitreousError, match="log-polar already"):
        vt.slim(small_vit(), [Foveate(), Foveate(inner=0.1)])
    with pytest.raises(VitreousError, match="inner must lie"):
        Foveate(inner=0.0)
