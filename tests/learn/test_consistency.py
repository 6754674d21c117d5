"""Token reduction consistency, term by term."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import small_vit
from torch import Tensor, nn

from vitreous import VitreousError, slim
from vitreous.learn import token_reduction_consistency
from vitreous.tokens import MCTF, EViT
from vitreous.tokens.mctf import FuseByCriteria


@pytest.fixture
def model() -> nn.Module:
    return slim(small_vit(), MCTF(r=4))


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(6)


def loss(model: nn.Module, images: Tensor, labels: Tensor, seed: int = 1, **options: float) -> Tensor:
    return token_reduction_consistency(model, images, labels, generator=torch.Generator().manual_seed(seed), **options)


def test_the_three_terms(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    drawn = int(torch.randint(8, (1,), generator=torch.Generator().manual_seed(1)))
    assert drawn != 4
    with torch.no_grad():
        total, bare = loss(model, images, labels, threshold=0.1), loss(model, images, labels, weight=0.0)
        other = slim(small_vit(), MCTF(r=drawn))
        torch.testing.assert_close(bare, F.cross_entropy(model(images), labels) + F.cross_entropy(other(images), labels))
        sure = model(images).softmax(-1)[torch.arange(6), labels] > 0.1
        assert 0 < sure.sum() < 6
        ours, theirs = (m.forward_features(images)[:, 0] for m in (model, other))
        apart = (ours - theirs).square().mean(1)[sure].mean()
    assert apart > 0
    torch.testing.assert_close(total - bare, 3 * apart, atol=1e-4, rtol=1e-4)


def test_the_other_side_is_a_fixed_target(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Where nobody is sure there is no consistency, and its gradient pulls only what was run with the model's own r."""
    with torch.no_grad():
        torch.testing.assert_close(loss(model, images, labels, threshold=1.0), loss(model, images, labels, weight=0.0))
    seen: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda _, __, out: (out.retain_grad(), seen.append(out))[0])
    with_, without = [], []
    for weight, grads in ((3.0, with_), (0.0, without)):
        seen.clear()
        loss(model, images, labels, weight=weight, threshold=0.0).backward()
        grads += [t.grad for t in seen]
    hook.remove()
    torch.testing.assert_close(with_[0], without[0])
    assert not torch.allclose(with_[1], without[1])


def test_r_is_drawn_and_put_back(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    with torch.no_grad():
        assert len({round(float(loss(model, images, labels, seed)), 4) for seed in range(12)}) > 3
        assert torch.equal(loss(model, images, labels, 1), loss(model, images, labels, 1))
        assert torch.isfinite(loss(model, images, labels, r_max=0.15))
    assert {m.r for m in model.modules() if isinstance(m, FuseByCriteria)} == {4}
    with pytest.raises(RuntimeError):
        loss(model, images[:, :2], labels)
    assert {m.r for m in model.modules() if isinstance(m, FuseByCriteria)} == {4}


def test_it_trains(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        value = loss(model, images, labels, step)
        value.backward()
        optimizer.step()
        losses.append(float(value))
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


def test_refusals(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(VitreousError, match="r_max must be above 0"):
        loss(model, images, labels, r_max=0)
    with pytest.raises(VitreousError, match=r"slim\(model, MCTF"):
        loss(slim(small_vit(), EViT()), images, labels)
    with pytest.raises(VitreousError, match="timm model"):
        loss(nn.Flatten(), images, labels)
