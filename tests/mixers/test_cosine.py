"""The cosine transform is scipy's."""

from __future__ import annotations

import numpy as np
import torch
from scipy.fft import dctn

from vitreous.mixers.cosine import dct2, idct2


def test_against_scipy_and_back() -> None:
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    wanted = dctn(x.numpy(), axes=(2, 3), norm="ortho")
    assert np.abs(dct2(x).numpy() - wanted).max() < 1e-12
    torch.testing.assert_close(dct2(x, 4, 5), dct2(x)[..., :4, :5])
    torch.testing.assert_close(idct2(dct2(x), 6, 9), x)
    flat = torch.full((1, 1, 5, 5), 3.0)
    torch.testing.assert_close(idct2(dct2(flat, 1, 1), 5, 5), flat)
