"""Soft hyperedges behind the blocks of a user's model."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from support import small_vit

import vitreous as vt
from vitreous.models.softhgnn import SoftHGNN
from vitreous.outputs import answer


@pytest.mark.parametrize("family", ["timm DINOv3", "HF ViT"])
@pytest.mark.parametrize("given", [{}, dict(edges=12, heads=4, dynamic=8, top_k=3)])
def test_it_comes_once_behind_the_last_block(family: str, given: dict[str, int]) -> None:
    model = FAMILIES[family].make()
    more = vt.slim(model, vt.adapt.SoftHGNN(**given))
    (layer,) = (m for m in more.modules() if isinstance(m, SoftHGNN))
    x, seen = torch.randn(2, 3, 32, 32), []
    with torch.no_grad():
        layer.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
        assert not torch.equal(answer(more(x)), answer(model(x)))
        ((before, after),) = seen
        layer.node_proj.weight.zero_()
        layer.node_proj.bias.zero_()  # nothing is told to the tokens
        torch.testing.assert_close(answer(more(x)), answer(model(x)))
    assert before.shape == after.shape and all(p.requires_grad for p in more.parameters())


def test_shorter_sequences_and_integers_may_join() -> None:
    x = torch.randn(16, 3, 32, 32)
    small = vt.slim(small_vit(), [vt.tokens.EViT(0.5), vt.adapt.SoftHGNN(), vt.quant.RepQ()], calibration=x)
    other = vt.slim(small_vit(), [vt.adapt.SoftHGNN(), vt.tokens.EViT(0.5), vt.quant.RepQ()], calibration=x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), other(x))


def test_what_it_refuses() -> None:
    for given in (dict(heads=5), dict(edges=0), dict(dynamic=4), dict(top_k=2), dict(dynamic=20, top_k=3)):
        with pytest.raises(vt.VitreousError, match="SoftHGNN"):
            vt.slim(small_vit(), vt.adapt.SoftHGNN(**given))
    for done in ([vt.adapt.SoftHGNN()] * 2, [vt.adapt.HST(), vt.adapt.SoftHGNN()], [vt.quant.RepQ(), vt.adapt.SoftHGNN()]):
        with pytest.raises(vt.VitreousError):
            vt.slim(small_vit(), done, calibration=torch.randn(16, 3, 32, 32))
