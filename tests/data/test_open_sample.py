from __future__ import annotations

import numpy as np
import pytest
import torch

from vitreous.data import calibration, open_data
from vitreous.data.fashion import CLASSES, SAMPLE, fashion_arrays, sample_arrays
from vitreous.errors import VitreousError
from vitreous.models.bundled import MEAN, STD

try:
    FASHION = fashion_arrays("test") + fashion_arrays("train")
except VitreousError:
    FASHION = None
needs_fashion = pytest.mark.skipif(FASHION is None, reason="no local copy of Fashion-MNIST")


def test_the_sample_is_small_and_free_of_pickles() -> None:
    assert SAMPLE.stat().st_size < 1_500_000
    assert (SAMPLE.parent / "NOTICE").read_text().count("Zalando")
    with np.load(SAMPLE, allow_pickle=False) as arrays:
        assert {k: (v.shape, v.dtype.name) for k, v in arrays.items()} == {
            "test_images": ((1000, 28, 28), "uint8"),
            "test_labels": ((1000,), "uint8"),
            "train_images": ((256, 28, 28), "uint8"),
            "train_labels": ((256,), "uint8"),
            "train_index": ((256,), "int32"),
        }


@needs_fashion
def test_the_sample_is_the_official_data() -> None:
    assert FASHION is not None
    test_images, test_labels, train_images, train_labels = FASHION
    with np.load(SAMPLE, allow_pickle=False) as arrays:
        assert (arrays["test_images"] == test_images[:1000]).all()
        assert (arrays["test_labels"] == test_labels[:1000]).all()
        assert len(set(arrays["train_index"].tolist())) == 256
        assert (arrays["train_images"] == train_images[arrays["train_index"]]).all()
        assert (arrays["train_labels"] == train_labels[arrays["train_index"]]).all()


def test_the_train_pictures_are_balanced_and_none_is_a_test_picture() -> None:
    train, labels = sample_arrays("train")
    test, _ = sample_arrays("test")
    assert set(np.bincount(labels)) == {25, 26}
    assert not {p.tobytes() for p in train} & {p.tobytes() for p in test}


def test_open_sample() -> None:
    data = open_data("sample")
    assert (data.name, data.classes, len(data), data.skipped, data.note) == ("sample", CLASSES, 1000, [], "")
    assert data.labels.dtype == np.int64 and data.labels.shape == (1000,)
    assert data.labels[:5].tolist() == [9, 2, 1, 1, 6]  # ankle boot, pullover, trouser, trouser, shirt
    images, _ = sample_arrays("test")
    expected = (torch.from_numpy(images[:3]).float()[:, None] / 255 - MEAN[0]) / STD[0]
    torch.testing.assert_close(data.tensor([0, 1, 2]), expected)
    picture = data.picture(2)
    assert (picture.mode, picture.size) == ("L", (28, 28))
    assert (np.asarray(picture) == images[2]).all()


def test_batches_cover_everything_in_the_same_order() -> None:
    data = open_data("sample", limit=70)
    assert len(data) == 70
    first, second = list(data.batches(32)), list(data.batches(32))
    assert [len(x) for x, _ in first] == [32, 32, 6]
    assert first[0][0].shape == (32, 1, 28, 28) and first[0][0].dtype == torch.float32 and first[0][1].dtype == torch.int64
    for (x, y), (u, v) in zip(first, second, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    assert torch.cat([y for _, y in first]).tolist() == data.labels.tolist()
    assert torch.equal(torch.cat([x for x, _ in first]), data.tensor(range(70)))
    assert [len(y) for _, y in data.batches(32, limit=40)] == [32, 8]
    assert [len(y) for _, y in data.batches(64, limit=500)] == [64, 6]


def test_calibration_is_drawn_by_seed_from_the_train_pictures() -> None:
    x = calibration("sample", n=40, seed=3)
    assert x.shape == (40, 1, 28, 28) and x.dtype == torch.float32
    assert torch.equal(x, calibration("sample", n=40, seed=3))
    assert not torch.equal(x, calibration("sample", n=40, seed=4))
    images, labels = sample_arrays("train")
    where = {p.tobytes(): int(y) for p, y in zip(images, labels, strict=True)}
    back = ((x[:, 0] * STD[0] + MEAN[0]) * 255).round().to(torch.uint8).numpy()
    assert np.bincount([where[p.tobytes()] for p in back]).tolist() == [4] * 10  # a KeyError: not a train picture


@pytest.mark.parametrize("n", [0, -1, 257])
def test_calibration_refuses_a_number_it_cannot_give(n: int) -> None:
    with pytest.raises(VitreousError, match="256" if n > 0 else "at least 1"):
        calibration("sample", n=n)


def test_limit_must_be_positive() -> None:
    with pytest.raises(VitreousError, match="at least 1"):
        open_data("sample", limit=0)
