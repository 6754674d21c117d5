"""Explanations and analytics of models from where people have them; `tests/families.py` has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, OwnViT, drawn
from support import small_vit
from torch import Tensor, nn

from vitreous import see
from vitreous.copies.own import still
from vitreous.errors import VitreousError
from vitreous.relevance import relevance

EVERY = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@EVERY
def test_relevance_of_every_family(name: str, x: Tensor) -> None:
    """All of it reaches the first block, and most of it the pixels, whatever the model calls on the way."""
    found = relevance(FAMILIES[name].make(), x, gradients=True)
    for tokens in (found.entering, found.leaving):
        torch.testing.assert_close(tokens.sum(1), torch.ones(2), rtol=0.02, atol=0)
    patches = found.entering[:, FAMILIES[name].prefix :].sum(1)
    assert (found.pixels.sum((1, 2, 3)) <= 1.001 * patches).all() and (found.pixels.sum((1, 2, 3)) > 0.3).all()
    whole = FAMILIES[name].prefix + 16
    maps = [a for a in found.attention.values() if a.shape[-2] > 1]
    assert [tuple(a.shape) for a in maps] == [(2, 3, whole, whole)] * 3 and found.attention.keys() == found.gradients.keys()


# ---- what is written in another way is the same


class Written(OwnViT):
    """`OwnViT` whose patches are cut by hand, whose norms, sums and products are written out."""

    def forward(self, x: Tensor) -> Tensor:
        cut = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        y = F.linear(cut, self.patchify.weight.flatten(1), self.patchify.bias)
        y = torch.cat([self.token.expand(len(x), -1, -1), y], 1)
        y += self.positions
        for block in self.trunk:
            y = block(y)
        return self.final(y)[:, 0] @ self.answers.weight.T + self.answers.bias


class WrittenAttention(nn.Module):
    def __init__(self, other: Any) -> None:
        super().__init__()
        self.h, self.prenorm, self.to_out = other.h, WrittenNorm(other.prenorm), other.to_out
        self.to_qkv = other.to_qkv

    def forward(self, x: Tensor) -> Tensor:
        made = torch.einsum("bnc,oc->bno", self.prenorm(x), self.to_qkv.weight) + self.to_qkv.bias
        q, k, v = made.unflatten(-1, (self.h, 3, -1)).permute(3, 0, 2, 1, 4)
        scores = torch.einsum("bhid,bhjd->bhij", q, k).div(q.shape[-1] ** 0.5)
        return self.to_out(torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2))


class WrittenNorm(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


def test_layers_written_out_have_the_same_relevance(x: Tensor) -> None:
    usual: Any = drawn(OwnViT())
    written: Any = Written().eval()
    written.load_state_dict(usual.state_dict())
    for block in written.trunk:
        block.mixer, block.ln = WrittenAttention(block.mixer), WrittenNorm(block.ln)
    torch.testing.assert_close(written(x), usual(x), atol=1e-5, rtol=1e-4)
    for published in (False, True):
        ours, theirs = (relevance(m, x, 3, gradients=True, published=published) for m in (written, usual))
        for part in ("pixels", "entering", "leaving"):
            a, b = getattr(ours, part), getattr(theirs, part)
            assert float((a - b).abs().max()) < 1e-3 * float(b.abs().max()), part
        for a, b in zip(ours.attention.values(), theirs.attention.values(), strict=True):
            assert float((a - b).abs().max()) < 1e-3 * float(b.abs().max())


WRAPPED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "subtracted and divided": lambda m, x: m((x - 0.1) / 0.9),
    "by channel": lambda m, x: m((x - torch.full((1, 3, 1, 1), 0.1)) / torch.full((1, 3, 1, 1), 0.9)),
    "multiplied and added": lambda m, x: m((x + -0.1) * (1 / 0.9)),
    "in place": lambda m, x: m(x.clone().sub_(0.1).div_(0.9)),
}


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.inner, x)


@pytest.mark.parametrize("how", WRAPPED)
def test_images_prepared_inside_are_explained_as_those_prepared_before(how: str, x: Tensor) -> None:
    model = small_vit(depth=2)
    right = relevance(model, (x - 0.1) / 0.9, 3)
    found = relevance(Wrapped(model, WRAPPED[how]), x, 3)
    torch.testing.assert_close(found.pixels, right.pixels, atol=1e-5 * float(right.pixels.max()), rtol=1e-3)


POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x[:, 1:].sum(dim=1) / 16,
    "kept": lambda x: x[:, 1:].mean(1, keepdim=True)[:, 0],
    "over two axes": lambda x: x[:, 1:].unflatten(1, (4, 4)).mean((1, 2)),
    "by a layer": lambda x: F.adaptive_avg_pool1d(x[:, 1:].mT, 1).flatten(1),
}


class Pooling(OwnViT):
    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool_by = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.patchify(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.trunk:
            x = block(x)
        return self.answers(self.pool_by(self.final(x)))


def test_ways_to_average(x: Tensor) -> None:
    right = relevance(drawn(Pooling(lambda x: x[:, 1:].mean(1))), x, 3).leaving
    for how, pool in POOLED.items():
        found = relevance(drawn(Pooling(pool)), x, 3).leaving
        torch.testing.assert_close(found, right, atol=0.05 * float(right.max()), rtol=0.05, msg=how)


REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "a call without a rule": (lambda m, x: m(F.interpolate(x, 32)), "no rule for 'interpolate'.*see.grad_cam"),
    "a part changed in place": (lambda m, x: m(_changed(x)), "relevance cannot follow.*see.grad_cam"),
    "products without a softmax": (lambda m, x: m(x) * (x.flatten(1) @ x.flatten(1).mT).diagonal()[:, None], "see.grad_cam"),
}


def _changed(x: Tensor) -> Tensor:
    x = x + 0
    x[:, 0].mul_(0.5)
    return x


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_followed_is_refused_with_a_way_out(why: str, x: Tensor) -> None:
    call, match = REFUSED[why]
    with pytest.raises(VitreousError, match=match):
        see.lrp(Wrapped(small_vit(depth=1), call), x, 1)


def test_streams_of_pairs_in_a_list_are_measured(x: Tensor) -> None:
    model: Any = FAMILIES["vit-pytorch"].make()
    found = see.artifacts(model, x)
    kept: list[Tensor] = []
    handle = model.transformer.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0][:, 1:].norm(dim=-1)))
    with torch.no_grad():
        model(x)
    handle.remove()
    assert found.norms[2, -1] == pytest.approx(float(kept[0].amax(1).mean()), rel=1e-4)


@pytest.mark.parametrize("how", ["whole", "in place"])
def test_a_compiled_model_is_copied_as_it_is_written(how: str, x: Tensor) -> None:
    model: Any = small_vit(depth=2)
    right = see.rollout(model, x)
    compiled: Any = torch.compile(model, backend="eager")
    if how == "in place":
        compiled = model
        model.compile(backend="eager")
    with still(compiled) as own:
        assert own is not compiled and not any(type(m).__name__ == "OptimizedModule" for m in own.modules())
        assert all(m._compiled_call_impl is None for m in own.modules())
    torch.testing.assert_close(see.rollout(compiled, x), right)
