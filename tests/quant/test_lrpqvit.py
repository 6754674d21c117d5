"""LRP-QViT: who gets the bits, and what is clipped."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from support import error, small_vit
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.quant.calibration import watch
from vitreous.quant.layers import LogSqrt2, Quantizer, quant_layers
from vitreous.quant.lrpqvit import LRPQViT, _units, allocate, clipped_grids, layer_relevance
from vitreous.quant.posttraining import norm_readers, survey
from vitreous.quant.reparameterization import channel_grids
from vitreous.steps import history_of, make_step


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit(depth=2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class TestAllocation:
    def test_by_hand(self) -> None:
        """Equal layers. A bit more leaves a quarter of the noise, a bit less makes it four times as much."""

        def chosen(*scores: float) -> list[int]:
            return allocate([*scores], [10] * len(scores), [10] * len(scores), (4, 4), [-1, 0, 1])

        # 1 up and 1 down costs 25 + 9 bit operations for 16 + 16: a third unit has to pay for it as well.
        assert chosen(0.9, 0.05) == [0, 0]
        assert chosen(0.05, 0.9, 0.05) == [-1, 1, -1]  # 0.675 won for 0.3 lost
        assert chosen(0.3, 0.9, 0.3) == [0, 0, 0]  # 0.675 for 1.8
        # A layer that is small pays little: it may have more however little it matters.
        assert allocate([0.1, 0.5, 0.0], [1, 100, 2], [1, 100, 2], (4, 4), [-1, 0, 1]) == [1, 0, -1]
        # Each budget holds by itself: what is stored is not paid for by operations, nor they by it.
        assert allocate([1.0, 0.0], [100, 1], [1, 100], (4, 4), [-1, 0, 1])[0] == 0
        assert allocate([1.0, 0.0], [1, 100], [100, 1], (4, 4), [-1, 0, 1])[0] == 0

    def test_against_all_ways(self) -> None:
        g = torch.Generator().manual_seed(0)
        scores = (torch.rand(7, generator=g) ** 3).tolist()
        weights = [3, 5, 0, 2, 7, 0, 4]
        operations = [30, 50, 20, 20, 70, 25, 4]

        def worth(way: tuple[int, ...]) -> float:
            if sum(n * d for n, d in zip(weights, way, strict=True)) > 0:
                return -1e9
            bits = [((5 if n else 6) + d) * (6 + d) for n, d in zip(weights, way, strict=True)]
            usual = [(5 if n else 6) * 6 for n in weights]
            if sum(o * (b - u) for o, b, u in zip(operations, bits, usual, strict=True)) > 0:
                return -1e9
            return -sum(s * 4.0**-d for s, d in zip(scores, way, strict=True))

        best = max(worth(way) for way in itertools.product((-1, 0, 1), repeat=7))
        found = tuple(allocate(scores, weights, operations, (5, 6), [-1, 0, 1]))
        assert worth(found) == pytest.approx(best, abs=1e-3) and best > worth((0,) * 7) + 0.05

    def test_in_a_model(self, model: nn.Module, images: Tensor) -> None:
        small = LRPQViT(4, 4).apply(model, images)
        bits = {n: (m.quant_w.bits, m.quant_x.bits) for n, m in quant_layers(small).items()}
        assert len({w for w, _ in bits.values()}) > 1 and {w for w, _ in bits.values()} <= {3, 4, 5}
        assert bits["patch_embed.proj"][1] == 8
        products = {o.bits for b in small.blocks for o in b.attn.operands.values()}
        assert products <= {3, 4, 5}
        stored = sum(m.weight.numel() * m.quant_w.bits for m in quant_layers(small).values())
        assert stored <= 4 * sum(m.weight.numel() for m in quant_layers(small).values())
        assert "mixed by layer" in small.simulated
        fixed = LRPQViT(4, 4, mixed=False).apply(model, images)
        assert {m.quant_w.bits for m in quant_layers(fixed).values()} == {4}

    @pytest.mark.parametrize(("quiet", "loud"), [(1, 0), (0, 1)])  # equal relevances would choose the same in both
    def test_relevance_decides(self, quiet: int, loud: int, model: nn.Module, images: Tensor) -> None:
        """A block whose branches are silent carries nothing, and gives its bits away."""
        silent = copy.deepcopy(model)
        with torch.no_grad():
            for layer in (silent.blocks[quiet].attn.proj, silent.blocks[quiet].mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
        scores = layer_relevance(silent, images)
        assert scores["head"] == pytest.approx(1, abs=1e-3) and scores[f"blocks.{quiet}.mlp.fc2"] < 1e-4
        assert scores[f"blocks.{loud}.mlp.fc2"] > 1e-4
        small = LRPQViT(4, 4).apply(silent, images)
        assert {o.bits for o in small.blocks[quiet].attn.operands.values()} == {3}, "products too"
        bits = {n: m.quant_w.bits for n, m in quant_layers(small).items()}
        assert bits[f"blocks.{quiet}.mlp.fc2"] == 3 and bits[f"blocks.{loud}.mlp.fc2"] >= 4

    def test_what_the_budgets_count(self, model: nn.Module, images: Tensor) -> None:
        layers = survey(model, images[:1])
        found = {u.names[0]: (u.weights, u.operations) for u in _units(model, images[:1], layers)}
        assert found["patch_embed.proj"] == (48 * 192, 16 * 48 * 192) and found["head"] == (48 * 7, 48 * 7)
        assert found["blocks.0.mlp.fc1"] == (48 * 192, 17 * 48 * 192)
        assert found["blocks.0.attn.qk"] == found["blocks.1.attn.av"] == (0, 17 * 17 * 3 * 16)

    def test_layers_of_one_norm_have_the_same_bits(self, images: Tensor) -> None:
        gated = small_vit(depth=3, mlp_layer=timm.layers.SwiGLU)
        small = LRPQViT(4, 4).apply(gated, images)
        for inputs in norm_readers(small).values():
            assert len({layer.quant_x.bits for layer in inputs.values()}) == 1


class TestClipping:
    @pytest.fixture
    def wide(self) -> nn.Module:
        """One channel of each LayerNorm far wider than the rest, which the weights hardly read."""
        model = small_vit(depth=2)
        with torch.no_grad():
            for block in model.blocks:
                for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                    norm.weight[3] *= 40
                    norm.bias[5] += 6
                    layer.weight[:, 3] *= 0.3
        return model

    def test_only_the_widest_channels_lose_and_their_middle_stays(self, wide: nn.Module, images: Tensor) -> None:
        small = copy.deepcopy(wide)
        step = LRPQViT(4, 4, mixed=False)
        step.build(small, step.plan(small, images))
        readers = norm_readers(small)
        names = [next(iter(r)) for r in readers.values()]
        watches = watch(small, images, names, sample=True)
        clipped = 0
        for name, inputs in zip(names, readers.values(), strict=True):
            seen = watches[name]
            (s, z), (scale, zero) = clipped_grids(seen, list(inputs.values())), channel_grids(seen, 4)
            assert (s <= scale).all() and (s == scale).float().mean() >= 0.88
            assert (((7.5 - z) * s - (7.5 - zero) * scale).abs() <= 0.51 * s).all()
            clipped += int((s < scale).sum())
            eight = copy.deepcopy(next(iter(inputs.values())))
            eight.quant_x = Quantizer(8)
            assert torch.equal(clipped_grids(seen, [eight])[0], channel_grids(seen, 8)[0])
        assert clipped > 0

    def test_it_helps(self, wide: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        others = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        ours = error(LRPQViT(4, 4, mixed=False).apply(wide, images), wide, others)
        monkeypatch.setattr("vitreous.quant.lrpqvit.WIDEST", (1.0,))
        assert ours < error(LRPQViT(4, 4, mixed=False).apply(wide, images), wide, others)


def test_eight_bits_are_uniform_and_deployable(model: nn.Module, images: Tensor) -> None:
    small = LRPQViT().apply(model, images)
    assert not getattr(small, "simulated", None) and LRPQViT().deployable
    assert history_of(small).done[0][1]["bits"] == {} and error(small, model, images) < 0.08
    assert all(o.bits == 8 for b in small.blocks for o in b.attn.operands.values() if isinstance(o, Quantizer))


def test_fewer_bits_cost_more(model: nn.Module, images: Tensor) -> None:
    errors = [error(LRPQViT(b, b).apply(model, images), model, images) for b in (8, 6, 4)]
    assert errors == sorted(errors)
    assert isinstance(LRPQViT(6, 6).apply(model, images).blocks[0].attn.operands["probs"], LogSqrt2)


def test_plan_alone_rebuilds_the_model(model: nn.Module, images: Tensor) -> None:
    step = LRPQViT(4, 4)
    small = step.apply(model, images)
    again = copy.deepcopy(model).eval()
    step.build(again, history_of(small).done[-1][1])
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images), small(images))
        assert torch.equal(step.apply(model, images)(images), small(images))


def test_other_models(images: Tensor) -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1), num_classes=7
    ).eval()
    x = F.interpolate(images, size=(64, 64))
    small = LRPQViT(4, 4).apply(swin, x)  # nothing to propagate through: fixed bits
    assert {m.quant_w.bits for m in quant_layers(small).values()} == {4} and torch.isfinite(small(x)).all()
    for kind in ({"qkv_bias": False, "init_values": 0.1}, {"reg_tokens": 2, "global_pool": "avg"}):
        plain = small_vit(depth=2, **kind)
        assert torch.isfinite(LRPQViT(4, 4).apply(plain, images)(images)).all()


def test_what_cannot_be_weighed_says_what_to_do(model: nn.Module, images: Tensor) -> None:
    short = make_step("tokens.ToMe", r=2).apply(model)
    with pytest.raises(VitreousError, match="mixed=False"):
        LRPQViT(4, 4).apply(short, images)
    assert torch.isfinite(LRPQViT(4, 4, mixed=False).apply(short, images)(images)).all()
