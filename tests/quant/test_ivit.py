"""I-ViT: its integer arithmetic against exact references, its models against a second one in numpy, its files without floats."""

from __future__ import annotations

import copy
import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from support import small_vit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitreous.blocks import traced
from vitreous.errors import VitreousError
from vitreous.operators import matmul_integer, quantize
from vitreous.quant import MinMax
from vitreous.quant.integer import (
    Grid,
    IntegerLinear,
    Requantize,
    isqrt,
    layer_norm,
    shift_exp,
    shift_gelu,
    shiftmax,
)
from vitreous.quant.ivit import IntegerBlock, IViT
from vitreous.ship import export
from vitreous.steps import history_of, slim
from vitreous.tokens import EViT, ToMe

Array = np.ndarray


# ---- the same integers a second time: Python's own, of any size, and the formulas as the paper writes them


@functools.cache
def exact_exp(x: int, one: int, n: int) -> int:
    """ShiftExp of x ≤ 0 with I0 = −one, in fractions."""
    x = x + math.floor(Fraction(x, 2)) - math.floor(Fraction(x, 16))
    x = max(x, -n * one)
    q = math.floor(Fraction(x, -one))
    r = x + one * q
    return math.floor((Fraction(r, 2) + one) * Fraction(2) ** (n - q))


def exact_softmax(row: list[int], one: int) -> list[int]:
    e = [exact_exp(v - max(row), one, 15) for v in row]
    factor = (2**62 - 1) // sum(e)
    return [min((v * factor + 2**47) // 2**48, 2**14 - 1) for v in e]


def exact_gelu(x: int, one: int) -> int:
    top, e = one * 2**23, exact_exp(-abs(x), one, 23)
    sigmoid = (top if x >= 0 else e) * ((2**62 - 1) // (top + e)) // 2**47
    return x * sigmoid


def exact_sqrt(x: int) -> int:
    x = max(x, 1)
    k = 2 ** (x.bit_length() // 2)
    for _ in range(4):
        k = (k + x // k) // 2
    return k


def exact_norm(row: list[int]) -> list[int]:
    row = [v * 256 for v in row]
    mean = (sum(row) + len(row) // 2) // len(row)
    y = [v - mean for v in row]
    length = exact_sqrt(sum(v * v for v in y))
    return [v * (2**39 // length) // 2**9 for v in y]


def rows(f: Any, x: Array, *given: int) -> Array:
    """`f` on every row of `x`."""
    return np.array([f([int(v) for v in row], *given) for row in x.reshape(-1, x.shape[-1])], dtype=np.int64).reshape(x.shape)


class Reference:
    """The whole model in numpy integers, from its state dict."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {k: v.numpy() for k, v in model.state_dict().items()}
        self.model: Any = model

    def move(self, name: str, x: Array, low: int, high: int) -> Array:
        b, a, c = (self.state[f"{name}.{n}"] for n in ("multiplier", "addend", "shift"))
        return np.clip((x.astype(np.int64) * b + a) // 2 ** int(c), low, high)

    def linear(self, name: str, x: Array) -> Array:
        return x.astype(np.int64) @ self.state[f"{name}.weight"].astype(np.int64).T

    def __call__(self, images: Tensor) -> Array:
        s, m, wide, narrow = self.state, self.model, (-(2**15), 2**15 - 1), (-128, 127)
        q = np.clip(np.rint(images.numpy() / s["patch_embed.proj.scale"]), *narrow).astype(np.int64)
        side = m.patch_embed.patch_size[0]
        corners = range(0, q.shape[2], side)
        patches = np.stack([q[:, :, i : i + side, j : j + side].reshape(len(q), -1) for i in corners for j in corners], 1)
        x = self.move("patch_embed.proj.linear.out", self.linear("patch_embed.proj.linear", patches), *wide)
        x = np.concatenate([np.repeat(s["cls_token"], len(x), 0), x], 1) + s["pos_embed"]
        x = np.clip(x, *wide)
        for i, block in enumerate(m.blocks):
            n = f"blocks.{i}"
            h = self.move(f"{n}.norm1.out", rows(exact_norm, x), *narrow)
            qkv = self.move(f"{n}.attn.qkv.out", self.linear(f"{n}.attn.qkv", h), *narrow)
            heads = block.attn.num_heads
            qkv = qkv.reshape(*h.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)
            scores = self.move(f"{n}.attn.scores", qkv[0] @ qkv[1].swapaxes(-1, -2), *wide)
            mixed = rows(exact_softmax, scores, int(block.attn.one)) @ qkv[2]
            mixed = self.move(f"{n}.attn.mixed", mixed, *narrow).transpose(0, 2, 1, 3).reshape(*h.shape[:2], -1)
            y = self.move(f"{n}.attn.proj.out", self.linear(f"{n}.attn.proj", mixed), *wide)
            x = np.clip(self.move(f"{n}.keep1", x, *wide) + y, *wide)
            h = self.move(f"{n}.norm2.out", rows(exact_norm, x), *narrow)
            h = self.move(f"{n}.mlp.fc1.out", self.linear(f"{n}.mlp.fc1", h), *wide)
            gelu = rows(lambda row, one: [exact_gelu(v, one) for v in row], h, int(block.mlp.one))
            y = self.move(f"{n}.mlp.fc2.out", self.linear(f"{n}.mlp.fc2", self.move(f"{n}.mlp.act", gelu, *narrow)), *wide)
            x = np.clip(self.move(f"{n}.keep2", x, *wide) + y, *wide)
        h = self.move("norm.out", rows(exact_norm, x), *narrow)[:, 0]
        return (self.linear("head", h) + s["head.out.bias"]).astype(np.float32) * s["head.out.scale"]


class Floats(TorchDispatchMode):
    """Every call that computes floats: the two at the end, from accumulators to logits, and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        if isinstance(out, Tensor) and out.is_floating_point() and name not in ("alias", "detach", "slice", "select"):
            self.seen.append(name)
        return out


# ---- models


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit(depth=2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def others() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def small(model: nn.Module, images: Tensor) -> nn.Module:
    return IViT().apply(model, images)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def error(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    return float((run(model, x) - run(reference, x)).norm() / run(reference, x).norm())


# ---- arithmetic


def test_products_of_bytes_are_exact_at_the_ends_of_their_range() -> None:
    a, b = torch.full((2, 3, 4096), -128, dtype=torch.int8), torch.full((4096, 5), -128, dtype=torch.int8)
    b[:, 0] = 127
    product = matmul_integer(a, b)
    assert product.dtype == torch.int32 and product.shape == (2, 3, 5)
    assert product[0, 0].tolist() == [-4096 * 128 * 127] + [4096 * 128 * 128] * 4
    g = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (3, 7, 300), generator=g).to(torch.int8)
    b = torch.randint(-128, 128, (3, 300, 4), generator=g).to(torch.int8)
    assert np.array_equal(matmul_integer(a, b), a.numpy().astype(np.int64) @ b.numpy().astype(np.int64))


def test_images_become_integers_halves_to_even() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 100.0, -100.0])
    assert quantize(x, torch.tensor(0.5)).tolist() == [0, 2, 2, 0, -2, 127, -128]


def test_requantizing_by_hand() -> None:
    """3/8 is 3·2^22 · 2^−25, with 24 bits in front of the shift: 10·3/8 + 1 = 4.75, −10·3/8 + 1 = −2.75."""
    q = Requantize(torch.tensor(0.375), -128, 127, torch.tensor(1.0))
    assert int(q.shift) == 25 and int(q.multiplier) == 3 * 2**22 and int(q.addend) == 2**25 + 2**24
    assert q(torch.tensor([10, -10, 1, 4, -4, 1000, -1000])).tolist() == [5, -3, 1, 3, 0, 127, -128]


def test_grids_by_hand() -> None:
    lopsided, above = Grid.skewed([-1.0, 4.1]), Grid.skewed([2.0, 5.1])
    assert (lopsided.scale, lopsided.zero) == (pytest.approx(0.02), -78), "−1 is −128 and 4.1 is 127"
    assert (above.scale, above.zero) == (pytest.approx(0.02), -128), "0 is on every grid"
    assert Grid.signed([-1.0, 2.54]) == Grid(0.02, -128, 127)
    fine, one = Grid.inverse([-3.0, 2.0], 2.0)  # 32767 steps of 1/(2 · one) reach 3
    assert one == 32767 // 6 and fine.scale == 1 / (2 * one)


def test_requantizing_is_near_monotone_and_by_channel() -> None:
    ratio = torch.tensor([0.3, -0.004, 1.7, 0.0, 1e-7], dtype=torch.float64)
    offset = torch.tensor([0.0, 5.0, -3.3, 20.0, 1.0], dtype=torch.float64)
    q = Requantize(ratio, -(2**15), 2**15 - 1, offset)
    x = torch.arange(-15000, 15000)[:, None].expand(-1, 5)
    out = q(x)
    assert ((out - (x * ratio + offset)).abs() <= 0.5 + 1e-2).all() and out.dtype == torch.int32
    steps = out[1:] - out[:-1]
    assert (steps[:, ratio >= 0] >= 0).all() and (steps[:, ratio < 0] <= 0).all()
    far = Requantize(torch.tensor(1e-3), -128, 127, torch.tensor(1e6))  # a zero point times the sum of a row of weights
    assert far(torch.tensor([-(10**9), -(10**9) + 40_000, -(10**9) - 7_600])).tolist() == [0, 40, -8]
    huge = Requantize(torch.tensor(1e9), -128, 127, torch.tensor(1e12))  # what was always 0 has the smallest of scales
    assert huge(torch.tensor([-(2**30), 0, 2**30])).tolist() == [-128, 127, 127]


def test_shift_exp_by_hand() -> None:
    """x = 8, one = 8: 8 + 4 − 0, less the carry of 8/16, is 11 or 1 octave and 3/8: (1 − 3/16)/2 of 8·2^4."""
    assert shift_exp(torch.tensor([8]), 8, 4).tolist() == [int(8 * 2**4 * (1 - 3 / 16) / 2)] == [exact_exp(-8, 8, 4)]
    assert shift_exp(torch.tensor([0, 10**6]), 8, 4).tolist() == [8 * 16, 8]


@pytest.mark.parametrize(("one", "n"), [(1, 15), (5, 15), (113, 23), (4001, 15)])
def test_shift_exp_is_exact_falls_and_is_near_e(one: int, n: int) -> None:
    x = torch.arange(0, 12 * one)
    e = shift_exp(x, one, n)
    some = x[:: max(1, len(x) // 200)]
    assert shift_exp(some, one, n).tolist() == [exact_exp(-int(v), one, n) for v in some]
    assert (e[1:] <= e[:-1]).all() and e.min() >= one
    if one > 100:  # within 2 octaves the line is at most 6.2 % above, log2(e) is 0.4 % short
        near = torch.exp(-x / one) * one * 2**n
        assert ((e / near - 1).abs()[: 2 * one] < 0.075).all()


def test_shiftmax_is_exact_sums_to_one_and_is_near_softmax() -> None:
    g = torch.Generator().manual_seed(0)
    for one, spread in ((3, 9), (900, 2500), (30000, 20000)):
        x = (torch.randn(4, 3, 17, generator=g) * spread).to(torch.int32)
        p = shiftmax(x, one)
        assert np.array_equal(p, rows(exact_softmax, x.numpy(), one))
        assert (p >= 0).all() and ((p.sum(-1) - 2**14).abs() <= 9).all()
        assert torch.equal(p, shiftmax(x + 5, one)) and torch.equal(p.flip(-1), shiftmax(x.flip(-1), one))
        assert (p.gather(-1, x.argsort(-1)).diff(dim=-1) >= 0).all()
        if one > 100:
            assert (p / 2**14 - (x / one).softmax(-1)).abs().max() < 0.04
    assert shiftmax(torch.tensor([7] + [-(2**15)] * 3), 4).tolist() == exact_softmax([7] + [-(2**15)] * 3, 4)
    assert shiftmax(torch.zeros(1, 2**14, dtype=torch.int32), 30000).eq(1).all()


def test_shift_gelu_is_exact_and_near_gelu() -> None:
    for one in (2, 40, 2500):
        x = torch.arange(-9 * one, 9 * one, max(1, one // 40))
        y = shift_gelu(x, one)
        assert y.tolist() == [exact_gelu(int(v), one) for v in x]
        if one > 100:
            real = x / one / 1.702
            assert (y / 2**15 / one / 1.702 - real * torch.sigmoid(1.702 * real)).abs().max() < 0.03
            assert (y / 2**15 / one / 1.702 - F.gelu(real)).abs().max() < 0.045
    far = shift_gelu(torch.tensor([-(2**15), 2**15 - 1]), 100)
    assert far.tolist() == [exact_gelu(-(2**15), 100), exact_gelu(2**15 - 1, 100)] and far[1] >= (2**15 - 1) * (2**15 - 8)


def test_isqrt() -> None:
    values = [*range(2000), *(v for j in range(11, 31) for v in (4**j - 1, 4**j, 4**j + 1, 2 * 4**j, 3 * 4**j + 12345)), 2**61]
    found = isqrt(torch.tensor(values)[:, None])[:, 0].tolist()
    assert found == [exact_sqrt(v) for v in values]
    for v, k in zip(values, found, strict=True):
        assert k == math.isqrt(v) or (k == math.isqrt(v) + 1 and k * k == v + 1) or v == 0


def test_layer_norm_is_exact_and_near_the_real_one() -> None:
    g = torch.Generator().manual_seed(3)
    for spread in (4, 300, 9000):
        x = (torch.randn(5, 48, generator=g) * spread + 100).round().clamp(-(2**15), 2**15 - 1).to(torch.int32)
        y = layer_norm(x)
        assert np.array_equal(y, rows(exact_norm, x.numpy()))
        real = F.layer_norm(x.double(), (48,), eps=0)
        assert (y * 48**0.5 / 2**30 - real).abs().max() < 2e-3
    assert layer_norm(torch.full((2, 48), -777)).eq(0).all(), "a token without variance has only the bias"
    ends = torch.tensor([[2**15 - 1, -(2**15)] * 1024])
    assert np.array_equal(layer_norm(ends), rows(exact_norm, ends.numpy())), "no sum overflows"


# ---- the model


def test_the_model_agrees_bit_for_bit_with_numpy(small: nn.Module, others: Tensor) -> None:
    loud = torch.cat([others[:2], others[:1] * 40])  # the last one is clipped
    assert np.array_equal(run(small, loud).numpy(), Reference(small)(loud))


def test_it_is_near_the_float_model(small: nn.Module, model: nn.Module, images: Tensor, others: Tensor) -> None:
    assert 1e-3 < error(small, model, others) < 0.15
    assert not getattr(small, "simulated", None) and IViT().deployable
    with torch.no_grad():
        alone = torch.cat([small(x[None]) for x in others])
    assert torch.equal(run(small, others), alone), "integers do not care how they are batched"


def test_no_float_between_the_ends(small: nn.Module, others: Tensor) -> None:
    with Floats() as floats, torch.no_grad():
        out = small(others)
    assert out.dtype == torch.float32
    assert floats.seen == ["_to_copy", "mul"]


VARIANTS: list[dict[str, Any]] = [
    {"qkv_bias": False, "init_values": 0.3, "num_classes": 0},
    {"reg_tokens": 2, "no_embed_class": True, "pre_norm": True},
    {"class_token": False, "global_pool": ""},
]


def made(**kwargs: Any) -> nn.Module:
    classes = kwargs.pop("num_classes", 7)
    model = small_vit(depth=2, **kwargs)
    if classes == 0:
        model.reset_classifier(0)
    return model


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_plain_models_of_every_make(kwargs: dict[str, Any], images: Tensor, others: Tensor) -> None:
    model = made(**kwargs)
    small = IViT().apply(model, images)
    assert error(small, model, others) < 0.15
    again = copy.deepcopy(model).eval()
    IViT().build(again, history_of(small).done[-1][1])
    for p in again.buffers():
        p.zero_()
    again.load_state_dict(small.state_dict())
    assert torch.equal(run(again, others), run(small, others))
    with Floats() as floats, torch.no_grad():
        small(others)
    assert floats.seen == ["_to_copy", "mul"]


def test_distilled_tokens_and_two_heads(images: Tensor, others: Tensor) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7
    ).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    assert error(IViT().apply(model, images), model, others) < 0.15


def test_layer_scale_is_folded(images: Tensor) -> None:
    model = made(init_values=0.3)
    with torch.no_grad():
        model.blocks[0].ls1.gamma.copy_(torch.linspace(-1, 1, 48))
        model.blocks[0].ls2.gamma[:5] = 0
    small = IViT().apply(model, images)
    assert error(small, model, images) < 0.15
    assert small.blocks[0].mlp.fc2.out.multiplier[:5].eq(0).all() and not hasattr(small.blocks[0], "ls1")
    sign = small.blocks[0].attn.proj.out.multiplier.sign()
    assert torch.equal(sign, model.blocks[0].ls1.gamma.sign().long())


def test_what_is_constant_or_zero_is_no_trouble(images: Tensor) -> None:
    model = made()
    with torch.no_grad():
        model.blocks[0].norm1.weight[:3] = 0
        model.blocks[0].norm1.bias[:3] = torch.tensor([0.0, 5.0, -3.0])
        model.blocks[1].mlp.fc2.weight[4] = 0
        model.blocks[1].attn.qkv.weight.zero_()
        model.blocks[1].attn.qkv.bias.zero_()
        model.head.weight[2] = 0
        model.head.bias[2] = 1.5
    small = IViT().apply(model, images)
    assert error(small, model, images) < 0.15
    assert torch.allclose(run(small, images)[:, 2], torch.tensor(1.5))


def test_inputs_far_from_zero_cost_no_more(images: Tensor) -> None:
    """A channel that leads the others by far gives a range with a large zero point, and what it adds leaves every grid."""
    model = made()
    with torch.no_grad():
        for block in model.blocks:
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.bias[5] += 60
                layer.weight[:, 5] = 1e-3
                layer.weight += 0.1 * torch.sign(layer.weight.sum(1, keepdim=True))
    small = IViT().apply(model, images)
    assert error(small, model, images) < 0.3


def test_pruned_heads_keep_their_shapes(images: Tensor) -> None:
    model = made()
    attn = model.blocks[1].attn  # as a pruner leaves it: 2 of 3 heads of 16
    attn.qkv, attn.proj = nn.Linear(48, 96), nn.Linear(32, 48)
    attn.num_heads, attn.attn_dim = 2, 32
    small = IViT().apply(model.eval(), images)
    assert small.blocks[1].attn.qkv.weight.shape == (96, 48)
    assert error(small, model, images) < 0.15


@pytest.mark.parametrize("reducer", [EViT(keep=0.5, at=(0, 1)), ToMe(r=3)], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["reducer first", "integers first"])
def test_token_steps_before_and_after(model: nn.Module, images: Tensor, others: Tensor, reducer: Any, first: bool) -> None:
    small = slim(model, [reducer, IViT()] if first else [IViT(), reducer], images)
    with traced(small) as trace, torch.no_grad():
        small(others)
    assert len(trace) == 2
    off = (run(small, others) - run(reducer.apply(model), others)).norm(dim=1) / run(small, others).norm(dim=1)
    assert off.median() < 0.15


def test_integers_are_what_is_stored(small: nn.Module, model: nn.Module) -> None:
    kinds = {k: v.dtype for k, v in small.state_dict().items()}
    # Where floats enter and leave, and where token steps compute in floats.
    scales = {"patch_embed.proj.scale", "head.out.scale"} | {
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("middle", "after", "attn.scale_q", "attn.scale_k", "attn.scale_scores")
    }
    assert {k for k, d in kinds.items() if d.is_floating_point} == scales
    weights = [m.weight for m in small.modules() if isinstance(m, IntegerLinear)]
    assert all(w.dtype == torch.int8 for w in weights) and sum(w.numel() for w in weights) == sum(
        m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    )
    assert all((w.abs().amax(1) == 127).all() for w in weights)
    assert all(isinstance(b, IntegerBlock) for b in small.blocks)


class _Wider(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, mlp.act, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))) * 2


def test_refuses_what_has_no_integers(model: nn.Module, images: Tensor) -> None:
    def refused(model: nn.Module, why: str, x: Tensor = images) -> None:
        with pytest.raises(VitreousError, match=why):
            IViT().apply(model, x)

    swin = dict(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    refused(timm.create_model("swin_tiny_patch4_window7_224", **swin), "plain pre-norm blocks")
    refused(made(global_pool="avg"), "pools by 'avg'")
    refused(made(qk_norm=True), "blocks.0.*normalizes inside")
    refused(made(act_layer=nn.ReLU), "ReLU where GELU")
    refused(made(mlp_layer=timm.layers.SwiGLU), "MLP is not two linear")
    wider = made()
    wider.blocks[1].mlp = _Wider(wider.blocks[1].mlp)
    refused(wider, "blocks.1.*more than two linear")
    refused(model, "no calibration images", images[:0])
    refused(MinMax().apply(model, images), "quantized already")
    broken = copy.deepcopy(model)
    broken.blocks[1].mlp.act = _Broken()
    refused(broken, "blocks.1.*something else")
    with pytest.raises(VitreousError, match="quantized already"):
        MinMax().apply(IViT().apply(model, images), images)
    odd = copy.deepcopy(model)
    odd.patch_embed.norm = nn.Softplus()
    refused(odd, "floats|integers")


class _Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0 * 0


# ---- the file


@pytest.fixture(scope="module")
def short(images: Tensor) -> nn.Module:
    return IViT().apply(small_vit(depth=1), images)


@pytest.fixture(scope="module")
def graph(short: nn.Module, images: Tensor) -> onnx.ModelProto:
    return written(short, images)


def written(small: nn.Module, images: Tensor) -> onnx.ModelProto:
    return export.to_onnx(export.trace(small, images[:2], dynamic=True))


def session(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def test_the_file_agrees_with_torch_bit_for_bit(short: nn.Module, graph: onnx.ModelProto, others: Tensor) -> None:
    runtime = session(graph)
    for x in (others, others[:1], others * 40):
        assert np.array_equal(runtime.run(None, {"images": x.numpy()})[0], run(short, x).numpy())


def test_the_file_holds_no_float_between_its_scales(graph: onnx.ModelProto) -> None:
    """Types are inferred by ONNX, for every tensor of the graph; floats are its two ends."""
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    types |= {t.name: t.data_type for t in inferred.initializer}
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
    assert all(types.get(name) for node in inferred.node for name in node.output if name), "every type is known"
    touching = [n for n in inferred.node if {types.get(name) for name in (*n.input, *n.output) if name} & floats]
    kinds = [n.op_type for n in touching]
    start = kinds.index("QuantizeLinear")
    assert set(kinds[:start]) <= {"Slice", "Shape"} and kinds[start + 1 :] == ["Cast", "Mul"], kinds
    products = [n for n in inferred.node if n.op_type in ("MatMul", "Gemm", "Conv", "MatMulInteger")]
    assert {n.op_type for n in products} == {"MatMulInteger"}
    assert len(products) == 2 + 7, "a block has four layers, q·k, and softmax·v in two halves"
    assert all({types[name] for name in n.input} == {onnx.TensorProto.INT8} for n in products)
    assert all(types[n.output[0]] == onnx.TensorProto.INT32 for n in products)
    stored = sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2 for t in graph.graph.initializer)
    assert stored == 2 + 4
