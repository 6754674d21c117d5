"""A position table on another grid: bicubic interpolation, and what runtimes make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitreous as vt
from vitreous.mixers import resample_position


@pytest.mark.parametrize("grid", [(7, 7), (9, 4), (16, 21)])
def test_is_torchs_bicubic_interpolation(grid: tuple[int, int]) -> None:
    table = torch.randn(1, 49, 8, generator=torch.Generator().manual_seed(0))
    factors = tuple((n + 0.1) / 7 for n in grid)
    wanted = F.interpolate(table.mT.unflatten(2, (7, 7)), scale_factor=factors, mode="bicubic").flatten(2).mT
    torch.testing.assert_close(resample_position(table, *grid), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(resample_position(table, 7, 7), table, atol=1e-2)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_runtimes_resample_a_grid_that_keeps_its_size(suffix: str, tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(2) @ resample_position(self.table, 4, 4)).flatten(1)

    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    vt.ship(Table(), tmp_path / f"table{suffix}", example=x, tolerance=1e-4)  # raises when they differ
    torch.testing.assert_close(vt.Runtime(tmp_path / f"table{suffix}")(x), Table()(x), atol=1e-4, rtol=1e-4)
