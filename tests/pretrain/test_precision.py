"""Every method in bfloat16: what is drawn, its targets and its losses stay in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learning import vit
from methods import methods

import vitreous as vt
from vitreous.learn import pretrain as p
from vitreous.learn.pretrain.dino import DINOHead
from vitreous.learn.pretrain.views import cropped


@pytest.mark.parametrize("which", range(16))
def test_every_method_in_bfloat16(which: int, tmp_path: Path) -> None:
    method, model, x, labels = methods(tmp_path)[which]
    teacher = vit(patch_size=4, depth=1) if method.startswith("EVA") else None
    said = []
    given = dict(epochs=1, batch=len(x), augment=None, precision="bf16-mixed", teacher=teacher, say=said.append)
    taught = vt.pretrain(model, (x, labels), method, **given)
    assert {v.dtype for v in taught.state_dict().values()} == {torch.float32}


def test_what_is_drawn_and_judged_is_in_float32() -> None:
    x = torch.rand(4, 3, 16, 16)
    torch.manual_seed(0)
    exact = cropped(x, (16, 16), (0.5, 1.0))
    head = DINOHead(16, 8, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        assert torch.equal(cropped(x, (16, 16), (0.5, 1.0)), exact)
        assert head(torch.randn(2, 16)).dtype == torch.float32
        a, b = torch.randn(2, 8, 16).bfloat16()
        assert {t.dtype for t in p.tov_vicreg.vicreg(a, b)} == {torch.float32}
        assert p.patches.blurred(x).dtype == p.patches.gradients(255 * x).dtype == torch.float32
