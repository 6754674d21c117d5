"""RepQ and MinMax on models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from support import error, small_vit, uneven_vit
from torch import Tensor, nn

from vitreous.blocks import PlainBlock, traced
from vitreous.errors import VitreousError
from vitreous.quant import MinMax, RepQ
from vitreous.quant import posttraining as posttraining_module
from vitreous.quant.calibration import watch
from vitreous.quant.layers import LogSqrt2, QuantConv2d, Quantizer, QuantLinear, quant_layers
from vitreous.quant.posttraining import PostTraining, survey
from vitreous.quant.reparameterization import channel_grids, reparameterize
from vitreous.steps import history_of, slim
from vitreous.tokens import EViT, ToMe

BOTH = [MinMax, RepQ]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit(depth=2)


@pytest.fixture(scope="module")
def uneven() -> nn.Module:
    return uneven_vit()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def others() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def floats(model: nn.Module) -> nn.Module:
    """The same model with its quantizers switched off, whatever they are set to."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, (Quantizer, LogSqrt2)):
            m.watcher = lambda x: None
    return model


def rebuilt(step: PostTraining, model: nn.Module, small: nn.Module) -> nn.Module:
    again = copy.deepcopy(model).eval()
    step.build(again, history_of(small).done[-1][1])
    again.load_state_dict(small.state_dict())
    return again


@pytest.mark.parametrize("step", BOTH)
def test_eight_bits_cost_little(step: type[PostTraining], model: nn.Module, images: Tensor, others: Tensor) -> None:
    small = step(reduce_range=False).apply(model, images)
    assert 1e-4 < error(small, model, others) < 0.08
    assert 1e-4 < error(step(softmax=True).apply(model, images), model, others) < 0.08
    assert not getattr(small, "simulated", None)


@pytest.mark.parametrize("step", BOTH)
def test_fewer_bits_cost_more_and_are_called_simulated(
    step: type[PostTraining], model: nn.Module, images: Tensor, others: Tensor
) -> None:
    errors = []
    for weights, activations in ((8, 8), (6, 6), (4, 4)):
        small = step(weights, activations).apply(model, images)
        errors.append(error(small, model, others))
        assert bool(getattr(small, "simulated", "")) == (weights < 8)
        assert getattr(rebuilt(step(weights, activations), model, small), "simulated", "") == getattr(small, "simulated", "")
    assert errors == sorted(errors)
    for one in (step(weights=4), step(activations=4)):
        assert "bit" in one.apply(model, images).simulated


def test_everything_published_is_quantized(model: nn.Module, images: Tensor) -> None:
    small = RepQ(4, 4).apply(model, images)
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert set(quant_layers(small)) == layers and "head" in layers
    assert isinstance(small.patch_embed.proj, QuantConv2d) and small.patch_embed.proj.quant_x.bits == 8
    for block in small.blocks:
        o = block.attn.operands
        assert {n: (type(m), m.bits) for n, m in o.items()} == {
            "q": (Quantizer, 4), "k": (Quantizer, 4), "v": (Quantizer, 4), "probs": (LogSqrt2, 4),
        }  # fmt: skip


def test_what_is_deployable_lies_on_grids_that_runtimes_run(model: nn.Module, images: Tensor) -> None:
    small = RepQ(softmax=True).apply(model, images)
    for layer in quant_layers(small).values():
        assert (layer.quant_x.low, layer.quant_x.high) == (0, 255) and layer.quant_x.scale.ndim == 0
        assert layer.quant_w.symmetric and not layer.quant_w.zero_point.any()
    for block in small.blocks:
        o = block.attn.operands
        assert all(o[n].symmetric and o[n].zero_point == 0 for n in "qkv")
        assert isinstance(o["probs"], Quantizer) and o["probs"].scale == torch.tensor(1 / 255)
    product = RepQ().apply(model, images).blocks[0].attn.operands
    assert isinstance(product["probs"], nn.Identity) and isinstance(product["v"], nn.Identity)


@pytest.mark.parametrize("reduced", [False, True])
def test_weights_take_few_integers_on_our_scales(model: nn.Module, images: Tensor, reduced: bool) -> None:
    limit = 63 if reduced else 127
    small = RepQ(reduce_range=reduced).apply(model, images)
    for layer in quant_layers(small).values():
        with torch.no_grad():
            q = layer.quant_w(layer.weight).flatten(1) / layer.quant_w.scale[:, None]
        assert torch.allclose(q, q.round(), atol=1e-3) and (q.abs().amax(1).round() == limit).all()
    assert small.blocks[0].attn.operands["k"].limit == limit
    head = RepQ(4, 4).apply(model, images).head
    assert all(len(row.unique()) <= 16 for row in head.quant_w(head.weight))


def test_the_machine_decides_the_range_once(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for overflows in (True, False):
        monkeypatch.setattr(posttraining_module, "saturates", lambda overflows=overflows: overflows)
        small = MinMax().apply(model, images)
        assert history_of(small).done[0][1]["reduce_range"] is overflows
        monkeypatch.setattr(posttraining_module, "saturates", lambda overflows=overflows: not overflows)
        again = rebuilt(MinMax(), model, small)  # on another machine
        with torch.no_grad():
            assert torch.equal(small(images), again(images))
        assert again.head.quant_w.limit == (63 if overflows else 127)
    assert history_of(MinMax(4, 4, reduce_range=True).apply(model, images)).done[0][1]["reduce_range"] is False


@pytest.mark.parametrize("bits", [4, 8])
def test_reparameterization_keeps_the_function_and_gives_one_scale(uneven: nn.Module, images: Tensor, bits: int) -> None:
    step = RepQ(bits, bits)
    moved = copy.deepcopy(uneven)
    step.build(moved, step.plan(moved, images))
    readers = {layer.after: (name, layer) for name, layer in quant_layers(moved).items() if getattr(layer, "after", "")}
    assert set(readers) == {f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)}
    watches = watch(moved, images, [f"{name}.quant_x" for name, _ in readers.values()], sample=True)
    with torch.no_grad():
        spreads = []
        for norm, (name, layer) in readers.items():
            scale, zero = channel_grids(watches[f"{name}.quant_x"], bits)
            spreads.append(float(scale.max() / scale.min()))
            reparameterize(moved.get_submodule(norm), [layer], scale, zero)
        assert min(spreads) > 10, "the fixture must need it"
    assert error(floats(moved), uneven, images) < 1e-4
    after = watch(moved, images, [f"{name}.quant_x" for name, _ in readers.values()])
    for name, layer in readers.values():
        scale, zero = layer.quant_x.scale, layer.quant_x.zero_point
        assert scale.ndim == 0 and 0 <= zero < 2**bits
        seen = after[f"{name}.quant_x"]
        assert float((seen.high - seen.low).max() / (seen.high - seen.low).min()) < (1.02 if bits == 8 else 3)
        if bits == 8:  # exact ranges: every channel now fills the shared grid
            assert torch.allclose(seen.low / scale + zero, torch.zeros(48), atol=0.6)
            assert torch.allclose(seen.high / scale + zero, torch.full((48,), 255.0), atol=0.6)


def test_repq_beats_minmax_where_channels_differ(uneven: nn.Module, images: Tensor, others: Tensor) -> None:
    for bits, factor in ((4, 0.85), (6, 0.6)):
        repq, plain = RepQ(bits, bits).apply(uneven, images), MinMax(bits, bits).apply(uneven, images)
        assert error(repq, uneven, others) < factor * error(plain, uneven, others)


@pytest.mark.parametrize("step", BOTH)
def test_names_stay_and_the_file_is_enough(step: type[PostTraining], model: nn.Module, images: Tensor, others: Tensor) -> None:
    for bits in (8, 4):
        small = step(bits, bits).apply(model, images)
        assert set(model.state_dict()) < set(small.state_dict())
        with torch.no_grad():
            assert torch.equal(rebuilt(step(bits, bits), model, small)(others), small(others))


@pytest.mark.parametrize("step", BOTH)
def test_layers_without_bias_work(step: type[PostTraining], images: Tensor, others: Tensor) -> None:
    model = small_vit(depth=2, qkv_bias=False)
    with torch.no_grad():
        model.blocks[0].norm1.bias += 4
    small = step(reduce_range=False).apply(model, images)
    assert error(small, model, others) < 0.05
    with torch.no_grad():
        assert torch.equal(rebuilt(step(reduce_range=False), model, small)(others), small(others))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_channel_that_never_moves_is_no_trouble(images: Tensor, bits: int) -> None:
    model = small_vit(depth=2)
    with torch.no_grad():
        model.blocks[0].norm1.weight[:3] = 0
        model.blocks[0].norm1.bias[:3] = torch.tensor([0.0, 5.0, -300.0])
        model.blocks[1].mlp.fc1.weight[2] = 0
    small = RepQ(bits, bits, reduce_range=False).apply(model, images)
    assert all(torch.isfinite(v).all() for v in small.state_dict().values())
    assert error(small, model, images) < (0.05 if bits == 8 else 1.0)


def test_nan_inside_names_the_layer(model: nn.Module, images: Tensor) -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0 * 0

    broken = copy.deepcopy(model)
    broken.blocks[1].mlp.act = Bad()
    for step in (MinMax(), RepQ()):
        with pytest.raises(VitreousError, match=r"blocks\.1\.mlp\.fc2.*NaN"):
            step.apply(broken, images)


def test_refuses_what_makes_no_sense(model: nn.Module, images: Tensor) -> None:
    small = MinMax().apply(model, images)
    for step in (MinMax(), RepQ()):
        with pytest.raises(VitreousError, match="quantized already"):
            step.apply(small, images)
    for wrong in ({"weights": 1}, {"activations": 16}):
        with pytest.raises(VitreousError, match="2 to 8 bits"):
            RepQ(**wrong)
    with pytest.raises(VitreousError, match="needs calibration images"):
        RepQ().apply(model)


@pytest.mark.parametrize("step", BOTH)
def test_same_images_same_result_whatever_the_seed(step: type[PostTraining], model: nn.Module, images: Tensor) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    a = step(4, 4).apply(model, images).state_dict()
    torch.manual_seed(4)
    b = step(4, 4).apply(model, images).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(isinstance(m, (QuantLinear, PlainBlock)) for m in model.modules())


def test_batches_of_calibration_see_the_same_range(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    a = MinMax().apply(model, images).state_dict()
    monkeypatch.setattr("vitreous.quant.calibration.BATCH", 5)
    b = MinMax().apply(model, images).state_dict()
    assert all(torch.allclose(a[k].float(), b[k].float(), rtol=1e-4, atol=1e-6) for k in a)
    # A sample of the values gives nearly the same grids as all of them.
    full = RepQ(4, 4).apply(model, images).state_dict()
    monkeypatch.setattr("vitreous.quant.calibration.SAMPLES", 2**15)
    some = RepQ(4, 4).apply(model, images).state_dict()
    scales = [k for k in full if k.endswith("quant_x.scale")]
    assert all(torch.allclose(full[k], some[k], rtol=0.25) for k in scales)
    assert any(not torch.equal(full[k], some[k]) for k in scales)


@pytest.mark.parametrize("reducer", [EViT(keep=0.5, at=(0, 1)), ToMe(r=3)], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["reducer first", "quantizer first"])
@pytest.mark.parametrize("bits", [8, 4])
def test_token_steps_before_and_after(
    model: nn.Module, images: Tensor, others: Tensor, reducer: Any, first: bool, bits: int
) -> None:
    quantizer = RepQ(bits, bits, softmax=True, reduce_range=False)
    small = slim(model, [reducer, quantizer] if first else [quantizer, reducer], images)
    assert len(quant_layers(small)) == 10 and isinstance(small.blocks[0].attn.operands["probs"], (Quantizer, LogSqrt2))
    with traced(small) as trace, torch.no_grad():
        small(others)
    assert len(trace) == 2
    with torch.no_grad():
        assert torch.isfinite(small(others)).all() and small(others[:1]).shape == (1, 7)
    if bits == 8:  # a token near the threshold may fall to the other side, so not for every image
        reference = reducer.apply(model)
        with torch.no_grad():
            off = (small(others) - reference(others)).norm(dim=1) / reference(others).norm(dim=1)
        assert off.median() < 0.05


def test_pruned_heads_keep_their_shapes(images: Tensor) -> None:
    model = small_vit(depth=2)
    attn = model.blocks[1].attn  # as a pruner leaves it: 2 of 3 heads of 16
    attn.qkv = nn.Linear(48, 96)
    attn.proj = nn.Linear(32, 48)
    attn.num_heads, attn.attn_dim = 2, 32
    small = RepQ(reduce_range=False).apply(model.eval(), images)
    assert small.blocks[1].attn.qkv.quant_w.scale.shape == (96,)
    assert error(small, model, images) < 0.05


def test_batch_of_one_agrees_with_the_batch(model: nn.Module, images: Tensor) -> None:
    small = RepQ().apply(model, images)
    with torch.no_grad():
        together, alone = small(images), torch.cat([small(x[None]) for x in images])
    off = (together - alone).norm(dim=1) / together.norm(dim=1)
    assert off.median() < 1e-2  # a sum in another order may cross a rounding edge


def test_a_model_with_other_blocks_gets_its_layers_quantized(images: Tensor) -> None:
    small = dict(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    model = timm.create_model("swin_tiny_patch4_window7_224", **small).eval()
    for step in (MinMax(), RepQ()):
        small = step.apply(model, images)
        assert error(small, model, images) < 0.15
        layers = quant_layers(small)
        assert {"layers.0.blocks.0.attn.qkv", "layers.0.blocks.0.mlp.fc1", "patch_embed.proj", "head.fc"} <= set(layers)
        assert not any(isinstance(m, PlainBlock) for m in small.modules())
        assert not any(getattr(layer, "after", "") for layer in layers.values())


def test_layers_that_are_not_called_are_left_alone(images: Tensor) -> None:
    """torchvision's attention reads `out_proj.weight` itself: quantizing that layer would do nothing but pretend."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    found = survey(model, images[:1])
    assert "conv_proj" in found and "heads.head" in found and not any("out_proj" in n for n in found)
    assert error(MinMax().apply(model, images), model, images) < 0.1


def test_what_a_layer_reads_from_two_sides_takes_no_scales_from_one(model: nn.Module, images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = model

        def forward(self, x: Tensor) -> Tensor:
            return self.vit.blocks[0].mlp.fc1(x.new_ones(len(x), 48)).mean() + self.vit(x)

    found = survey(Twice(), images[:1])
    assert found["vit.blocks.1.mlp.fc1"] == ("norm", "vit.blocks.1.norm2") and found["vit.blocks.0.mlp.fc1"] == ("", "")


def test_keeps_training(model: nn.Module, images: Tensor) -> None:
    small = RepQ(4, 4).apply(model, images).train()
    small(images[:4]).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())
    assert small.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("step", [MinMax(), RepQ(), RepQ(softmax=True)], ids=str)
def test_exported_program_computes_the_same(step: PostTraining, model: nn.Module, images: Tensor) -> None:
    from vitreous.ship.export import is_quantized, trace

    small = step.apply(model, images)
    program = trace(small, images[:2], dynamic=True)
    assert is_quantized(program)
    with torch.no_grad():
        for n in (1, 5):
            assert torch.allclose(program.module()(images[:n]), small(images[:n]), rtol=1e-4, atol=1e-4)
