"""What DCLS adds: weights that learn where in a large kernel they stand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from support import GOLDENS, small_convnet
from torch import Tensor, nn

import vitreous as vt
from vitreous.mixers import DCLS, repulsion, spaced_kernel
from vitreous.mixers.spacings import VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["dcls--kernel2d_depthwise", "dcls-thesis--kernel1d"])
def test_kernels_and_their_gradients_are_the_released_ones(name: str, version: str) -> None:
    with np.load(GOLDENS / f"{name}.npz") as z:
        info, arrays = json.loads(bytes(z["info"])), {k: torch.from_numpy(z[k]) for k in z.files if k != "info"}
    weight, positions, sigma = (arrays[k].clone().requires_grad_() for k in ("W", "P", "SIG"))
    kernel = spaced_kernel(weight, positions, info["kwargs"]["size"], version, sigma, released=True)
    torch.testing.assert_close(kernel, arrays[f"kernel_{version}"], rtol=1e-9, atol=1e-9)
    (kernel * arrays["G"]).sum().backward()
    for what, given in (("W", weight), ("P", positions), ("SIG", sigma)):
        if f"d{what}_{version}" in arrays:
            torch.testing.assert_close(given.grad, arrays[f"d{what}_{version}"], rtol=1e-9, atol=1e-9)
    if "rep" in arrays:
        layer = DCLS(3, 3, 6, (7, 7), groups=3).double()
        layer.P.data = arrays["P"]
        torch.testing.assert_close(repulsion(layer), arrays["rep"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [(7,), (5, 9), (3, 5, 7)])
def test_a_weight_in_place_is_that_place_of_the_kernel(size: tuple[int, ...], version: str) -> None:
    """In one, two and three dimensions, with sides that differ: the middle, and one step along the last axis."""
    dims = len(size)
    positions = torch.zeros(dims, 1, 1, 1)
    last = 0 if dims == 1 or version != "v0" else 1
    for step in (0, 1):
        positions[last] = step
        kernel = spaced_kernel(torch.full((1, 1, 1), 2.0), positions, size, version, torch.zeros(dims, 1, 1, 1))[0, 0]
        wanted = [side // 2 for side in size]
        wanted[-1] += step
        assert np.unravel_index(int(kernel.argmax()), size) == tuple(wanted)
        assert kernel.sum() == pytest.approx(2, abs=1e-4)


def test_positions_learn_and_stay_inside() -> None:
    """A convolution whose one weight stands 3 places to the left is found by gradient from the middle."""
    torch.manual_seed(0)
    layer = DCLS(1, 1, 1, (9,), version="gauss", bias=False)
    with torch.no_grad():
        layer.P.zero_()
        layer.weight.fill_(1.0)
        layer.SIG.fill_(2.0)  # type: ignore[union-attr]
    x = torch.randn(8, 1, 32)
    wanted = nn.functional.pad(x, (3, 0))[..., :32]
    optimiser = torch.optim.Adam([layer.P, layer.weight, layer.SIG], lr=0.05)  # type: ignore[list-item]
    for _ in range(200):
        optimiser.zero_grad()
        (layer(x) - wanted).square().mean().backward()
        optimiser.step()
    assert layer.P.item() == pytest.approx(-3, abs=0.1)
    layer.P.data.fill_(-20.0)
    layer(x)
    assert layer.P.item() == -4


def test_blocks_of_a_stage_share_positions() -> None:
    model = timm.create_model("convnext_dcls_tiny", depths=(2, 2, 1, 1), dims=(8, 16, 16, 32))
    shared = [stage.blocks[0].conv_dw.P for stage in model.stages]
    assert all(block.conv_dw.P is p for stage, p in zip(model.stages, shared, strict=True) for block in stage.blocks)
    assert len({id(p) for p in shared}) == 4
    assert model.no_weight_decay() == {f"stages.{i}.blocks.0.conv_dw.P" for i in range(4)}


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_as_a_step_it_starts_from_the_trained_kernel(version: str) -> None:
    """49 weights at the 49 places of a 7 × 7 kernel are that kernel, inside of one of 17 × 17; fewer are its strongest."""
    model, x = small_convnet("convnext_tiny"), torch.randn(2, 3, 32, 32)
    same = vt.slim(model, vt.adapt.DCLS(count=49, version=version))  # type: ignore[arg-type]
    torch.testing.assert_close(same(x), model(x), rtol=1e-4, atol=1e-5)
    off: list[Tensor] = [(vt.slim(model, vt.adapt.DCLS(count=n))(x) - model(x)).norm() for n in (5, 25, 40)]
    assert off[0] > off[1] > off[2] > 0
    with pytest.raises(vt.VitreousError, match="no depthwise convolution"):
        vt.slim(timm.create_model("resnet18"), vt.adapt.DCLS())
