from __future__ import annotations

import pytest
import torch

from vitreous.mixers import irfft2, rfft2


@pytest.mark.parametrize("size", [(14, 14), (7, 7), (5, 8), (6, 3), (1, 1)])
def test_the_products_are_the_transforms(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    fast = torch.fft.rfft2(x, norm="ortho")
    real, imaginary = rfft2(x)
    torch.testing.assert_close(torch.complex(real, imaginary), fast)
    changed = fast * torch.randn_like(fast)  # no longer the transform of any real map
    torch.testing.assert_close(irfft2(changed.real, changed.imag, size[1]), torch.fft.irfft2(changed, s=size, norm="ortho"))
