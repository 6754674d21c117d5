"""Every method of pretraining, with a model and inputs that are small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from learning import vit

from vitreous.learn import pretrain as p

SMALL = "width=16, depth=1, heads=2"


def clips() -> torch.nn.Module:
    return p.VideoViT((4, 16, 16), (2, 4, 4), width=16, depth=1, heads=2)


def volumes() -> torch.nn.Module:
    return p.UnifiedViT(16, (16, 16, 6), patch=4, width=16, depth=1, heads=2)


def methods(folder: Path) -> list[tuple[str, torch.nn.Module, torch.Tensor, torch.Tensor | None]]:
    torch.manual_seed(0)
    x, frames, faces = torch.randn(8, 3, 16, 16), folder / "frames.npy", folder / "faces.npy"
    np.save(frames, x.numpy())
    np.save(faces, np.random.default_rng(0).integers(0, 11, (8, 16, 16)))
    net = lambda **kwargs: vit(**{"patch_size": 4, "classes": 0} | kwargs)
    told = "prototypes=8, patch_prototypes=8"
    several = torch.eye(3)[torch.arange(8) % 3]
    found = [
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
    return [(*f, several if f[0].startswith("SoftCon") else None) for f in found]
