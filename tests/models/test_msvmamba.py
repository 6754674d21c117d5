"""What makes MSVMamba what it is, and its second version, which the common tests do not build."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor

import vitreous.models  # noqa: F401  registers the architectures
from vitreous.models.msvmamba import MultiScaleScan
from vitreous.ship import ship_all


def second(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    arguments = dict(embed_dim=16, depths=(1, 1, 1, 1), num_classes=7)
    return timm.create_model("msvmambav3_base_224", **{**arguments, **kwargs}).eval()


def without(part: str, v3: bool) -> Tensor:
    """How much each of 16 × 16 pixels changes the scans' sum in the middle when the other scale says nothing: `[16, 16]`."""
    torch.manual_seed(0)
    layer = MultiScaleScan(8, 1, False, v3)
    layer.se = cast(Any, torch.nn.Identity())  # its mean reads every pixel
    silenced = layer.conv_full if part == "full" else layer.conv_half
    with torch.no_grad():
        for p in silenced.parameters():
            p.zero_()
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    layer(x)[0, :, 8, 8].square().sum().backward()
    return cast(Tensor, x.grad).abs().sum((0, 1))


@pytest.mark.parametrize("v3", [False, True])
def test_the_whole_map_is_scanned_onwards_and_the_half_map_in_the_other_directions(v3: bool) -> None:
    onwards = without("half", v3)
    assert onwards[:8].all() and not onwards[10:].any()
    assert without("full", v3).all()


def test_the_scans_of_the_half_map_share_one_state() -> None:
    """Where it begins, the first direction reads only that pixel; the others read all that was scanned before them."""
    torch.manual_seed(0)
    layer = MultiScaleScan(4, 1, False, False)
    for direction, (corner, reads) in enumerate([(2, 1), (0, 9), (2, 9)]):
        x = torch.randn(1, 4, 3, 3, requires_grad=True)
        layer.three_ways(x)[direction][0, :, corner, corner].square().sum().backward()
        assert cast(Tensor, x.grad).abs().sum(1).count_nonzero() == reads


def test_second_version_maps_heads_and_gradients() -> None:
    x = torch.randn(2, 3, 64, 96)
    model = second()
    last, maps = model.forward_intermediates(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    torch.testing.assert_close(model.forward_head(last), model(x))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert second(num_classes=0)(x).shape == (2, 128)


def test_second_version_export(tmp_path: Path) -> None:
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = second(depths=(1, 1))
    for shipment in ship_all(model, [tmp_path / "model.onnx", tmp_path / "model.xml"], example=x):
        assert shipment.parity.worst <= 1e-3
