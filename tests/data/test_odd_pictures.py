from __future__ import annotations

import gzip
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import vitreous as vt
from vitreous import VitreousError
from vitreous.data import open_data
from vitreous.data.pictures import Unreadable, read_picture

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
RAMP16 = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)


def read(image: Image.Image, path: Path, **options: Any) -> np.ndarray:
    image.save(path, **options)
    picture = read_picture(path)
    assert picture.mode in ("L", "RGB")
    assert picture.size == read_picture(path, probe=True).size or path.suffix == ".jpg"
    return np.asarray(picture)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    expected = (RAMP16.astype(float) / 257).round()
    assert (read(Image.fromarray(RAMP16), tmp_path / "a.png") == expected).all()
    assert (read(Image.fromarray(RAMP16), tmp_path / "a.tif") == expected).all()
    assert (read(Image.fromarray(RAMP16.astype(np.int32)), tmp_path / "b.tif") == expected).all()  # mode I
    (tmp_path / "c.pgm").write_bytes(b"P5 16 16 65535\n" + RAMP16.astype(">u2").tobytes())
    assert (np.asarray(read_picture(tmp_path / "c.pgm")) == expected).all()


@pytest.mark.parametrize(
    "pixels", [np.full((4, 4), 70000, np.int32), np.full((4, 4), -1, np.int32), np.zeros((4, 4), np.float32)]
)
def test_pixels_of_unknown_scale_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(Unreadable, match="scale is unknown"):
        read_picture(tmp_path / "a.tif")


def test_grey_and_single_bit(tmp_path: Path) -> None:
    assert (read(Image.fromarray(RAMP), tmp_path / "a.png") == RAMP).all()
    assert (read(Image.fromarray(RAMP > 99), tmp_path / "b.png") == (RAMP > 99) * 255).all()


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    opaque, clear, half = (200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 128)
    rgba = Image.new("RGBA", (3, 1))
    for x, colour in enumerate((opaque, clear, half)):
        rgba.putpixel((x, 0), colour)
    expected = [[200, 0, 0], [255, 255, 255], [227, 127, 127]]
    np.testing.assert_allclose(read(rgba, tmp_path / "a.png")[0], expected, atol=1)
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (90, 255))
    assert read(grey, tmp_path / "b.png")[0].tolist() == [[255] * 3, [90] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert read(palette, tmp_path / "c.png")[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert read(palette, tmp_path / "d.png", transparency=1)[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert read(palette, tmp_path / "e.gif", transparency=1)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_cmyk(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image.save(tmp_path / "a.tif")
    assert np.asarray(read_picture(tmp_path / "a.tif"))[0, 0].tolist() == [255, 0, 0]
    np.testing.assert_allclose(read(image, tmp_path / "a.jpg", quality=95)[0, 0], [255, 0, 0], atol=8)


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    wide = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 16, 0).repeat(8, 1).repeat(2, 1))  # left half black
    shown = read(wide, tmp_path / "a.jpg", exif=exif)
    assert shown.shape == (32, 16)
    assert shown[:12].mean() < 20 and shown[20:].mean() > 235  # the left half is on top


def test_one_pixel_and_odd_modes_go_through_open_data(tmp_path: Path) -> None:
    images = {
        "one.png": Image.new("RGB", (1, 1), (9, 99, 199)),
        "sixteen.png": Image.fromarray(RAMP16),
        "rgba.png": Image.new("RGBA", (30, 20), (1, 2, 3, 40)),
        "cmyk.jpg": Image.new("CMYK", (16, 16)),
        "bit.png": Image.new("1", (16, 16)),
    }
    for c in ("a", "b"):
        (tmp_path / c).mkdir()
        for name, image in images.items():
            image.save(tmp_path / c / name)
    for size, transform in (((1, 28, 28), None), ((3, 16, 16), None)):
        model = type("Model", (), {"num_classes": 2, "pretrained_cfg": {"input_size": size}})()
        data = open_data(tmp_path, model, transform=transform)
        assert not data.skipped
        x = data.tensor(range(10))
        assert x.shape == (10, *size) and x.isfinite().all()
        assert data.picture(0).mode == ("L" if size[0] == 1 else "RGB")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [60_000, 9_700, 8_001])  # over Pillow's error limit, its warning limit, and ours
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    for c in ("a", "b"):
        (tmp_path / c).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / c / "good.png")
    (tmp_path / "a" / "bomb.png").write_bytes(png_header(side, side))
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter("always")
        data = open_data(tmp_path)
    assert not printed  # Pillow's own warning would stand beside the list of skipped files
    assert len(data) == 2
    assert [Path(s.path).name for s in data.skipped] == ["bomb.png"]
    assert "64 megapixels, not decoded" in data.skipped[0].reason


def test_a_thread_of_pixels_is_refused(tmp_path: Path) -> None:
    """A resize of its shorter side to 224 would make it 224 × 6,720,000."""
    Image.new("L", (30_000, 1)).save(tmp_path / "a.png")
    with pytest.raises(Unreadable, match="30000 x 1 pixels"):
        read_picture(tmp_path / "a.png")


def test_only_formats_that_decode_in_process(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with pytest.raises(Unreadable, match="known format"):
        read_picture(tmp_path / "a.eps")


def test_memory_is_bounded_by_what_the_pixels_take(tmp_path: Path) -> None:
    """Two megabytes of a 16-bit PNG with transparency would take over a gigabyte."""

    def png(path: Path, side: int, rows: int) -> Path:
        head = struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)
        packed = zlib.compress(bytes((side * 8 + 1) * rows), 1)
        chunks = ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b""))
        body = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
        return path

    with pytest.raises(Unreadable, match="MB of memory"):
        read_picture(png(tmp_path / "large.png", 6000, 1))
    small = png(tmp_path / "small.png", 1000, 1000)
    tell, told = os.pipe()
    if (child := os.fork()) == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = peak()
            assert read_picture(small).size == (1000, 1000)
            os.write(told, str(peak() - before).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(tell, 100)) < 1000 * 1000 * 17 + 2**23


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_data_can_be_pickled(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (40, 30), (i, 50, 90)).save(tmp_path / name / f"{i}.png")
    for source in ("sample", tmp_path):
        data = open_data(source, limit=4)
        again = pickle.loads(pickle.dumps(data))
        assert torch.equal(again.tensor([0, 1]), data.tensor([0, 1])) and again.picture(1) == data.picture(1)
        assert (again.labels == data.labels).all() and again.classes == data.classes
        x, y = data[3]
        assert torch.equal(x, data.tensor([3])[0]) and y == data.labels[3] and type(y) is int
        assert len(list(data)) == 4
        with pytest.raises(IndexError):
            data[4]
    loader = DataLoader(open_data("sample", limit=4), batch_size=2, num_workers=1, multiprocessing_context="fork")
    assert [tuple(x.shape) for x, _ in loader] == [(2, 1, 28, 28)] * 2


def test_archives_that_unpack_far_beyond_their_size(tmp_path: Path) -> None:
    bomb = tmp_path / "weights.pt"
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data.pkl", "w") as part,
    ):
        for _ in range(80):
            part.write(bytes(2**20))
    assert bomb.stat().st_size < 2**20
    with pytest.raises(VitreousError, match="would unpack"):
        vt.open("vit_tiny_patch16_224", checkpoint=bomb)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(10)))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(5 * 10**7), 1))
    with pytest.raises(VitreousError, match="unpacks to more"):
        open_data("fashion-mnist", root=tmp_path)
