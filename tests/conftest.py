"""Fixtures of all the tests."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from support import small_vit
from torch import nn

torch.set_num_threads(1)  # there are as many workers as cores


def read_operators_once() -> None:
    """torch's exporter reads its tables of operators, and of what they are made of, at each export, which is a quarter of a small
    model's; one reading will do."""
    from torch.onnx._internal.exporter import _decomp, _registration

    read: Any = functools.cache(_registration.ONNXRegistry.from_torchlib)
    made: Any = functools.cache(_decomp.create_onnx_friendly_decomposition_table)

    def copied(**opset: int) -> Any:
        registry = copy.copy(read(**opset))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    _registration.ONNXRegistry.from_torchlib = staticmethod(copied)
    _decomp.create_onnx_friendly_decomposition_table = lambda known: dict(made(frozenset(known)))


read_operators_once()


@pytest.fixture
def vit() -> nn.Module:
    return small_vit()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
