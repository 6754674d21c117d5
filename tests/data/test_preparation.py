from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer

from vitreous.data import calibration, open_data
from vitreous.data.fashion import sample_arrays
from vitreous.errors import VitreousError
from vitreous.models.bundled import vit_fashion

SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


def test_a_timm_model_gets_the_size_and_channels_it_was_made_with() -> None:
    for chans in (1, 3):
        model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=chans, num_classes=10, **SMALL)
        assert model.pretrained_cfg["input_size"] == (3, 224, 224)  # timm leaves it
        data = open_data("sample", model, limit=2)
        x = data.tensor([0, 1])
        assert x.shape == (2, chans, 32, 32)
        assert model(x).shape == (2, 10)
        assert data.picture(0).size == (32, 32)
        assert calibration("sample", model, 3).shape == (3, chans, 32, 32)


def test_without_a_model_pictures_are_prepared_for_the_bundled_one(tmp_path: Path) -> None:
    for c in range(10):
        (tmp_path / str(c)).mkdir()
        pixels = np.random.default_rng(c).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / str(c) / "odd.png")
    x = open_data(tmp_path).tensor(range(10))
    model = vit_fashion()
    assert torch.equal(x, open_data(tmp_path, model).tensor(range(10)))
    assert model(x).shape == (10, 10)


def test_normalisation_and_crop_are_the_models() -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, **SMALL)
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["crop_pct"]) == ((0.5, 0.5, 0.5), 0.9)
    data = open_data("sample", model, limit=1)
    picture = torch.from_numpy(np.asarray(data.picture(0)).copy()).permute(2, 0, 1)
    torch.testing.assert_close(data.tensor([0])[0], (picture / 255 - 0.5) / 0.5)
    # 28 → 32 / 0.9 = 35 by the cfg's bicubic, of which the middle 32: timm's CenterCrop rounds (35 - 32) / 2 to 2.
    grey = Image.fromarray(sample_arrays("test")[0][0]).resize((35, 35), Image.Resampling.BICUBIC)
    assert (np.asarray(grey)[2:34, 2:34] == np.asarray(data.picture(0))[:, :, 0]).all()


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_both_kinds_of_pretrained_cfg_and_all_crop_modes(mode: str) -> None:
    cfg = {"input_size": (1, 28, 28), "mean": (0.2860,), "std": (0.3530,), "crop_pct": 1.0, "crop_mode": mode}
    expected = open_data("sample", limit=4).tensor(range(4))
    for kind in (dict, PretrainedCfg):
        model: Any = VisionTransformer(img_size=28, in_chans=1, num_classes=10, patch_size=4, embed_dim=32, depth=1, num_heads=2)
        model.pretrained_cfg = kind(**cfg)
        torch.testing.assert_close(open_data("sample", model, limit=4).tensor(range(4)), expected)


def test_a_model_without_a_patch_grid_gets_the_size_in_its_cfg() -> None:
    model: Any = timm.create_model("resnet10t", in_chans=1, num_classes=10)
    side = model.pretrained_cfg["input_size"][1]
    assert open_data("sample", model, limit=1).tensor([0]).shape == (1, 1, side, side)


def test_a_model_that_says_nothing_needs_a_transform() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 28 * 28, 10))
    for ask in (lambda: open_data("sample", model), lambda: calibration("sample", model, 2)):
        with pytest.raises(VitreousError, match=r"Sequential has no pretrained_cfg.*transform="):
            ask()

    def transform(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255

    data = open_data("sample", model, transform=transform, limit=2)
    assert model(data.tensor([0, 1])).shape == (2, 10)
    assert data.picture(1).size == (28, 28)
    assert calibration("sample", model, 2, transform=transform).shape == (2, 3, 28, 28)


def test_other_numbers_of_channels_are_refused() -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=4, **SMALL)
    with pytest.raises(VitreousError, match="4 channels"):
        open_data("sample", model)
