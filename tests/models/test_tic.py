"""TiC: the released layer, its window, and shifts that make far places neighbours."""

from __future__ import annotations

import json

import numpy as np
import torch
from small_models import SMALL
from support import GOLDENS, fill

from vitreous.models.tic import MSAConv


def test_official_layer() -> None:
    with np.load(GOLDENS / "tic--msaconv_k3.npz") as z:
        info = json.loads(bytes(z["info"]))["kwargs"]
        x, y, after = (torch.from_numpy(z[k]) for k in ("x", "y", "y_relu"))
    layer = MSAConv(info["input_channel"], info["output_channel"], dilation=info["dilation"]).double().eval()
    ours = lambda name: name.replace("qkv_conv", "attn.qkv_conv")
    layer.load_state_dict({ours(k): torch.from_numpy(np.asarray(fill(k, tuple(s)))).double() for k, s in info["state"].items()})
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer(x).relu(), after, rtol=1e-9, atol=1e-9)


def reach(layer: MSAConv, row: int, column: int) -> set[tuple[int, int]]:
    """The places of a 9 × 9 map whose keys and values its attention at one place depends on."""
    x = torch.randn(1, 8, 9, 9, requires_grad=True)
    with torch.no_grad():
        layer.attn.qkv_conv.weight[:8] = 0  # queries that do not depend on their own place
    layer.attn(x)[0, :, row, column].abs().sum().backward()
    assert x.grad is not None
    return {(i, j) for i, j in x.grad.abs().sum((0, 1)).nonzero().tolist()}


def test_the_window_dilation_and_the_four_directions() -> None:
    torch.manual_seed(0)
    square = {(i, j) for i in (3, 4, 5) for j in (3, 4, 5)}
    assert reach(MSAConv(8, 8).eval(), 4, 4) == square
    assert reach(MSAConv(8, 8, dilation=2).eval(), 4, 4) == {(4 + 2 * (i - 4), 4 + 2 * (j - 4)) for i, j in square}
    shifted = reach(MSAConv(8, 8, num_heads=4, shift=3).eval(), 4, 4)
    assert shifted == {(i + 3 * a, j + 3 * b) for i, j in square for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0))}
    assert (0, 0) in reach(MSAConv(8, 8).eval(), 0, 0) and (8, 0) not in reach(MSAConv(8, 8).eval(), 0, 0)
    assert (7, 0) in reach(MSAConv(8, 8, num_heads=4, shift=2).eval(), 0, 0), "shifts go round the map"


def test_the_same_weights_take_any_size() -> None:
    """As many parameters for any size of images, and a larger map's inside answers like a smaller one's."""
    layer = MSAConv(8, 8).eval()
    x = torch.randn(1, 8, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[..., 3:7, 3:7], layer(x[..., 1:9, 1:9])[..., 2:6, 2:6])
        assert SMALL["tic"].make()(SMALL["tic"].images(1, side=224)).shape == (1, 7)
