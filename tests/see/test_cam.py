"""Class activation maps against their papers' equations."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_models import SMALL
from support import small_vit
from torch import Tensor, nn

from vitreous import see
from vitreous.errors import VitreousError


class Pooled(nn.Module):
    """Three channels of 3 × 2 places, averaged, then two classes: the score is linear in the places."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 3, 4, 4), nn.Linear(3, 2)
        with torch.no_grad():
            self.conv.bias.add_(1.0)
            self.fc.weight.copy_(scale * torch.tensor([[1.0, 0.5, -2.0], [2.0, -1.0, 0.5]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(1))


def test_grad_cam_pp_weighs_by_higher_derivatives_of_the_exponential_score(x: Tensor) -> None:
    """Eq. 10 and 19, with the derivatives taken one place at a time; the factor exp(score) of each picture divided out."""
    model = Pooled().double()
    x = x.double()
    a = model.conv(x).detach().requires_grad_()
    y = model.fc(a.mean((2, 3)))[:, 1].exp()
    expected = torch.zeros(2, 3, 2, dtype=torch.float64)
    for b, k in itertools.product(range(2), range(3)):
        weight = torch.zeros((), dtype=torch.float64)
        for i, j in itertools.product(range(3), range(2)):

            def slope(value: Tensor, at: tuple[int, int, int, int] = (b, k, i, j)) -> Tensor:
                return torch.autograd.grad(value, a, create_graph=True)[0][at]

            first = slope(y[b])
            second = slope(first)
            third = slope(second)
            alpha = second / (2 * second + a[b, k].sum() * third)
            weight = weight + alpha * first.relu()
        expected[b] += (weight / y[b] * a[b, k]).detach()
    ours = see.grad_cam_pp(model, x, 1, layer="conv")
    torch.testing.assert_close(ours.double(), expected.relu(), rtol=1e-4, atol=1e-6)
    assert ours.max() > 0


def test_grad_cam_pp_counts_small_gradients_like_large_ones(x: Tensor) -> None:
    """With small logits α is ½ and the map linear in them; a fixed number below the fraction drowns them."""
    small, smaller = (see.grad_cam_pp(Pooled(scale), x, 1, layer="conv") for scale in (1e-4, 1e-5))
    torch.testing.assert_close(small, 10 * smaller, rtol=1e-3, atol=0)
    assert small.max() > 0
    g = Pooled(1e-4).fc.weight[1] / 6
    assert (g.square() / (2 * g.square() + 1e-6) < 0.01).all(), "this is what the number makes of ½"


def test_layer_cam_weighs_each_place_by_its_own_positive_gradient(images: Tensor) -> None:
    model = small_vit(class_token=False, global_pool="avg")
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: object, out: Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    handle = model.blocks[-1].norm1.register_forward_hook(keep)
    model(images)[:, 2].sum().backward()
    handle.remove()
    assert kept[0].grad is not None
    expected = (kept[0].grad.relu() * kept[0]).sum(2).relu().view(6, 4, 4).detach()
    torch.testing.assert_close(see.layer_cam(model, images, 2), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(see.layer_cam(model, images, 2), see.grad_cam(model, images, 2), rtol=0.1)


def test_eigen_cam_finds_what_stands_out_whatever_the_class(x: Tensor) -> None:
    model = Pooled()
    x = 0.01 * x
    x[:, :, 4:8, 4:] += 3  # one of six places
    cam = see.eigen_cam(model, x, 0, layer="conv")
    assert (cam.flatten(1).argmax(1) == 3).all()
    assert (cam.flatten(1).topk(2).values[:, 1] < 0.2 * cam.amax((1, 2))).all(), "the other places are alike"
    torch.testing.assert_close(cam, see.eigen_cam(model, -x, 1, layer="conv"), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("method", [see.grad_cam, see.grad_cam_pp, see.layer_cam])
def test_a_layer_behind_the_last_attention_is_an_error_and_no_map_of_zeros(method, images: Tensor) -> None:
    with pytest.raises(VitreousError, match="after the last attention"):
        method(small_vit(), images, layer="blocks.3")


def test_of_several_stages_the_last_with_places_that_the_score_depends_on() -> None:
    """PVT's last stage gives a class token too, which alone is read."""
    small = SMALL["pvt"]
    model, x = small.make(), small.images()
    maps = see.grad_cam(model, x)
    torch.testing.assert_close(maps, see.grad_cam(model, x, layer="stages.2"))
    assert maps.shape == (2, 4, 4)
    with pytest.raises(VitreousError, match=r"another layer|an earlier layer"):
        see.grad_cam(model, x, layer="stages.3")
