"""What ShiftAddViT adds: products by powers of two, sums that binary codes select, a choice of either for each token."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import GOLDENS, fill, small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous.mixers.shiftadd import (
    BinaryAttention,
    ShiftExperts,
    ShiftLinear,
    binary_codes,
    latency_loss,
    round_power_of_2,
    round_to_fixed,
)
from vitreous.quant.shiftadd import operations


def test_the_released_attention_and_roundings() -> None:
    with np.load(GOLDENS / "shiftaddvit--binary_attention_h2.npz") as z:
        given, arrays = json.loads(bytes(z["info"]))["kwargs"], {k: torch.from_numpy(z[k]) for k in z.files if k != "info"}
    layer = BinaryAttention(given["dim"], given["num_heads"], qkv_bias=True).double().eval()
    layer.load_state_dict({k: torch.from_numpy(fill(k, tuple(shape))).double() for k, shape in given["state"].items()})
    torch.testing.assert_close(layer(arrays["x"]), arrays["y"], rtol=1e-9, atol=1e-9)
    assert torch.equal(round_power_of_2(arrays["W"]), arrays["W_shift"])
    assert torch.equal(round_to_fixed(arrays["fixed_in"]), arrays["fixed"])
    assert round_power_of_2(torch.tensor([0.0, 3.0, -0.2])).tolist() == [0, 4, -0.25]


def test_codes_select_and_add() -> None:
    """A query reads the sum of what keys of the same code hold: no product of two numbers that both vary."""
    q, k, v = torch.randn(1, 4), torch.randn(5, 4), torch.randn(5, 3)
    size = binary_codes(q).max() * binary_codes(k).max()
    added = sum((v[(k[:, i] > 0)].sum(0) for i in range(4) if q[0, i] > 0), torch.zeros(3))
    torch.testing.assert_close((binary_codes(q) @ (binary_codes(k).T @ v))[0], size * added)


def test_an_image_stands_alone_once_sizes_are_fixed() -> None:
    torch.manual_seed(0)
    layer, x = BinaryAttention(16, 2), torch.randn(2, 9, 16)
    assert not torch.allclose(layer(x)[:1], layer(x[:1]))
    layer.fix(x)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    again = BinaryAttention(16, 2)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x[:1]), layer(x[:1]))


def test_the_step_leaves_multiplications_where_it_was_not(images: Tensor) -> None:
    model = small_vit(depth=1)
    before = operations(model, images[:1])
    small = vt.slim(model, vt.quant.ShiftAdd(parts=("attention", "mlp")))
    after = operations(small, images[:1])
    tokens, width, hidden = 17, 48, 192
    assert before["shifts"] == 0 and after["shifts"] == tokens * (4 * width * width + 2 * width * hidden)
    by_default = operations(vt.slim(model, vt.quant.ShiftAdd()), images[:1])
    assert by_default["shifts"] == tokens * 4 * width * width, "of attention alone"
    assert after["multiplications"] == before["multiplications"] - after["shifts"]
    layer = small.blocks[0].mlp.fc1
    assert isinstance(layer, ShiftLinear)
    exact = nn.functional.linear(torch.ones(1, width), round_power_of_2(model.blocks[0].mlp.fc1.weight), layer.bias)
    torch.testing.assert_close(layer(torch.ones(1, width)), exact)
    layer(torch.randn(2, width)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().min() > 0
    with pytest.raises(vt.VitreousError, match="parts must name"):
        vt.quant.ShiftAdd(parts=())


def test_each_token_goes_to_one_expert_and_the_faster_should_have_more() -> None:
    torch.manual_seed(0)
    experts = ShiftExperts(4, nn.Linear(4, 4), ShiftLinear(4, 4)).eval()
    x = torch.randn(1, 50, 4)
    out, chosen = experts(x), experts.choices(x).argmax(-1)
    for i, expert in enumerate(experts.experts):
        torch.testing.assert_close(out[chosen == i], expert(x[chosen == i]))
    share = lambda p: torch.tensor([[1.0, 0.0]] * round(100 * p) + [[0.0, 1.0]] * round(100 * (1 - p)))
    losses = {p: float(latency_loss(share(p), torch.tensor([6.0, 4.0]))) for p in (0.2, 0.4, 0.5, 0.8)}
    assert min(losses, key=losses.__getitem__) == 0.4 and losses[0.4] < 1e-6
