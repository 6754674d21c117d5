"""The parallel scans against their definitions, one step at a time in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitreous.mixers.scan import SelectiveScan, gated_linear_attention, linear_recurrence, selective_scan, state_space_dual

Inputs = tuple[Tensor, ...]


def gla_inputs(length: int, decay: float, seed: int = 0) -> Inputs:
    """q, k, v and the logarithms of gates, down to −`decay` a step, of 2 images and 3 heads."""
    at = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, length, width, generator=at) for width in (4, 4, 5))
    return q, k, v, -decay * torch.rand(2, 3, length, 4, generator=at)


def scan_inputs(length: int, decay: float, seed: int = 0) -> Inputs:
    """x, Δ up to `decay`, A, B, C and D of 2 images, 3 channels and 4 states."""
    at = torch.Generator().manual_seed(seed)
    x, B, C = (torch.randn(2, length, width, generator=at) for width in (3, 4, 4))
    delta, A = decay * torch.rand(2, length, 3, generator=at), -0.5 - torch.rand(3, 4, generator=at)
    return x, delta, A, B, C, torch.randn(3, generator=at)


def dual_inputs(length: int, decay: float, seed: int = 0) -> Inputs:
    """x, Δ up to `decay`, A, B, C and D of 2 images, 3 heads of 5 channels, and 4 states."""
    at = torch.Generator().manual_seed(seed)
    x, B, C = torch.randn(2, length, 3, 5, generator=at), *torch.randn(2, 2, length, 4, generator=at)
    delta, A = decay * torch.rand(2, length, 3, generator=at), -0.5 - torch.rand(3, generator=at)
    return x, delta, A, B, C, torch.randn(3, generator=at)


def naive_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None, :]), []
    for t in range(q.shape[2]):
        state = g[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(out, 2)


def naive_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0, :, None] * B[:, 0, None, :]), []
    for t in range(x.shape[1]):
        h = (delta[:, t, :, None] * A).exp() * h + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        out.append((h * C[:, t, None, :]).sum(-1) + D * x[:, t])
    return torch.stack(out, 1)


def naive_dual(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0, :, :, None] * B[:, 0, None, None, :]), []
    for t in range(x.shape[1]):
        read = delta[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, None, None, :]
        h = (delta[:, t] * A).exp()[:, :, None, None] * h + read
        out.append((h * C[:, t, None, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(out, 1)


def with_gradients(scan: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = scan(*leaves)
    at = torch.Generator().manual_seed(9)
    out.backward(torch.randn(out.shape, generator=at).to(out))
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


EACH = pytest.mark.parametrize(
    ("scan", "naive", "inputs"),
    [
        (gated_linear_attention, naive_gla, gla_inputs),
        (selective_scan, naive_scan, scan_inputs),
        (state_space_dual, naive_dual, dual_inputs),
    ],
    ids=["gla", "selective", "dual"],
)


@EACH
@pytest.mark.parametrize("length", [1, 2, 7, 31, 32, 33, 64, 100, 200])
def test_equals_its_recurrence(
    scan: Callable[..., Tensor], naive: Callable[..., Tensor], inputs: Callable[..., Inputs], length: int
) -> None:
    """Outputs and all gradients, at lengths that no chunk divides."""
    double = tuple(x.double() for x in inputs(length, 0.5))
    for ours, expected in zip(with_gradients(scan, double), with_gradients(naive, double), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@EACH
@pytest.mark.parametrize("decay", [0.0, 1.0, 30.0, 1000.0])
def test_no_decay_is_too_strong_for_float32(
    scan: Callable[..., Tensor], naive: Callable[..., Tensor], inputs: Callable[..., Inputs], decay: float
) -> None:
    """From none at all to gates that are 0 in float32: neither infinite nor less exact."""
    single = inputs(77, decay)
    expected = with_gradients(naive, tuple(x.double() for x in single))
    for ours, exact in zip(with_gradients(scan, single), expected, strict=True):
        assert (ours.double() - exact).norm() <= 1e-5 * exact.norm()


class Work(TorchDispatchMode):
    """How many numbers all operations write together, and the largest tensor."""

    total = largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.total += x.numel()
                self.largest = max(self.largest, x.numel())
        return out


@EACH
def test_linear_in_the_length(scan: Callable[..., Tensor], naive: Callable[..., Tensor], inputs: Callable[..., Inputs]) -> None:
    """Twice the length is twice the work and twice the largest tensor: 1024 × 1024 pixels are 21 times 224 × 224."""
    short, long = Work(), Work()
    with short:
        scan(*inputs(1024, 1.0))
    with long:
        scan(*inputs(4096, 1.0))
    assert long.total == pytest.approx(4 * short.total, rel=0.01)
    assert long.largest == 4 * short.largest


def test_linear_recurrence_broadcasts() -> None:
    a, u = torch.rand(2, 1, 6, 1, 3), torch.randn(1, 4, 6, 5, 3)
    h, expected = torch.zeros(2, 4, 5, 3), []
    for t in range(6):
        h = a[:, :, t] * h + u[:, :, t]
        expected.append(h)
    torch.testing.assert_close(linear_recurrence(a, u), torch.stack(expected, 2))


def test_selective_scan_layer_starts_as_mamba_does() -> None:
    layer = SelectiveScan(64, rank=4, states=3)
    torch.testing.assert_close(layer.A_log.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(64, 3))
    delta = torch.nn.functional.softplus(layer.dt_proj.bias)
    assert 0.00099 < delta.min() < 0.01 < delta.max() < 0.101
    assert layer(torch.randn(2, 9, 64)).shape == (2, 9, 64)
