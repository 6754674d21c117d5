"""WebDataset shards: what is in them, what is skipped, and that training reads them in an order that only the seed decides."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from webdataset.writer import ShardWriter

import vitreous as vt
from vitreous.data import open_data, training_data
from vitreous.data.shards import in_windows
from vitreous.learn.batches import planned


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Two shards of 24 pictures, a third of a class each, written by the library; one picture is broken."""
    pattern = str(tmp_path / "shards-%04d.tar")
    with ShardWriter(pattern, maxcount=24, verbose=0) as sink:
        for i in range(48):
            file = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 100, (16, 16, 3)) + 50 * np.eye(3, dtype=int)[i % 3]
            Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
            sink.write({"__key__": f"{i:06d}", "png": file.getvalue() if i != 30 else b"no picture", "cls": i % 3})
    return str(tmp_path / "shards-{0000..0001}.tar")


def model() -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **size)


def test_pictures_classes_and_what_is_broken(shards: str) -> None:
    data = open_data(shards, model())
    assert len(data) == 47 and data.classes == ("0", "1", "2")
    assert [Path(s.path).name for s in data.skipped] == ["000030.png"] and "shards-0001.tar" in data.skipped[0].path
    for i in range(47):
        pixels = np.asarray(data.picture(i), float).mean((0, 1))
        assert pixels.argmax() == data.labels[i]
    assert data.shards is not None and np.bincount(data.shards).tolist() == [24, 23]
    learn, check = training_data(shards, model())
    assert len(learn) + len(check) == 47 and learn.shards is not None
    one = open_data(shards.replace("{0000..0001}", "0001"), model())
    assert len(one) == 23 and len(open_data(shards.replace("{0000..0001}", "*"), model())) == 47


def test_shards_cut_off_missing_and_of_another_kind(shards: str, tmp_path: Path) -> None:
    last = tmp_path / "shards-0001.tar"
    last.write_bytes(last.read_bytes()[:20_000])
    data = open_data(shards, model())
    assert 24 < len(data) < 47 and any("cut off here" in s.reason for s in data.skipped)
    with pytest.raises(vt.VitreousError, match=r"no shard .*shards-0002.tar: 1 of the 3"):
        open_data(shards.replace("0001}", "0002}"), model())
    last.write_bytes(b"not a tar file" * 100)
    with pytest.raises(vt.VitreousError, match="no tar file"):
        open_data(shards, model())


def test_an_epoch_goes_from_shard_to_shard() -> None:
    """Each picture once, shards in a drawn order and in windows; two epochs, seeds and processes."""
    lie = np.repeat(np.arange(10), 20)
    order = in_windows(lie, np.random.default_rng(1), window=40)
    assert sorted(order) == list(range(200))
    near = [set(lie[order[i : i + 40]].tolist()) for i in range(0, 200, 40)]
    assert all(len(some) == 2 for some in near) and near != [{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}]
    assert len(set(lie[order[:40]][:20].tolist())) == 2  # mixed within the window
    plan = planned(200, 20, None, 2, 2, 7, lie)
    epochs = [[i for s in range(first, first + 10) for p in range(2) for i in plan.indices(s, p)[1]] for first in (0, 10)]
    assert all(sorted(e) == list(range(200)) for e in epochs) and epochs[0] != epochs[1]


def test_training_on_shards_goes_on_bit_for_bit(shards: str, tmp_path: Path) -> None:
    net, keys = model(), dict(epochs=2, batch=12, augment="shift", seed=3)
    data, _ = training_data(shards, net)
    whole = vt.train(net, data, **keys)

    class Killed(BaseException): ...

    def stop(_: str, share: float) -> None:
        if share > 0.4:
            raise Killed

    with pytest.raises(Killed):
        vt.train(net, data, **keys, out=tmp_path / "run", every=0.0, progress=stop)
    went_on = vt.train(net, training_data(shards, net)[0], **keys, out=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), went_on.state_dict().values(), strict=True))
    assert not torch.equal(vt.train(net, data, **{**keys, "seed": 4}).head.weight, whole.head.weight)
