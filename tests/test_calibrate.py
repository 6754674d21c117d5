"""Calibration images: every form that people hold them in is the same tensor, and what cannot be right is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import small_vit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vitreous as vt
from vitreous.calibrate import MOST, images


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit(depth=1)  # mean and std 0.5: its preparation gives −1 … 1


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


Y = torch.arange(6)
FORMS: dict[str, Any] = {
    "tensor": lambda x: x,
    "double": lambda x: x.double(),
    "array": lambda x: x.numpy(),
    "list of images": list,
    "list of arrays": lambda x: [i.numpy() for i in x],
    "list of batches": lambda x: list(x.split(4)),
    "list of pairs": lambda x: list(zip(x, Y, strict=True)),
    "images and labels": lambda x: (x, Y),
    "iterable": lambda x: (b for b in x.split(4)),
    "loader": lambda x: DataLoader(TensorDataset(x, Y), 4),
    "set": lambda x: TensorDataset(x, Y),
    "loader of images": lambda x: DataLoader(list(x), 4),
    "mapping": lambda x: {"pixel_values": x},
    "mappings": lambda x: [{"label": 0, "image": b} for b in x.split(4)],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_tensor(form: str, model: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = images(model, FORMS[form](x))
    assert made.dtype == torch.float32 and torch.equal(made, x)


def test_a_data_set_gives_its_pictures() -> None:
    model = vt.open()
    data = vt.data.open_data("sample", model, limit=40)
    assert torch.equal(images(model, data), data.tensor(range(40)))


def test_an_endless_iterable_ends(model: nn.Module, x: Tensor) -> None:
    def forever() -> Any:
        while True:
            yield x

    with pytest.warns(UserWarning, match="only 6 of 1024 images differ"):
        assert len(images(model, forever())) == MOST


REFUSED: dict[str, tuple[Any, str]] = {
    "one image": (lambda x: x[0], r"\[N, C, H, W\], not \[3, 32, 32\]"),
    "five dimensions": (lambda x: x[None], r"\[N, C, H, W\]"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), "channels come first"),
    "grey": (lambda x: x[:, :1], r"does not run on images \[6, 1, 32, 32\], it is made for \[3, 32, 32\]"),
    "another size": (lambda x: x[..., :24], r"made for \[3, 32, 32\]"),
    "bytes": (lambda x: ((x + 1) * 127).byte(), "uint8: give floats"),
    "integers": (lambda x: [((i + 1) * 127).long().numpy() for i in x], "int64: give floats"),
    "raw": (lambda x: (x + 1) * 127.5, "not prepared for VisionTransformer: they lie in .* … 255, its preparation"),
    "raw and whole": (lambda x: ((x + 1) * 7).round(), "not prepared"),  # dark pictures
    "NaN": (lambda x: torch.where(x > 0.99, torch.nan, x), "NaN or infinity"),
    "black": (lambda x: torch.full_like(x, -1), "of one colour"),
    "none": (lambda x: x[:0], "no calibration images"),
    "an empty list": (lambda x: [], "no calibration images"),
    "sizes": (lambda x: [x[0], x[1, :, :16]], "of one size"),
    "a path": (lambda x: "photos", "cannot be a str"),
    "numbers": (lambda x: [1.0, 2.0], "tensors or arrays, not float"),
    "a number": (lambda x: 3, "cannot be a int"),
    "labels alone": (lambda x: [{"label": x}], "no images under"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_right_is_refused(what: str, model: nn.Module, x: Tensor) -> None:
    make, reason = REFUSED[what]
    with pytest.raises(vt.VitreousError, match=reason):
        images(model, make(x))


ODD: dict[str, tuple[Any, str]] = {
    "not normalised": (lambda x: (x + 1) / 2, "not normalised"),
    "another preparation": (lambda x: x * 2.3, "not what VisionTransformer's own preparation makes"),
    "copies": (lambda x: x[:1].expand(6, -1, -1, -1), "copies of one"),
    "a black one": (lambda x: torch.cat((x, -torch.ones_like(x[:1]))), "1 of 7 images are of one colour"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_odd_is_told(what: str, model: nn.Module, x: Tensor) -> None:
    make, reason = ODD[what]
    with pytest.warns(UserWarning, match=reason):
        images(model, make(x))


def test_another_size_is_odd_where_the_model_takes_it(x: Tensor) -> None:
    with pytest.warns(UserWarning, match="24 × 32, the model's own preparation gives 32 × 32"):
        images(small_vit(depth=1, dynamic_img_size=True), x[..., :24, :])


class Prepares(nn.Module):
    """Pixels 0 … 255 in, as a model that holds its own preparation takes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels / 127.5 - 1)


def test_what_counts_is_what_reaches_the_model_inside(model: nn.Module, x: Tensor) -> None:
    pixels = (x + 1) * 127.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(images(Prepares(model), pixels), pixels)
        bare = small_vit(depth=1)
        bare.pretrained_cfg = {}  # nobody tells: the first layer's input is looked at
        images(Prepares(bare), pixels)
    with pytest.raises(vt.VitreousError, match="usual preparations give"):
        images(bare, pixels)
    with pytest.raises(vt.VitreousError, match="its preparation"):
        images(nn.Sequential(nn.Identity(), model), pixels)


def test_looking_changes_nothing(x: Tensor) -> None:
    model = small_vit(depth=1).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images(model, x)
    assert all(m.training for m in model.modules()) and not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_slim_takes_every_form_and_tells_once(x: Tensor) -> None:
    model, steps = small_vit(depth=1), [vt.prune.Heads(share=0.34), vt.quant.MinMax()]
    expected = vt.slim(model, steps, x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        small = vt.slim(model, steps, (b for b in x.split(4)))
        vt.slim(model, steps, x * 2)
    assert torch.equal(small(x), expected(x))
    assert sum("own preparation" in str(w.message) for w in told) == 1
    with pytest.raises(vt.VitreousError, match="not prepared"):
        steps[1].apply(model, (x + 1) * 127.5)
