"""Walking a quantized model part by part."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from support import small_vit
from torch import Tensor, nn

from vitreous.quant import MinMax
from vitreous.quant import reconstruction as module
from vitreous.quant.layers import Quantizer, QuantLinear, quant_layers
from vitreous.quant.reconstruction import Faster, bake, descend, in_floats, keep_within, record, unchanged, units, walk
from vitreous.steps import slim
from vitreous.tokens import EViT
from vitreous.work import Work, working


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return small_vit(depth=2)


@pytest.fixture
def small(original: nn.Module, images: Tensor) -> nn.Module:
    return MinMax(4, 4).apply(original, images)


def test_units_run_in_order_and_cover_every_layer(small: nn.Module, images: Tensor) -> None:
    assert units(small, images[:1]) == ["patch_embed.proj", "blocks.0", "blocks.1", "head"]
    layers = units(small, images[:1], blocks=False)
    assert set(layers) == set(quant_layers(small))
    assert layers[:3] == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj"] and layers[-1] == "head"


def test_layers_where_blocks_give_up_tokens_or_are_not_plain(original: nn.Module, images: Tensor) -> None:
    small = slim(original, [EViT(keep=0.5, at=(0,)), MinMax(4, 4)], images)
    assert set(units(small, images[:1])) == set(quant_layers(small))
    sizes = dict(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    swin = MinMax(4, 4).apply(timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval(), images)
    assert set(units(swin, images[:1])) == set(quant_layers(swin))


def test_floats_are_the_original(small: nn.Module, original: nn.Module, images: Tensor) -> None:
    floats = in_floats(small)
    with torch.no_grad():
        assert torch.allclose(floats(images), original(images), atol=1e-5)
        assert not torch.allclose(small(images), original(images), atol=1e-2)


def test_a_record_is_what_the_module_reads_and_gives(small: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 5)
    x, y = record(small, "blocks.1", images)
    with torch.no_grad():
        assert x.shape == y.shape == (12, 17, 48) and torch.allclose(small.blocks[1](x), y, atol=1e-5)
        rest = small.forward_head(small.norm(y))
        assert torch.allclose(rest, small(images), atol=1e-4)
    assert not small.blocks[1]._forward_hooks


def test_a_walk_hands_each_unit_the_right_tensors(small: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES", 7)
    floats = in_floats(small)
    for own in (True, False):
        seen: list[nn.Module] = []

        def learn(unit: nn.Module, x: Tensor, y: Tensor, own: bool = own, seen: list[nn.Module] = seen) -> None:
            seen.append(unit)
            if unit is small.blocks[1]:
                given = record(small if own else floats, "blocks.1", images[:7])[0]
                assert len(x) == 7 and torch.equal(x, given)
                assert torch.equal(y, record(floats, "blocks.1", images[:7])[1])

        told: list[float] = []
        with working(Work(told.append)):
            walk(small, floats, images, learn, "a", own_inputs=own, done=(0.5, 1.0))
        assert len(seen) == 4 and told == [0.625, 0.75, 0.875, 1.0]


def test_layers_read_what_the_layers_before_them_learned(small: nn.Module, images: Tensor) -> None:
    floats, names = in_floats(small), {m: n for n, m in small.named_modules()}

    def learn(unit: nn.Module, x: Tensor, y: Tensor) -> None:
        torch.testing.assert_close(x, record(small, names[unit], images)[0])
        torch.testing.assert_close(y, record(floats, names[unit], images)[1])
        with torch.no_grad():
            next(unit.parameters()).mul_(1.1)

    walk(small, floats, images, learn, "a", blocks=False)


def test_a_stopped_walk_goes_on(small: nn.Module, images: Tensor, tmp_path: Path) -> None:
    floats, before = in_floats(small), small.head.bias.clone()

    def learn(unit: nn.Module, x: Tensor, y: Tensor) -> None:
        if unit is small.head:
            raise KeyboardInterrupt
        with torch.no_grad():
            next(unit.parameters()).add_(1)

    with working(Work(folder=tmp_path, key="k")), pytest.raises(KeyboardInterrupt):
        walk(small, floats, images, learn, "a")
    moved = small.blocks[0].state_dict()
    kept = {k: v.clone() for k, v in moved.items()}
    small.blocks[0].load_state_dict(floats.blocks[0].state_dict())

    again: list[nn.Module] = []
    with working(Work(folder=tmp_path, key="k")):
        walk(small, floats, images, lambda unit, x, y: again.append(unit), "a")
    assert again == [small.head] and torch.equal(small.head.bias, before)
    assert all(torch.equal(kept[k], v) for k, v in small.blocks[0].state_dict().items())


def test_descent_lowers_the_error_of_a_block_and_leaves_no_trace(small: nn.Module, images: Tensor) -> None:
    x, y = record(in_floats(small), "blocks.0", images)
    block = small.blocks[0]
    block.mlp.fc1.weight.requires_grad_(False)
    parameters = [layer.weight for layer in quant_layers(block).values()]
    frozen = block.norm1.weight.clone()
    with torch.no_grad():
        before = (block(x) - y).square().mean()
        descend(block, x, y, parameters, 40, 2e-3, 4)
        after = (block(x) - y).square().mean()
    assert after < 0.85 * before and torch.equal(frozen, block.norm1.weight)
    assert [p.requires_grad for p in parameters].count(False) == 1 and all(p.grad is None for p in block.parameters())


def far(limit: int | None = None) -> tuple[QuantLinear, Tensor]:
    """A layer and inputs for which far more is wanted than it gives."""
    torch.manual_seed(0)
    layer = QuantLinear(nn.Linear(6, 3), Quantizer(8), Quantizer(8, symmetric=True, limit=limit, channels=3))
    x = torch.randn(8, 6)
    layer.quant_x.set(*layer.quant_x.grid(*x.aminmax()))
    layer.quant_w.set(*layer.quant_w.grid(*layer.weight.detach().aminmax(dim=1)))
    return layer, x


def test_the_rate_falls_and_what_does_not_help_is_taken_back() -> None:
    layer, x = far()
    before = layer.bias.detach().clone()
    descend(layer, x, layer(x).detach() + 100, [layer.bias], 2, 0.1, 8)
    # Adam's first steps are as long as its rate: 0.1, then half of it, for of two iterations one is done.
    assert torch.allclose(layer.bias - before, torch.tensor(0.15), rtol=1e-2)
    after = layer.bias.detach().clone()
    descend(layer, x, layer(x).detach() + 0.1, [layer.bias], 1, 50.0, 8)
    assert torch.equal(layer.bias, after)


def test_learned_weights_stay_within_their_limit() -> None:
    layer, x = far(limit=63)
    descend(layer, x, 3 * layer(x).detach(), [layer.weight], 10, 0.1, 8)
    q = layer.weight.detach() / layer.quant_w.scale[:, None]
    assert q.abs().max() <= 63.001 and (q.abs() > 62.999).sum() > 6


def test_symmetric_weights_stay_within_their_limit() -> None:
    q = Quantizer(8, symmetric=True, limit=63, channels=2)
    q.set(torch.tensor([0.1, 1.0]), torch.zeros(2))
    weight = torch.tensor([[7.0, -9.0, 1.0], [70.0, -90.0, 1.0]])
    keep_within(weight, q)
    assert torch.allclose(weight, torch.tensor([[6.3, -6.3, 1.0], [63.0, -63.0, 1.0]]))
    q.watcher = unchanged
    weight *= 2
    doubled = weight.clone()
    keep_within(weight, q)
    assert torch.equal(weight, doubled), "floats may be as they like"


def test_baked_weights_change_nothing(small: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        before = small(images)
        bake(small)
        assert torch.allclose(before, small(images), atol=1e-4)
    assert all(len(row.unique()) <= 16 for row in small.head.weight)


@pytest.mark.parametrize("channels", (None, 8))
def test_learning_quantizes_as_torch_does_and_with_its_gradients(channels: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    quantizer = Quantizer(4, channels=channels)
    high = torch.rand(channels or (), generator=generator)
    quantizer.set(*quantizer.grid(-high / 2, high))
    x = torch.randn(8, 50, generator=generator, requires_grad=True)  # most of it is clipped, some is not
    expected = quantizer(x)
    with Faster():
        learned = quantizer(x)
    assert "OnGrid" in type(learned.grad_fn).__name__
    assert torch.equal(learned, expected)
    slopes = [torch.autograd.grad(out.square().sum(), x)[0] for out in (learned, expected)]
    assert torch.equal(*slopes) and 0 < slopes[0].count_nonzero() < x.numel()
