"""Fixtures of all the tests."""

from __future__ import annotations

import pytest
import torch
from support import small_vit
from torch import nn

torch.set_num_threads(1)  # there are as many workers as cores


@pytest.fixture
def vit() -> nn.Module:
    return small_vit()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
