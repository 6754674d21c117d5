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
from vitreous.see.activations import places
from vitreous.see.pixels import occluded

SHARED = Path(__file__).parents[3] / "shared"


def expected(name: str, array: str, folder: Path = GOLDENS) -> tuple[dict[str, Any], Tensor]:
    with np.load(folder / f"see--{name}.npz") as z:
        return json.loads(bytes(z["info"])), torch.from_numpy(z[array])


def worst(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


HERE = pytest.mark.skipif(not (SHARED / "data/dinov2_vits14_224.safetensors").exists(), reason="needs the shared data")


def dinov2(info: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0)
    weights = load_file(SHARED / "data/dinov2_vits14_224.safetensors")
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    model.head = nn.Linear(384, 10, bias=False)
    model.head.weight.data = torch.from_numpy(fill("readout.weight", (10, 384)))
    with tarfile.open(SHARED / "data/imagenet-sample.tar") as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(info["input"]["photo"]))
        photo = np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"))
    top, left = round((photo.shape[0] - 224) / 2), round((photo.shape[1] - 224) / 2)
    crop = np.ascontiguousarray(photo[top : top + 224, left : left + 224])
    assert zlib.crc32(crop.tobytes()) == info["input"]["crop_crc32"]
    pixels = (crop / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    return model, x


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


def test_layer_cam(pictures: Tensor) -> None:
    info, theirs = expected("layercam--resnet18", "raw")
    assert worst(see.layer_cam(filled(timm.create_model("resnet18")), pictures, info["target_class"]), theirs.relu()) < 1e-4


def test_grad_cam_pp(deit: nn.Module, pictures: Tensor) -> None:
    """The tool adds 1e-6 below its fraction, as much as the squared gradients are here: with that ours is the same."""
    info, theirs = expected("gradcampp--deit", "raw")
    p = places(deit, pictures, info["target_class"], None)
    g, size = p.slopes, p.values.sum(2, keepdim=True)
    as_theirs = (g**2 / (2 * g**2 + size * g**3 + 1e-6) * g.relu()).sum(2, keepdim=True)
    assert worst((as_theirs * p.values).sum(1).unflatten(1, (14, 14)), theirs) < 1e-4
    assert (g**2).median() < 1e-5


def test_eigen_cam(deit: nn.Module, pictures: Tensor) -> None:
    """The tool's sign is that of a numerical library; ours is that in which few places stand out."""
    _, theirs = expected("eigencam--deit", "raw")
    theirs = theirs * theirs.pow(3).sum((1, 2), keepdim=True).sign()
    assert worst(see.eigen_cam(deit, pictures), theirs.relu()) < 1e-4


def test_grad_rollout(deit: nn.Module, pictures: Tensor) -> None:
    """Against the tool as corrected: gradients of the probabilities in the order of the layers, rows divided by their sums."""
    info, theirs = expected("gradrollout-d0--deit", "map_matched_row_normalised")
    ours = see.grad_rollout(deit, pictures, info["target_class"], info["settings"]["discard_ratio"])
    assert worst(ours / ours.amax((1, 2), keepdim=True), theirs) < 1e-4


def test_occlusion(deit: nn.Module, pictures: Tensor) -> None:
    """Theirs tells the fall of the score once for each of three colours."""
    info, theirs = expected("occlusion--deit", "map")  # one value a window
    assert worst(occluded(deit, pictures[:1], info["target_class"], (14, 14)), theirs[:1] / 3) < 1e-4


@HERE
def test_a_real_dinov2_on_a_photograph() -> None:
    info, theirs = expected("gradcam--dinov2-a", "raw", SHARED / "goldens")
    model, x = dinov2(info)
    assert worst(see.grad_cam(model, x, target=info["target_class"]), theirs.relu()) < 1e-4
    for variant in ("mean-d0", "min-d0", "max-d90"):
        info, theirs = expected(f"rollout-{variant}--dinov2-a", "map_row_normalised", SHARED / "goldens")
        ours = see.rollout(model, x, info["settings"]["head_fusion"], info["settings"]["discard_ratio"])
        assert worst(ours / ours.amax((1, 2), keepdim=True), theirs) < 1e-4
    info, theirs = expected("layercam--dinov2-a", "raw", SHARED / "goldens")
    assert worst(see.layer_cam(model, x, info["target_class"]), theirs.relu()) < 1e-4
    info, theirs = expected("gradrollout-d90--dinov2-a", "map_matched_row_normalised", SHARED / "goldens")
    ours = see.grad_rollout(model, x, info["target_class"], info["settings"]["discard_ratio"])
    assert worst(ours / ours.amax((1, 2), keepdim=True), theirs) < 1e-4


@HERE
def test_integrated_gradients_of_a_real_dinov2() -> None:
    info, theirs = expected("ig--dinov2-a", "map", SHARED / "goldens")
    model, x = dinov2(info)
    sums = theirs.unflatten(1, (16, 14)).unflatten(3, (16, 14)).sum((2, 4))
    with pytest.warns(UserWarning, match="completeness"):
        ours = see.integrated_gradients(model, x, info["target_class"], steps=info["settings"]["n_steps"])
    assert worst(ours, sums.relu()) < 1e-3
