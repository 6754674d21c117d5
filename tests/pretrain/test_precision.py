"""Every method in bfloat16: what is drawn, its targets and its losses stay in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from learning import vit

import vitreous as vt
from vitreous.learn import pretrain as p
from vitreous.learn.pretrain.dino import DINOHead
from vitreous.learn.pretrain.views import cropped

SMALL = "width=16, depth=1, heads=2"


def clips() -> torch.nn.Module:
    return p.VideoViT((4, 16, 16), (2, 4, 4), width=16, depth=1, heads=2)


def volumes() -> torch.nn.Module:
    return p.UnifiedViT(16, (16, 16, 6), patch=4, width=16, depth=1, heads=2)


def methods(folder: Path) -> list[tuple[str, torch.nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    x, frames, faces = torch.randn(8, 3, 16, 16), folder / "frames.npy", folder / "faces.npy"
    np.save(frames, x.numpy())
    np.save(faces, np.random.default_rng(0).integers(0, 11, (8, 16, 16)))
    net = lambda **kwargs: vit(**{"patch_size": 4, "classes": 0} | kwargs)
    told = "prototypes=8, patch_prototypes=8"
    return [
        ("SimMIM()", net(), x),
        ("GMML()", net(), x),
        ("EVA(mask=0.4)", net(), x),
        (f"MAE({SMALL})", net(), x),
        (f"FSFM(parsings='{faces}', width=16, depth=1)", net(), x),
        (f"VideoMAEv2({SMALL})", clips(), torch.randn(4, 3, 4, 16, 16)),
        (f"Uni4Eye({SMALL})", volumes(), torch.rand(4, 1, 16, 16, 6)),
        (f"Uni4Eye({SMALL})", volumes(), x),
        ("SSAST(mask=0.5)", net(in_chans=1), torch.randn(8, 1, 16, 16)),
        ("SemAIM()", net(), x),
        (f"SelfPatch(local=0, {told})", net(), x[:2]),
        ("POA(local=0, prototypes=(8,), ibot=0)", net(), x[:2]),
        ("POA(local=0, prototypes=(8,), smallest=1)", net(), x[:2]),
        (f"TOVVICReg(frames='{frames}', hidden=16)", net(), x),
        ("MaskAndMatch()", net(), x),
        ("SoftCon(width=16)", net(), x),
    ]


@pytest.mark.parametrize("which", range(16))
def test_every_method_in_bfloat16(which: int, tmp_path: Path) -> None:
    method, model, x = methods(tmp_path)[which]
    teacher = vit(patch_size=4, depth=1) if method.startswith("EVA") else None
    said = []
    given = dict(epochs=1, batch=len(x), augment=None, precision="bf16-mixed", teacher=teacher, say=said.append)
    labels = torch.eye(3)[torch.arange(8) % 3] if method.startswith("SoftCon") else None
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
