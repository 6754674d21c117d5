"""Explanations against what published tools give (`tests/goldens/see--*`, copied without their upscaled pictures)."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from support import GOLDENS, fill, filled
from torch import Tensor, nn

from vitreous import see

SHARED = Path(__file__).parents[3] / "shared"


def expected(name: str, array: str, folder: Path = GOLDENS) -> tuple[dict[str, Any], Tensor]:
    with np.load(folder / f"see--{name}.npz") as z:
        return json.loads(bytes(z["info"])), torch.from_numpy(z[array])


def worst(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32))


@pytest.fixture(scope="module")
def deit() -> nn.Module:
    return filled(timm.create_model("deit_tiny_patch16_224"))


@pytest.mark.parametrize("variant", ["mean-d0", "min-d0", "max-d90"])
def test_rollout(variant: str, deit: nn.Module, pictures: Tensor) -> None:
    info, theirs = expected(f"rollout-{variant}--deit", "map_row_normalised")
    how = info["settings"]
    ours = see.rollout(deit, pictures, fuse=how["head_fusion"], discard=how["discard_ratio"])
    assert worst(ours / ours.amax((1, 2), keepdim=True), theirs) < 1e-4  # theirs is divided by its maximum


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "resnet18"])
def test_grad_cam(name: str, deit: nn.Module, pictures: Tensor) -> None:
    model = deit if name.startswith("deit") else filled(timm.create_model(name))
    info, theirs = expected(f"gradcam--{name.split('_')[0]}", "raw")
    assert worst(see.grad_cam(model, pictures, target=info["target_class"]), theirs.relu()) < 1e-4


@pytest.mark.skipif(not (SHARED / "data/dinov2_vits14_224.safetensors").exists(), reason="needs the shared data")
def test_a_real_dinov2_on_a_photograph() -> None:
    info, theirs = expected("gradcam--dinov2-a", "raw", SHARED / "goldens")
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0)
    weights = load_file(SHARED / "data/dinov2_vits14_224.safetensors")
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    model.head = nn.Linear(384, 10, bias=False)
    model.head.weight.data = torch.from_numpy(fill("readout.weight", (10, 384)))
    with tarfile.open(SHARED / "data/imagenet-sample.tar") as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(info["input"]["photo"]))
        photo = np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"))  # type: ignore
    top, left = round((photo.shape[0] - 224) / 2), round((photo.shape[1] - 224) / 2)
    crop = np.ascontiguousarray(photo[top : top + 224, left : left + 224])
    assert zlib.crc32(crop.tobytes()) == info["input"]["crop_crc32"]
    pixels = (crop / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    assert worst(see.grad_cam(model, x, target=info["target_class"]), theirs.relu()) < 1e-4
    for variant in ("mean-d0", "min-d0", "max-d90"):
        info, theirs = expected(f"rollout-{variant}--dinov2-a", "map_row_normalised", SHARED / "goldens")
        ours = see.rollout(model, x, info["settings"]["head_fusion"], info["settings"]["discard_ratio"])
        assert worst(ours / ours.amax((1, 2), keepdim=True), theirs) < 1e-4
