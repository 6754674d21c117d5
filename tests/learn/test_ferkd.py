"""Stored soft labels of crops, and how they are calibrated and mixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learning import pictures, vit
from support import GOLDENS

import vitreous as vt
from vitreous.learn import CropLabels, FerKD, label_crops
from vitreous.learn.ferkd import cut, restored
from vitreous.learn.written import augmentation


@pytest.fixture(scope="module")
def data():
    return pictures(16)


@pytest.fixture(scope="module")
def labels(data):
    return label_crops(vit(), data, crops=3, top=2)


def calibrated(data, sure):
    """Labels whose first class is `sure` of picture 0's three crops, and 0.9 of all others."""
    value = torch.full((16, 3, 2), 0.05)
    value[..., 0] = 0.9
    value[0, :, 0] = torch.tensor(sure)
    index = torch.tensor([2, 3]).expand(16, 3, 2)
    boxes = torch.tensor([[0, 0, 8, 8], [4, 4, 8, 8], [0, 8, 16, 8]]).expand(16, 3, 4)
    return CropLabels(boxes, torch.zeros(16, 3, dtype=torch.bool), index, value, data[1], 4)


def test_the_label_is_the_teachers_for_that_crop(labels, data):
    again = label_crops(vit(), data, crops=3, top=2)
    assert torch.equal(labels.boxes, again.boxes) and torch.equal(labels.value, again.value)
    with torch.no_grad():
        crop = cut(data[0][5], labels.boxes[5, 1], bool(labels.flips[5, 1]), (16, 16))
        p = vit()(crop[None]).softmax(1)[0]
    torch.testing.assert_close(p.topk(2).values, labels.value[5, 1])
    assert len({tuple(b.tolist()) for b in labels.boxes.flatten(0, 1)}) > 30


def test_dropped_calibrated_and_kept(data):
    rule = FerKD(calibrated(data, [0.1, 0.25, 0.8]), drop_below=0.2, calibrate_below=0.5, drop_above=0.95, smoothing=0.1)
    assert rule.shares() == pytest.approx({"dropped": 1 / 48, "calibrated": 1 / 48, "kept": 46 / 48, "too easy": 0})
    makes = rule.bound(vit(), data)
    torch.manual_seed(0)
    seen = [makes.labelled(data[0][0], 0) for _ in range(40)]
    found = {tuple(round(v, 4) for v in label.tolist()) for _, label in seen}
    soft = tuple(round(v, 4) for v in (0.075, 0.075, 0.8, 0.05))
    assert found == {(0.925, 0.025, 0.025, 0.025), soft}  # its own class smoothed, the teacher's word; never the dropped one
    hard = cut(data[0][0], torch.tensor([4, 4, 8, 8]), False, (16, 16))
    assert all(torch.equal(x, hard) == (label[0] > 0.9) for x, label in seen)
    everything = FerKD(calibrated(data, [0.1, 0.05, 0.08]), drop_below=0.2, calibrate_below=0.5).bound(vit(), data)
    assert all(
        torch.equal(everything.labelled(data[0][0], 0)[0], cut(data[0][0], torch.tensor([0, 0, 8, 8]), False, (16, 16)))
        for _ in range(5)
    )
    easy = FerKD(calibrated(data, [0.97, 0.99, 0.8]), drop_above=0.95).bound(vit(), data)
    third = cut(data[0][0], torch.tensor([0, 8, 16, 8]), False, (16, 16))
    assert all(torch.equal(easy.labelled(data[0][0], 0)[0], third) for _ in range(9))


def test_selfmix_stays_within_the_picture_and_mixes_labels_by_area(data):
    held = calibrated(data, [0.9, 0.9, 0.9])
    held = CropLabels(held.boxes, held.flips, torch.tensor([[0, 1], [1, 0], [2, 0]]).expand(16, 3, 2), held.value, held.truth, 4)
    makes, x = FerKD(held, selfmix=1.0).bound(vit(), data), torch.randn(3, 16, 16)
    crops = [cut(x, b, False, (16, 16)) for b in held.boxes[0]]
    torch.manual_seed(1)
    mixed = 0
    for _ in range(10):
        image, label = makes.labelled(x, 0)
        share = [float((image == c).all(0).float().mean()) for c in crops]
        assert sum(share) == pytest.approx(1, abs=1e-6) or max(share) == 1
        mixed += 0 < max(share) < 1
        torch.testing.assert_close(label.sum(), torch.tensor(1.0))
        if max(share) < 1:
            assert [round(v, 4) for v in label[:3].tolist()] == [
                round(0.9 * s + r, 4) for s, r in zip(share, rests(share), strict=True)
            ]
    assert mixed > 3


def rests(share):
    """What the other crops' labels give to each of the first three classes."""
    a, b, c = share
    return 0.05 * b + 0.05 * c, 0.05 * a + 0.025 * c, 0.025 * a + 0.025 * b


def test_a_student_learns_from_the_file_and_goes_on(labels, data, tmp_path):
    labels.save(tmp_path / "l.safetensors")
    read = CropLabels.load(tmp_path / "l.safetensors")
    assert str(read) == str(labels)
    rule = augmentation(f"FerKD(labels='{tmp_path / 'l.safetensors'}', selfmix=0.5)")
    settings = dict(epochs=2, batch=8, seed=1)
    once = vt.train(vit(), data, augment=rule, **settings)
    again = vt.train(vit(), data, augment=FerKD(labels, selfmix=0.5), **settings)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in once.state_dict().items())
    plain = vt.train(vit(), data, augment=FerKD(labels), **settings)
    assert not torch.equal(plain.head.weight, once.head.weight)


def test_refusals(labels, data, tmp_path):
    for match, refused in (
        ("must rise", lambda: FerKD(labels, drop_below=0.5)),
        ("other pictures", lambda: vt.train(vit(), pictures(12), augment=FerKD(labels), epochs=1, batch=4)),
        ("4 classes and the model 5", lambda: vt.train(vit(5), data, augment=FerKD(labels), epochs=1, batch=4)),
        ("leave them out", lambda: vt.train(vit(), data, augment=FerKD(labels), mixup=0.2, epochs=1, batch=4)),
        ("one class each", lambda: label_crops(vit(), (data[0], None))),
        ("the teacher knows 2 classes", lambda: label_crops(vit(2), data)),
        ("cannot read labels of crops", lambda: FerKD(str(tmp_path / "none.safetensors"))),
        ("no parameter 'crops'", lambda: augmentation("FerKD(crops=3)")),
        ("needs 'labels'", lambda: augmentation("FerKD()")),
    ):
        with pytest.raises(vt.VitreousError, match=match):
            refused()


@pytest.mark.parametrize("rest", ["marginal", "renorm", "smoothing"])
def test_the_released_restoring_of_stored_labels(rest):
    held = np.load(GOLDENS / "ferkd--fkd_top5.npz")
    index, value, wanted = (torch.from_numpy(held[k]) for k in ("index", "value", f"soft_{rest}"))
    torch.testing.assert_close(restored(index, value, 20, rest), wanted, atol=1e-10, rtol=1e-10)
