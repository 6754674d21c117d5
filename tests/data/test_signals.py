"""Volumes, clips, sound and pictures of many channels: what is read of tiny files made here, and what is passed over."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from support import command

import vitreous as vt
from vitreous.data import open_data
from vitreous.data.signals import Reader, log_mel
from vitreous.learn.pretrain.run import Part

VIDEO = [
    "video_vit_small",
    *(w for a in ("size=(4,16,16)", "cube=(2,4,4)", "width=24", "depth=2", "heads=2") for w in ("--model-arg", a)),
]
UNIFIED = [
    "unified_vit_small",
    *(w for a in ("size=16", "volume=(16,16,6)", "patch=8", "width=24", "depth=2", "heads=2") for w in ("--model-arg", a)),
]
SMALL = [w for a in ("patch_size=4", "embed_dim=24", "depth=2", "num_heads=3") for w in ("--model-arg", a)]


def volumes(home: Path) -> None:
    import nibabel

    for i in range(4):
        values = np.full((16, 16, 6), i, np.float32)
        values[:, :, 3:] += np.arange(16, dtype=np.float32)[:, None, None] + 1
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), home / f"{i}.nii{'.gz' if i % 2 else ''}")
    (home / "broken.nii.gz").write_bytes((home / "1.nii.gz").read_bytes()[:40])


def clips(home: Path) -> None:
    import av

    for i in range(4):
        with av.open(str(home / f"{i}.{'avi' if i % 2 else 'mp4'}"), "w") as file:
            stream = file.add_stream("mpeg4", rate=8)
            stream.width = stream.height = 32
            for t in range(8):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 16 + 30 * t, np.uint8), format="rgb24")
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    (home / "broken.mp4").write_bytes(b"no clip")


def sounds(home: Path) -> None:
    import soundfile

    for i in range(4):
        at = np.arange(8000) / 16000
        soundfile.write(home / f"{i}.{'flac' if i % 2 else 'wav'}", np.sin(2 * np.pi * 1000 * at) / 2, 16000)
    (home / "broken.wav").write_bytes(b"RIFFxxxx")


def bands(home: Path) -> None:
    import tifffile

    draw = np.random.default_rng(0)
    for i in range(2):
        np.save(home / f"{i}.npy", draw.standard_normal((20, 16, 5)).astype(np.float32))
        tifffile.imwrite(home / f"{i}.tif", draw.integers(0, 4000, (5, 16, 16), dtype=np.uint16), photometric="minisblack")
    np.save(home / "broken.npy", draw.standard_normal((6, 16, 16)))  # one channel too many


@pytest.mark.parametrize(
    ("make", "model", "method"),
    [
        (volumes, UNIFIED, "Uni4Eye(width=24, depth=1, heads=2)"),
        (clips, VIDEO, "VideoMAEv2(width=24, depth=1, heads=2, mask=0.75, decoder_mask=0)"),
        (sounds, ["vit_tiny_patch16_224", "--model-arg", "in_chans=1", "--model-arg", "img_size=(16,48)", *SMALL], "SSAST()"),
        (bands, ["vit_tiny_patch16_224", "--model-arg", "in_chans=5", "--img-size", "16", *SMALL], "SimMIM(cell=4)"),
    ],
)
def test_from_files_to_an_encoder(make, model, method, tmp_path, monkeypatch, capsys) -> None:
    (home := tmp_path / "files").mkdir()
    make(home)
    words = ["pretrain", *model, "--data", str(home), "--method", method, "--batch", "4", "--epochs", "1"]
    status, _, err = command(monkeypatch, capsys, *words, "--out", str(tmp_path / "run"))
    assert status == 0, err
    assert "4 images, 1 files skipped" in err and "broken" in err
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_probed_by_class(tmp_path, monkeypatch, capsys) -> None:
    for name in ("a", "b"):
        (tmp_path / "files" / name).mkdir(parents=True)
        volumes(tmp_path / "files" / name)
    words = ["probe", *UNIFIED, "--data", str(tmp_path / "files"), "--protocol", "knn,linear"]
    status, out, err = command(monkeypatch, capsys, *words)
    assert status == 0 and "knn" in out, err


def test_a_volume_keeps_its_axes(tmp_path) -> None:
    volumes(tmp_path)
    x = Reader("volumes", (16, 16, 6), 1)(tmp_path / "0.nii")
    assert x.shape == (1, 16, 16, 6)
    torch.testing.assert_close(x[0, :, 0, 4], torch.arange(1, 17) / 16)
    assert (x[..., :3] == 0).all()


def test_frames_are_spread_over_the_clip(tmp_path) -> None:
    clips(tmp_path)
    x = Reader("clips", (4, 16, 16), 3)(tmp_path / "0.mp4")
    grey = 255 * (x * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1))
    assert (grey.mean((0, 2, 3)) - (16 + 30 * torch.tensor([1, 3, 5, 7]))).abs().max() < 6


def test_crops_are_alike_in_every_frame_and_slice() -> None:
    torch.manual_seed(0)
    still = torch.rand(3, 1, 16, 16).expand(3, 4, 16, 16)
    moved = [Part("clips", (0.3, 0.5))(still) for _ in range(8)]
    assert all(m.shape == still.shape and torch.equal(m, m[:, :1].expand_as(m)) and not torch.equal(m, still) for m in moved)
    ramp = torch.arange(16.0).expand(1, 4, 16, 16)  # brighter to the right: a clip never turns round
    assert all((Part("clips", (0.5, 1.0))(ramp).diff(dim=3) >= 0).all() for _ in range(8))
    ramp = torch.arange(16.0)[None, None, :, None].expand(1, 16, 16, 5)
    rises = [Part("volumes", (0.5, 1.0))(ramp).diff(dim=2) for _ in range(16)]
    assert {bool((r >= 0).all()) for r in rises} == {True, False} and all((r >= 0).all() or (r <= 0).all() for r in rises)
    bands = torch.rand(5, 16, 16)
    assert Part("channels", (0.2, 0.5))(bands).shape == bands.shape and Part("sound", (0.2, 0.5))(bands) is bands


def test_calibration_reads_them(tmp_path) -> None:
    clips(tmp_path)
    model = vt.open(VIDEO[0], size=(4, 16, 16), cube=(2, 4, 4), width=24, depth=1, heads=2)
    assert vt.data.calibration(tmp_path, model, 3).shape == (3, 3, 4, 16, 16)
    assert open_data(tmp_path, model, labelled=False).what == "clips"


def test_a_tone_is_in_its_band() -> None:
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000)
    x = log_mel(tone)
    assert x.shape == (98, 128)
    mel = lambda f: 1127 * math.log1p(f / 700)
    band = (mel(1000) - mel(20)) / (mel(8000) - mel(20)) * 129 - 1
    assert abs(float(x.mean(0).argmax()) - band) <= 1


def test_constant_channels_are_zero(tmp_path) -> None:
    np.save(tmp_path / "x.npy", np.full((5, 16, 16), 7))
    assert (Reader("channels", (16, 16), 5)(tmp_path / "x.npy") == 0).all()


def test_refusals(tmp_path, monkeypatch) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_classes=0)
    volumes(tmp_path)
    with pytest.raises(vt.VitreousError, match="unified_vit_small"):
        open_data(tmp_path, model, labelled=False)
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(vt.VitreousError, match=r"vitreous\[signals\]"):
        open_data(tmp_path, model, labelled=False)
