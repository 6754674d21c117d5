"""A CNN and a ViT that teach each other where each is better."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from learning import pictures, vit
from torch import nn

import vitreous as vt
from vitreous.learn.collaborate import better, pixel_wise, region_wise


def two(*shape):
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    return a, b, torch.randint(shape[1], (shape[0], *shape[2:]), generator=g)


def test_masks_are_complementary_and_swapping_students_swaps_them():
    a, b, y = two(2, 5, 8, 8)
    for regions in (None, 4):
        who = better(a, b, y, regions)
        assert torch.equal(who, -better(b, a, y, regions)) and set(who.unique().tolist()) == {-1, 1}
        assert not better(a, a, y, regions).any()
    own = F.cross_entropy(a, y, reduction="none")[0, :2, :2].mean() < F.cross_entropy(b, y, reduction="none")[0, :2, :2].mean()
    assert (better(a, b, y, 4)[0, 0, 0] > 0) == own


@pytest.mark.parametrize("loss", [pixel_wise, region_wise])
def test_the_worse_learns_and_the_better_stands_still(loss):
    a, b, _ = two(2, 5, 4, 4)
    who = torch.tensor([[1.0, -1.0], [0.0, 1.0]], dtype=torch.float64).repeat(2, 2, 2)
    value = loss(a, b, who)
    torch.testing.assert_close(value, loss(b, a, -who))
    assert float(loss(a, a, who).detach()) == pytest.approx(0, abs=1e-12)
    value.backward()
    moved_a, moved_b = a.grad.abs().sum(1) > 0, b.grad.abs().sum(1) > 0
    assert torch.equal(moved_a, who < 0) and torch.equal(moved_b, who > 0)
    with torch.no_grad():
        step = loss(a - 0.1 * a.grad, b - 0.1 * b.grad, who)
    assert step < value


def test_pixel_wise_is_the_divergence_from_the_better():
    a, b, _ = two(2, 5, 3)
    p, q = a.softmax(1), b.softmax(1)
    wanted = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(pixel_wise(a, b, torch.ones(2, 3)).double(), wanted, rtol=1e-5, atol=1e-6)
    p, q = ((z / 3).double().softmax(1) for z in (a, b))
    soft = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(pixel_wise(a, b, torch.ones(2, 3), tau=3.0).double(), soft, rtol=1e-5, atol=1e-6)


class Segmenter(nn.Module):
    """A trunk and a 1 × 1 convolution on its map."""

    def __init__(self, width, classes=3):
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.trunk = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU())
        self.out = nn.Conv2d(2 * width, classes, 1)

    def forward(self, x):
        return self.out(self.trunk(self.low(x)))


def test_a_segmentation_task_by_both():
    g = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (16, 4, 4), generator=g).repeat_interleave(4, 1).repeat_interleave(4, 2)
    x = F.one_hot(masks, 3).permute(0, 3, 1, 2).float() + 0.1 * torch.randn(16, 3, 16, 16, generator=g)
    torch.manual_seed(0)
    start = vt.learn.Students(Segmenter(8), Segmenter(12))
    objective = vt.learn.Collaborate(low=("low", "low"), high=("trunk", "trunk"), size=16)
    taught = vt.train(start, (x, masks), objective, vt.learn.AdamW(lr=1e-2), epochs=20, batch=8, augment=None)
    right = lambda m: (F.interpolate(m(x), size=(16, 16)).argmax(1) == masks).float().mean()
    assert all(right(m) > 0.8 > right(s) for m, s in ((taught.cnn, start.cnn), (taught.vit, start.vit)))
    assert taught.state_dict().keys() == start.state_dict().keys()


def students(classes=4):
    torch.manual_seed(3)
    return vt.learn.Students(timm.create_model("resnet18", num_classes=classes, channels=(8, 8, 8, 16)), vit())


def test_images_with_one_label_are_pixels():
    x, y = pictures(16)
    taught = vt.train(students(), (x, y), vt.learn.Collaborate(), epochs=1, batch=8, augment=None)
    assert taught.eval()(x).shape == (16, 4)
    for model, match in ((vit(), "two students"), (students(5), "two of the same classes")):
        with pytest.raises(vt.VitreousError, match=match):
            vt.train(model, (x, y), vt.learn.Collaborate(), epochs=1, batch=8, augment=None)
