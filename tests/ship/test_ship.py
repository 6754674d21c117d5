"""What is shipped computes what the model computes, and nothing else is ever left on the disk."""

from __future__ import annotations

import copy
import itertools
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitreous.errors import VitreousError
from vitreous.ship import Parity, Runtime, export, ship, shipment


class FakeQuantize(nn.Module):
    """uint8 per tensor, from the range of what it is shown."""

    scale: Tensor
    zero: Tensor

    def __init__(self, seen: Tensor):
        super().__init__()
        low, high = seen.detach().amin().clamp(max=0), seen.detach().amax().clamp(min=0)
        self.register_buffer("scale", (high - low) / 255)
        self.register_buffer("zero", (-low / ((high - low) / 255)).round().int())

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, 0, 255)


class QuantLinear(nn.Module):
    """uint8 activations per tensor, int8 weights per output channel in -limit..limit."""

    scale: Tensor
    zero: Tensor

    def __init__(self, linear: nn.Linear, seen: Tensor, limit: int):
        super().__init__()
        self.input, self.limit = FakeQuantize(seen), limit
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("scale", linear.weight.detach().abs().amax(1) / limit)
        self.register_buffer("zero", torch.zeros(len(linear.weight), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zero, 0, -self.limit, self.limit)
        return F.linear(self.input(x), w, self.bias)


class QuantNet(nn.Module):
    """Quantized linears around a quantized product of activations, as in attention."""

    def __init__(self, limit: int):
        super().__init__()
        torch.manual_seed(0)
        first, again, second = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        x = torch.randn(64, 4, 64)
        self.first = QuantLinear(first, x, limit)
        self.again = QuantLinear(again, self.first(x), limit)  # of the same shape, so that zero points are the same
        y = self.again(self.first(x))
        self.left, self.right = FakeQuantize(y), FakeQuantize(y)
        self.second = QuantLinear(second, self.mix(y), limit)
        self.pretrained_cfg = {"input_size": (1, 16, 16)}

    def mix(self, y: Tensor) -> Tensor:
        return (self.left(y) @ self.right(y).transpose(-2, -1)).softmax(-1) @ y

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.mix(self.again(self.first(images.reshape(-1, 4, 64))))).mean(1)


class Reducer(nn.Module):
    """A ViT whose blocks drop, merge and fuse tokens, and which notes what it kept."""

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.vit = vit
        self.notes: dict[str, Tensor] = {}
        self.pretrained_cfg = {"input_size": (1, 32, 32)}

    def forward(self, images: Tensor) -> Tensor:
        x = self.vit.patch_embed(images)
        x = self.vit._pos_embed(x)
        width = x.shape[-1]
        score = (x[:, :1] @ x[:, 1:].transpose(-2, -1)).squeeze(1)
        top = score.topk(10).indices
        self.notes["kept"] = top
        kept = x[:, 1:].gather(1, top[..., None].expand(-1, -1, width))
        fused = (x[:, 1:] * score.scatter(1, top, 0.0)[..., None]).sum(1, keepdim=True)
        even, odd = kept[:, ::2], kept[:, 1::2]
        to = (even @ odd.transpose(-2, -1)).argmax(-1)[..., None].expand(-1, -1, width)
        merged = odd.scatter_reduce(1, to, even, reduce="mean", include_self=True)
        x = torch.cat([x[:, :1], merged, fused], 1)
        return self.vit.head(self.vit.norm(self.vit.blocks(x))[:, 0])


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, in_chans=1, num_classes=7, embed_dim=32, depth=2, num_heads=2, pos_embed="learn"
    )
    model.pretrained_cfg = {"input_size": (1, 32, 32)}
    return model.train()


@pytest.fixture(scope="module")
def shipped(vit: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the ViT for any batch as vit.onnx, vit.xml and vit.bin."""
    folder = tmp_path_factory.mktemp("shipped")
    for ending in (".onnx", ".xml"):
        ship(vit, folder / f"vit{ending}")
    return folder


@pytest.fixture
def small() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    model.pretrained_cfg = {"input_size": (1, 8, 8)}
    return model.train()


@pytest.mark.parametrize("ending", [".onnx", ".xml", ".pt2"])
@pytest.mark.parametrize("batch", [None, 2])
def test_a_vit_ships_with_any_batch_or_one(vit: VisionTransformer, tmp_path: Path, ending: str, batch: int | None) -> None:
    made = ship(vit, tmp_path / f"vit{ending}", batch=batch)
    assert made.parity.worst < 1e-5 and made.parity.agreement == 1
    assert made.parity.batches == ((1, 3, 16) if batch is None else (2,))
    assert (made.precision, made.integer_ops, made.batch) == ("fp32", 0, batch)
    assert sorted(os.listdir(tmp_path)) == sorted(file.name for file in made.files)
    assert made.bytes == sum(file.stat().st_size for file in made.files)
    assert vit.training and "\n" not in str(made)
    if ending != ".pt2":
        runtime = Runtime(made.path, threads=1)
        x = torch.randn(5 if batch is None else batch, 1, 32, 32)
        vit.eval()
        torch.testing.assert_close(runtime(x), vit(x).detach(), atol=1e-5, rtol=1e-5)
        vit.train()
        assert (runtime.threads, runtime.precision, runtime.bytes) == (1, "fp32", made.bytes)
        first = runtime(x).clone()
        runtime(-x)
        torch.testing.assert_close(runtime(x), first)
        with pytest.raises(VitreousError, match="takes images of"):
            runtime(torch.randn(3, 1, 32, 31))


def test_a_batch_size_that_python_holds_is_still_any(tmp_path: Path) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(len(x), -1, -1), x.reshape(int(x.shape[0]), -1, 8)], 1)
            return self.layer(x).mean(1)

    report = ship(Counted().eval(), tmp_path / "m.onnx", example=torch.randn(2, 3, 4, 4))
    assert report.parity.batches == (1, 3, 16)


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_threads_that_share_a_runtime_get_their_own_answers(shipped: Path, ending: str) -> None:
    runtime = Runtime(shipped / f"vit{ending}", threads=1)
    asked = [torch.full((1, 1, 32, 32), i / 8) for i in range(16)]
    alone = [runtime(x) for x in asked]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(alone))
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(runtime, asked * 8))
    assert all(torch.equal(a, b) for a, b in zip(together, alone * 8, strict=True))  # kept until all are through


def test_macs_are_those_of_one_image(vit: VisionTransformer, shipped: Path, tmp_path: Path) -> None:
    tokens, width, hidden = 17, 32, 128
    block = tokens * (3 * width * width + width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    wanted = 16 * width * 64 + 2 * block + width * 7
    four = ship(vit, tmp_path / "four.xml", batch=4).path
    assert [Runtime(path).macs for path in (shipped / "vit.xml", shipped / "vit.onnx", four)] == [wanted] * 3


@pytest.mark.parametrize("ending", [".onnx", ".xml", ".pt2"])
def test_tokens_may_be_dropped_and_merged(vit: VisionTransformer, tmp_path: Path, ending: str) -> None:
    model = Reducer(vit)
    # Without our own translation ONNX overwrites where the model takes a mean, and parity is lost.
    made = ship(model, tmp_path / f"reduced{ending}")
    assert made.parity.worst < 1e-4
    assert type(model.notes["kept"]) is Tensor  # tracing leaves no stand-in behind


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_a_fixed_batch_computes_the_same_every_time(tmp_path: Path, batch: int | None) -> None:
    """With a fixed batch the ones are a constant. OpenVINO writes over what it makes of one by a GatherND (docs/ship.md)."""

    class Counts(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            every_other = torch.arange(0, 8, 2)
            return (images.new_ones(images.shape[0], 8, 1)[:, every_other] + images[:, 0, :4] @ images[:, 0, :, :1]).flatten(1)

    made = ship(Counts(), tmp_path / "counts.xml", example=torch.randn(16, 1, 8, 8), batch=batch)
    assert made.parity.worst < 1e-6 and made.parity.batches == ((batch,) if batch else (1, 3, 16))
    assert made.parity.reshaped == (() if batch else (1, 4)) and ("reshaped to 1, 4" in str(made)) == (batch is None)
    fixed = Runtime(made.path, batch=batch or 4)
    with pytest.raises(VitreousError, match="takes images of"):
        fixed(torch.randn(3, 1, 8, 8))


@pytest.mark.parametrize("batch", [None, 4])
def test_as_many_heads_as_tokens(tmp_path: Path, batch: int | None) -> None:
    """With fixed sizes OpenVINO leaves the heads where they are, once the transpose is fused (docs/ship.md)."""
    model = VisionTransformer(
        img_size=16, patch_size=8, num_classes=7, embed_dim=32, depth=1, num_heads=4, class_token=False, global_pool="avg"
    )
    made = ship(model, tmp_path / "square.xml", example=torch.randn(16, 3, 16, 16), batch=batch)
    assert made.parity.worst < 1e-4 and not made.caution
    assert made.parity.reshaped == (() if batch else (1, 4))


def test_a_file_that_only_fails_when_reshaped_says_so(
    vit: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Runtime.__call__

    def wrong(self: Runtime, images: Tensor) -> Tensor:
        return honest(self, images) * (1.5 if self.shape[0] == 4 else 1)

    monkeypatch.setattr(Runtime, "__call__", wrong)
    with pytest.warns(UserWarning, match="something else"):
        made = ship(vit, tmp_path / "vit.xml")
    assert "reshaped to a batch of 1 or 4" in str(made) and not made.parity.reshaped and made.parity.worst < 1e-3
    with pytest.raises(VitreousError, match="does not compute"):
        ship(vit, tmp_path / "four.xml", batch=4)


def test_onnx_holds_the_models_own_integers(tmp_path: Path) -> None:
    model = QuantNet(limit=127)
    graph = onnx.load(ship(model, tmp_path / "q.onnx").path).graph
    stored = [numpy_helper.to_array(t) for t in graph.initializer]
    integers = [t for t in stored if t.dtype == np.int8 and t.ndim == 2]
    assert len(integers) == 3
    for linear in (model.first, model.again, model.second):
        wanted = (linear.weight / linear.scale[:, None]).round().int().numpy()
        assert any(np.array_equal(t, wanted) for t in integers)
        assert not any(t.dtype == np.float32 and t.shape == tuple(linear.weight.shape) for t in stored)
    for quantizer in (model.first.input, model.left, model.right, model.second.input):
        scales = [float(t) for t in stored if t.dtype == np.float32 and t.ndim == 0]
        assert any(scale == float(quantizer.scale) for scale in scales)
    assert {n.op_type for n in graph.node} >= {"QuantizeLinear", "DequantizeLinear"}


def test_openvino_holds_and_runs_integers(tmp_path: Path) -> None:
    model = QuantNet(limit=63)
    made = ship(model, tmp_path / "q.xml")
    assert made.precision == "int8" and made.integer_ops >= 3 and Runtime(made.path).kind == "OpenVINO int8"
    constants = [op for op in openvino.Core().read_model(made.path).get_ops() if op.get_type_name() == "Constant"]
    integers = [op.data for op in constants if op.get_element_type() == openvino.Type.i8 and op.data.ndim == 2]
    wanted = (model.first.weight / model.first.scale[:, None]).round().int().numpy()
    assert any(np.array_equal(data, wanted) or np.array_equal(data.T, wanted) for data in integers)


@pytest.mark.parametrize("batch", [None, 3])
def test_onnx_runtime_runs_integers_without_overflow(tmp_path: Path, batch: int | None) -> None:
    made = ship(QuantNet(limit=127), tmp_path / "q.onnx", batch=batch)
    assert made.integer_ops >= 3 and Runtime(made.path).kind == "ONNX Runtime int8"
    assert made.parity.mean < 1e-2


@pytest.mark.parametrize("sign", [1, -1])
def test_a_balance_behind_a_gelu_costs_openvino_nothing(tmp_path: Path, sign: int) -> None:
    class Balanced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 8)
            self.factor, self.offset = sign * (torch.rand(64) + 0.5), torch.randn(64)
            self.input = FakeQuantize(torch.tensor([-4.0, 6.0]))

        def forward(self, images: Tensor) -> Tensor:
            hidden = F.gelu(self.first(images.flatten(2))) * self.factor + self.offset
            return self.second(self.input(hidden)).mean(1)

    made = ship(
        Balanced().eval(), tmp_path / "b.xml", example=torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    )
    graph = openvino.Core().read_model(made.path)
    (quantized,) = (op for op in graph.get_ops() if op.get_type_name() == "FakeQuantize")
    above = quantized.input_value(0).get_node().get_type_name()
    assert above == ("Gelu" if sign == 1 else "Add")  # a falling range cannot be written
    assert made.parity.mean < 1e-3


@pytest.mark.parametrize("given", ["nothing", "scale", "bias", "mask", "causal"])
def test_attention_ships_as_it_is_written(tmp_path: Path, given: str) -> None:
    class Attention(nn.Module):
        def forward(self, images: Tensor) -> Tensor:  # [B, 3 heads, 8 tokens, 8]
            other = images.flip(2)
            bias = torch.linspace(-2, 2, 64).reshape(8, 8)
            more = {
                "nothing": {},
                "scale": {"scale": 2.0},
                "bias": {"attn_mask": bias},
                "mask": {"attn_mask": torch.arange(64).reshape(8, 8) % 3 > 0},
                "causal": {"is_causal": True},
            }[given]
            return F.scaled_dot_product_attention(images, other, images, **more).flatten(1)

    for ending in (".onnx", ".xml"):
        made = ship(Attention(), tmp_path / f"{given}{ending}", example=torch.randn(4, 3, 8, 8))
        assert made.parity.worst < 1e-5
    ops = [node.op_type for node in onnx.load(tmp_path / f"{given}.onnx").graph.node]
    if given in ("nothing", "scale", "bias"):  # no reshaping around the transpose, and one scale
        assert ops.count("Transpose") == 1 and ops.count("Mul") == 1 and "Reshape" not in ops[:-1]


def test_fewer_bits_keep_their_range(tmp_path: Path) -> None:
    class Narrow(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            scale, zero = torch.tensor(0.1), torch.tensor(3, dtype=torch.int32)
            return torch.fake_quantize_per_tensor_affine(images, scale, zero, 0, 15).flatten(1)

    example = torch.linspace(-3, 3, 64).reshape(1, 1, 8, 8)
    for ending in (".onnx", ".xml"):
        assert ship(Narrow(), tmp_path / f"narrow{ending}", example=example).parity.worst < 1e-6


def test_pt2_keeps_integers_simulated_and_is_not_run_here(tmp_path: Path) -> None:
    made = ship(QuantNet(limit=127), tmp_path / "q.pt2")
    assert (made.precision, made.integer_ops, made.parity.worst) == ("fp32", 0, 0)
    with pytest.raises(VitreousError, match=r"torch\.export\.load"):
        Runtime(made.path)


def test_a_file_that_differs_is_refused_and_removed(
    vit: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VitreousError, match=r"mean error .* worst .* allowed 0"):
        ship(vit, tmp_path / "vit.xml", tolerance=0)
    assert not os.listdir(tmp_path)

    honest = export.to_onnx

    def tampered(program: torch.export.ExportedProgram, outputs: list[str]) -> onnx.ModelProto:
        model = honest(program, outputs)
        weight = next(t for t in model.graph.initializer if t.name.endswith("head.weight"))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.02, weight.name))
        return model

    monkeypatch.setattr(shipment, "to_onnx", tampered)
    with pytest.raises(VitreousError, match="does not compute"):
        ship(vit, tmp_path / "vit.onnx")
    assert not os.listdir(tmp_path)


def test_integers_may_differ_by_what_noise_in_the_images_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, honest = QuantNet(limit=127), export.to_onnx

    def tampered(program: torch.export.ExportedProgram, outputs: list[str]) -> onnx.ModelProto:
        graph = honest(program, outputs)
        [scale] = [t for t in graph.graph.initializer if np.array_equal(numpy_helper.to_array(t), model.second.scale.numpy())]
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 1.08, scale.name))
        return graph

    monkeypatch.setattr(shipment, "to_onnx", tampered)
    example = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(VitreousError, match=r"mean error .* allowed 0\.05"):
        ship(model, tmp_path / "calm.onnx", example=example)
    edges = (example.round() + 0.5) * model.first.input.scale  # the next digit decides how each of these is rounded
    assert ship(model, tmp_path / "restless.onnx", example=edges).parity.mean > 0.05


def test_an_existing_file_stays_unless_asked(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vit.bin").write_text("mine")
    with pytest.raises(VitreousError, match="exists"):
        ship(small, tmp_path / "vit.xml")
    (tmp_path / "vit.xml").write_text("mine too")

    real = os.replace
    for fails_at in (1, 2, 3, 4):  # two files out of the way, two into place
        calls = 0

        def replace(source: Path, to: Path, fails_at: int = fails_at) -> None:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise OSError(28, "No space left on device")
            real(source, to)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(VitreousError, match="No space left"):
            ship(small, tmp_path / "vit.xml", overwrite=True)
        monkeypatch.setattr(os, "replace", real)
        assert sorted(os.listdir(tmp_path)) == ["vit.bin", "vit.xml"]
        assert (tmp_path / "vit.bin").read_text() == "mine" and (tmp_path / "vit.xml").read_text() == "mine too"

    ship(small, tmp_path / "vit.xml", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["vit.bin", "vit.xml"] and Runtime(tmp_path / "vit.xml").kind


@pytest.mark.parametrize("ending", [".onnx", ".xml", ".pt2"])
def test_a_full_disk_leaves_nothing(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    def write(path: Path, data: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    def save(model: object, path: Path, **_: object) -> None:
        path.touch()
        raise RuntimeError("iostream error")

    monkeypatch.setattr(Path, "write_bytes", write)
    monkeypatch.setattr(openvino, "save_model", save)
    with pytest.raises(VitreousError, match="cannot be written"):
        ship(small, tmp_path / f"small{ending}")
    assert not os.listdir(tmp_path)


def test_an_interrupt_leaves_nothing(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> Parity:
        raise KeyboardInterrupt

    monkeypatch.setattr(shipment.Yardstick, "first", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ship(small, tmp_path / "vit.onnx")
    assert not os.listdir(tmp_path) and small.training


def test_what_cannot_be_shipped_says_why(vit: VisionTransformer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Branches(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) if images.sum() > 0 else -images.flatten(1)

    class Nan(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) / 0

    images = torch.ones(2, 1, 8, 8)
    for model, path, example, message in [
        (vit, "vit.tflite", None, "ending"),
        (nn.Identity(), "a.onnx", None, "input_size"),
        (vit, "a.onnx", torch.ones(3, 3), "example"),
        (Branches(), "a.onnx", images, "cannot be traced"),
        (Nan(), "a.onnx", images, "NaN"),
    ]:
        with pytest.raises(VitreousError, match=message):
            ship(model, tmp_path / path, example=example)
    (tmp_path / "file").write_text("")
    with pytest.raises(VitreousError, match="cannot write"):
        ship(vit, tmp_path / "file" / "vit.onnx")
    assert os.listdir(tmp_path) == ["file"]
    assert capfd.readouterr() == ("", "")  # torch prints the graph it gave up on


def test_a_broken_file_is_a_clear_error(shipped: Path, tmp_path: Path) -> None:
    shutil.copytree(shipped, tmp_path, dirs_exist_ok=True)
    for name, opened in [("vit.onnx", "vit.onnx"), ("vit.bin", "vit.xml"), ("vit.xml", "vit.xml")]:
        whole = (tmp_path / name).read_bytes()
        for broken in (whole[: len(whole) // 2], b"", b"\x00not a model" * 99):
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(VitreousError, match="vit"):
                Runtime(tmp_path / opened)
        (tmp_path / name).unlink()
        with pytest.raises(VitreousError, match="does not exist"):
            Runtime(tmp_path / opened)
        (tmp_path / name).write_bytes(whole)
    with pytest.raises(VitreousError, match="precision"):
        Runtime(tmp_path / "vit.xml", precision="int3")
    with pytest.raises(VitreousError, match="0 threads"):
        Runtime(tmp_path / "vit.xml", threads=0)
    assert Runtime(tmp_path / "vit.xml", precision="bf16").precision in ("bf16", "fp32")


def test_the_weights_of_another_model_are_noticed(vit: VisionTransformer, shipped: Path, tmp_path: Path) -> None:
    """As files are copied by hand: without the manifest of a folder, of the same shapes and the same size."""
    other = copy.deepcopy(vit)
    with torch.no_grad():
        other.head.weight.mul_(2)
    ship(other, tmp_path / "vit.xml")
    assert (tmp_path / "vit.bin").stat().st_size == (shipped / "vit.bin").stat().st_size
    shutil.copy(shipped / "vit.bin", tmp_path)
    with pytest.raises(VitreousError, match=r"vit\.bin is not the one that vit\.xml was written with"):
        Runtime(tmp_path / "vit.xml")
    text = (tmp_path / "vit.xml").read_text()
    (tmp_path / "vit.xml").write_text(re.sub('<weights_sha256 value="[0-9a-f]{64}" ?/>', "", text))  # as others write it
    assert Runtime(tmp_path / "vit.xml").kind == "OpenVINO fp32"


SIGNALLED = """
import gc, os, signal, sys
import openvino
from openvino import opset13 as ops
from vitreous.errors import VitreousError
from vitreous.ship import Runtime

x = ops.parameter([1, 4], openvino.Type.f32)
openvino.save_model(openvino.Model([ops.relu(x)], [x]), sys.argv[1])
first, second = Runtime(sys.argv[1]), Runtime(sys.argv[1])
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGINT, lambda *_: print("told", flush=True))
signal.raise_signal(signal.SIGINT)
if not (child := os.fork()):
    try:
        Runtime(sys.argv[1])
    except VitreousError as error:
        print("spawn" in str(error), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_runtimes_that_end_in_any_order_leave_signals_alone_and_forks_are_refused(tmp_path):
    run = subprocess.run([sys.executable, "-c", SIGNALLED, str(tmp_path / "m.xml")], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "told\nTrue\n"), run.stderr[-2000:]
