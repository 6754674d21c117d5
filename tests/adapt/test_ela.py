"""What ELA adds: a map weighted by row and by column, without fewer channels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from support import GOLDENS, fill, small_convnet, small_vit

import vitreous as vt
from vitreous.mixers import ELA


@pytest.mark.parametrize("name", ["ela--k5_dw_gn32", "ela--k7_g32_gn16"])
def test_the_published_layer(name: str) -> None:
    with np.load(GOLDENS / f"{name}.npz") as z:
        given, x, y = json.loads(bytes(z["info"]))["kwargs"], torch.from_numpy(z["x"]), torch.from_numpy(z["y"])
    layer = ELA(given["c"], kernel=given["k"], groups=given["groups"], norm_groups=given["gn"]).double()
    layer.load_state_dict({k: torch.from_numpy(fill(k, tuple(shape))).double() for k, shape in given["state"].items()})
    torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-9)


def test_a_place_is_weighted_by_its_row_and_its_column() -> None:
    """The logarithms of the weights of four corners of a rectangle cancel: nothing depends on both; and the kernel is local."""
    torch.manual_seed(0)
    layer, x = ELA(32).double(), torch.rand(1, 32, 6, 8).double() + 0.5
    log = (layer(x) / x).log()[0]
    assert (log[:, 1, 2] + log[:, 4, 6] - log[:, 1, 6] - log[:, 4, 2]).abs().max() < 1e-12
    assert (log[:, 1, 2] - log[:, 4, 6]).abs().min() > 1e-6
    with pytest.raises(vt.VitreousError, match="do not divide"):
        ELA(24)


@pytest.mark.parametrize(("name", "blocks"), [("resnet10t", 4), ("resnet14t", 4), ("mobilenetv2_100", 15)])
def test_as_a_step_it_follows_the_published_layer_of_each_block(name: str, blocks: int) -> None:
    model = timm.create_model(name, num_classes=3)
    more = vt.slim(model, vt.adapt.ELA())
    assert f"adapt.ELA(): {blocks} blocks" in str(more.vitreous)
    assert sum(p.requires_grad for p in more.parameters()) == sum(1 for _ in more.parameters())
    layers = [m for m in more.modules() if isinstance(m, ELA)]
    assert all(m.conv.groups == m.conv.in_channels for m in layers)


def test_what_it_refuses() -> None:
    with pytest.raises(vt.VitreousError, match="no block"):
        vt.slim(small_vit(depth=1), vt.adapt.ELA())
    with pytest.raises(vt.VitreousError, match="have it already"):
        vt.slim(small_convnet("convnext_atto", dims=(32, 32, 32, 32)), [vt.adapt.ELA(), vt.adapt.ELA()])
