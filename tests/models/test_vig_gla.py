"""What makes ViG what it is, and its hierarchical half, which the common tests do not build."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor

import vitreous.models  # noqa: F401  registers the architectures
from vitreous.macs import CountMacs
from vitreous.models.vig_gla import BidirectionalGLA
from vitreous.ship import ship_all


def hierarchical(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    arguments = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=7)
    return timm.create_model("vig_gla_h_t", **{**arguments, **kwargs}).eval()


def layer() -> BidirectionalGLA:
    """A layer whose convolution passes its input on, so that all mixing of tokens is attention's."""
    torch.manual_seed(0)
    layer = BidirectionalGLA(12, 3, 1 / 4)
    conv = cast(torch.nn.Conv2d, layer.in_proj[0])
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :, 1, 1] = 1
    return layer


def reach(layer: BidirectionalGLA, at: int) -> Tensor:
    """How much each token of a 4 × 4 map changes what is given at the token `at`: `[16]`."""
    x = torch.randn(1, 12, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer(x).flatten(2)[0, :, at].square().sum().backward()
    return cast(Tensor, x.grad).abs().sum(1).flatten()


def test_every_token_reads_both_directions() -> None:
    assert (reach(layer(), 6) > 0).all()


def test_each_direction_has_gates_of_its_own() -> None:
    """With the gates of one direction shut, a token reads only the other side and itself."""
    for half, seen in ((0, range(6, 16)), (1, range(7))):
        model = layer()
        last = cast(torch.nn.Linear, model.gk_proj[1])
        with torch.no_grad():
            last.weight.zero_()
            last.bias.view(2, -1)[half] = -1e4
        assert reach(model, 6).nonzero().flatten().tolist() == list(seen)


def test_the_gate_chooses_between_context_and_locality() -> None:
    model = layer()
    with torch.no_grad():
        model.g_proj.weight.zero_()
        model.g_proj.bias.fill_(-1e4)
    assert reach(model, 6).nonzero().flatten().tolist() == [6]


def test_linear_in_the_area() -> None:
    """Four times the pixels, four times the multiplications, which softmax attention would make far more at 1024 pixels."""
    counted = []
    for side in (512, 1024):
        with torch.device("meta"):
            model, x = timm.create_model("vig_gla_t", depth=1, num_classes=0), torch.zeros(1, 3, side, side)
        with torch.no_grad(), CountMacs() as counter:
            model(x)
        counted.append(counter.total)
    assert counted[1] == 4 * counted[0]


def test_hierarchical_maps_heads_and_gradients() -> None:
    x = torch.randn(2, 3, 64, 96)
    model = hierarchical()
    last, maps = model.forward_intermediates(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 16, 24), (48, 8, 12), (96, 4, 6), (192, 2, 3)]
    torch.testing.assert_close(model.forward_head(last), model(x))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert hierarchical(num_classes=0)(x).shape == (2, 192)


def test_hierarchical_export(tmp_path: Path) -> None:
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = hierarchical(depths=(1, 1), num_heads=(1, 2))
    for shipment in ship_all(model, [tmp_path / "model.onnx", tmp_path / "model.xml"], example=x):
        assert shipment.parity.worst <= 1e-3
