"""What polyphase anchoring adds: answers that a shift in a circle cannot change, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from small_models import SMALL
from support import GOLDENS

from vitreous import VitreousError
from vitreous.mixers import anchored
from vitreous.mixers.polyphase import phase_norms

SHIFTS = [(1, 2), (3, 5), (13, -7), (0, 8)]


def test_anchoring_is_the_official_one() -> None:
    with np.load(GOLDENS / "shift-equivariant-vit--polyorder_p4.npz") as z:
        x, shift = torch.from_numpy(z["x"]), tuple(z["shift"].tolist())
        torch.testing.assert_close(phase_norms(x, 4), torch.from_numpy(z["phase_norm"]))
        assert torch.equal(anchored(x, 4), torch.from_numpy(z["y"]))
        assert torch.equal(anchored(x.roll(shift, (2, 3)), 4), torch.from_numpy(z["y_shifted"]))


@pytest.mark.parametrize("system", ["shift-equivariant-vit", "shift-equivariant-vit polyvit"])
def test_logits_do_not_move_with_the_image(system: str) -> None:
    """To the last digits of float64 for any shift, where the same network of timm's moves with its strides."""
    small = SMALL[system]
    model: Any = small.make().double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else None
    x = small.images().double()
    with torch.no_grad():
        still = model(x)
        off = [(model(x.roll(shift, (2, 3))) - still).abs().max() for shift in SHIFTS]
        assert max(off) < 1e-9
        if "polyvit" not in system:
            plain = timm.create_model("twins_svt_small", num_classes=7, **small.arguments).eval().double()
            plain.load_state_dict(model.state_dict())
            assert min((plain(x.roll(shift, (2, 3))) - plain(x)).abs().max() for shift in SHIFTS[:3]) > 1e-3


def test_each_image_of_a_batch_is_anchored_by_itself_and_gradients_come_back() -> None:
    x = torch.zeros(2, 1, 4, 4)
    x[0, 0, 1, 0], x[1, 0, 2, 3] = 1, 1
    turned = anchored(x.requires_grad_(), 2)
    assert turned[0, 0, 0, 0] == 1 and turned[1, 0, 2, 2] == 1
    turned[:, 0, 0, 0].sum().backward()
    assert x.grad is not None and x.grad[0, 0, 1, 0] == 1 and x.grad[1, 0, 0, 1] == 1 and x.grad.sum() == 2


def test_sides_that_windows_do_not_divide_are_refused() -> None:
    with pytest.raises(VitreousError, match="do not divide by"):
        SMALL["shift-equivariant-vit"].make()(torch.randn(1, 3, 72, 72))
