"""Shared by the tests: small models, and weights filled from their names as `tests/goldens` were made."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitreous.cli import main

GOLDENS = Path(__file__).parent / "goldens"


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The deterministic weight that the goldens use for a tensor of this name and shape."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        return 0.5 + np.abs(draw)
    if last == "running_mean":
        return 0.1 * draw
    if len(shape) <= 1:
        return 0.1 * draw if last == "bias" else (1.0 if last == "weight" else 0.5) + 0.1 * draw
    if shape[0] == 1 or last != "weight":
        return 0.2 * draw
    return draw / np.float32(np.sqrt(np.prod(shape[1:])))


def filled(model: nn.Module) -> nn.Module:
    state = {k: torch.from_numpy(np.asarray(fill(k, tuple(v.shape)))).to(v.dtype) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def official_state(info: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A golden's weights under the official names; what constructors compute, and so must not matter, is zero."""
    scale, told = info.get("scale", {}), info.get("fixed_values", {})
    return {
        name: torch.tensor(told[name]).reshape(shape)
        if name in told
        else torch.zeros(shape, dtype=torch.long)
        if kind == "fixed"
        else torch.from_numpy(np.asarray(fill(name, tuple(shape)) * np.float32(scale.get(name, 1))))
        for name, shape, kind in info["state"]
    }


def golden(name: str) -> tuple[dict[str, Any], np.ndarray, torch.Tensor]:
    """`info`, expected output, and the input of a golden."""
    with np.load(GOLDENS / f"{name}.npz") as z:
        info, out = json.loads(bytes(z["info"])), z["out"]
    x = np.random.default_rng(info["x_seed"]).standard_normal(info["x_shape"], dtype=np.float32)
    return info, out, torch.from_numpy(x)


def small_vit(depth: int = 4, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A plain ViT of 0.1 M parameters over 4 × 4 patches, with weights large enough that layers matter."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **{**dict(img_size=32, patch_size=8, embed_dim=48, depth=depth, num_heads=3, num_classes=7), **kwargs},
    )
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    return model.eval()


def small_convnet(name: str, dims: tuple[int, ...] = (8, 16, 16, 32)) -> nn.Module:
    """A ConvNeXt of timm's for images of 32 pixels, its layers' weights large enough that they matter."""
    torch.manual_seed(0)
    model = timm.create_model(name, depths=(1, 2, 1, 1), dims=dims, num_classes=7, ls_init_value=1.0)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    return model.eval()


def from_timm(name: str, **kwargs: Any) -> nn.Module:
    """A plain ViT of timm's under its name, as small as `small_vit`."""
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7)
    model = timm.create_model(name, **{**shape, **kwargs}).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    return model


def pooled(**kwargs: Any) -> nn.Module:
    """A `small_vit` without a class token."""
    return small_vit(class_token=False, global_pool="avg", **kwargs)


# layout: (model, prefix tokens, whether its class token is read)
LAYOUTS: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "class token": (small_vit, 1, True),
    "registers": (lambda: from_timm("vit_small_patch14_reg4_dinov2"), 5, True),
    "distilled": (lambda: from_timm("deit_tiny_distilled_patch16_224"), 2, True),
    "average": (pooled, 0, False),
    "registers, average": (lambda: pooled(reg_tokens=2), 2, False),
    "class token, average": (lambda: small_vit(global_pool="avg"), 1, False),
}


def uneven_vit(wide: float = 25, off: float = 8) -> nn.Module:
    """As in real ViTs, a few channels of the LayerNorms are `wide` times as wide as the rest, and some `off` zero."""
    model = small_vit(depth=2)
    with torch.no_grad():
        for block in model.blocks:
            for norm in (block.norm1, block.norm2):
                norm.weight[:4] *= wide
                norm.bias[4:8] += off
            for layer in (block.attn.qkv, block.mlp.fc1):
                layer.weight[:, :4] /= wide
    return model


def error(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> float:
    """The relative L2 distance of two models' answers."""
    with torch.no_grad():
        return float((model(x) - reference(x)).norm() / reference(x).norm())


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `vitreous …` in this process."""
    monkeypatch.setattr(sys, "argv", ["vitreous", *arguments])
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err
