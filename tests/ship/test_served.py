"""A shipped file tells a program without this library all that it needs, whatever form the model's outputs have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from PIL import Image
from support import small_vit
from torch import Tensor, nn

from vitreous.data.transform import preparation
from vitreous.errors import VitreousError
from vitreous.ship import Runtime, ship, ship_all
from vitreous.ship.card import preprocess

DOCS = Path(__file__).parents[2] / "docs" / "ship.md"
CLASSES = ["cat", 'a "dog" <', "é", "d", "e", "f", "g"]
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vitreous", "torch", "timm"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = small_vit(depth=1)
    told = {"label_names": CLASSES, "crop_pct": 0.8, "interpolation": "bicubic"}
    model.pretrained_cfg = {**model.pretrained_cfg, **told}
    return model


@pytest.fixture(scope="module")
def shipped(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx and model.xml, and in `pictures` the same with their preparation."""
    folder = tmp_path_factory.mktemp("served")
    ship_all(model, [folder / "model.onnx", folder / "model.xml"])
    ship_all(model, [folder / "pictures" / "model.onnx", folder / "pictures" / "model.xml"], with_preprocessing=True)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    Image.fromarray(noise).resize((90, 61), Image.Resampling.BICUBIC).save(path)
    return path


def test_the_examples_of_the_docs_need_nothing_of_ours(model: nn.Module, shipped: Path, photo: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        wanted = model(preparation(model).to_tensor(Image.open(photo))[None])[0]
    examples = re.findall(r"```python\n(# serve with .*?)```", DOCS.read_text(), re.DOTALL)
    for text, file in zip(examples, (shipped / "model.onnx", shipped / "pictures" / "model.xml"), strict=True):
        (tmp_path / "serve.py").write_text(BLOCKED + text)
        done = subprocess.run([sys.executable, tmp_path / "serve.py", file, photo], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        best = int(wanted.argmax())
        start = f"{best} {CLASSES[best]} "
        assert done.stdout.startswith(start)
        torch.testing.assert_close(torch.tensor([float(v) for v in done.stdout[len(start) :].split()]), wanted, atol=1e-3, rtol=0)


def test_files_say_what_they_are(model: nn.Module, shipped: Path) -> None:
    graph = onnx.load(shipped / "model.onnx").graph
    assert (graph.input[0].name, graph.output[0].name) == ("images", "logits")
    for value in (graph.input[0], graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    info = openvino.Core().read_model(shipped / "model.xml").get_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"])
    assert info.astype(str) == "f32"
    for ending in (".onnx", ".xml"):
        card = Runtime(shipped / f"model{ending}").card
        assert card["classes"] == CLASSES and card["preprocess"] == preprocess(model) and card["recipe"] == []
        assert card["versions"]["torch"] == torch.__version__ and card["precision"] == "fp32"


def test_hugging_face_reads_the_preparation(model: nn.Module, photo: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocess(model)))
    picture = Image.open(photo).resize((90, 60))  # at odd margins the two cut a pixel apart
    theirs = transformers.CLIPImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    ours = preparation(model).to_tensor(picture)[None]
    assert theirs.shape == ours.shape and (theirs - ours).abs().mean() < 0.01


@pytest.mark.parametrize("size", [(90, 61), (40, 55), (23, 20)])
@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_pictures_of_any_size_are_prepared_in_the_file(
    model: nn.Module, shipped: Path, photo: Path, size: tuple[int, int], ending: str
) -> None:
    picture = Image.open(photo).resize(size, Image.Resampling.BICUBIC)
    with torch.no_grad():
        wanted = model(preparation(model).to_tensor(picture)[None])
    runtime = Runtime(shipped / "pictures" / f"model{ending}")
    pixels = torch.from_numpy(np.array(picture))[None]
    assert (runtime(pixels) - wanted).norm() / wanted.norm() < 3e-3  # a level of 8 bits here and there
    with pytest.raises(VitreousError, match="uint8"):
        runtime(pixels.float())


def test_what_no_graph_prepares_is_refused(tmp_path: Path) -> None:
    model = small_vit(depth=1)
    model.pretrained_cfg = {**model.pretrained_cfg, "interpolation": "lanczos"}
    with pytest.raises(VitreousError, match="lanczos"):
        ship(model, tmp_path / "m.onnx", with_preprocessing=True)


@dataclass
class Answers:
    hidden: tuple[Tensor, ...]
    pooler_output: Tensor
    loss: None = None


class Net(nn.Module):
    """8 × 8 images to outputs of the form `kind`."""

    def __init__(self, kind: str, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed, self.head = kind, nn.Linear(8, 6), nn.Linear(6, classes)

    def forward(self, images: Tensor) -> Any:
        tokens = self.embed(images[:, 0])  # [B, 8, 6]
        logits = self.head(tokens.mean(1))
        return {
            "tensor": logits,
            "dense": tokens.softmax(-1) @ tokens.mT,
            "dict": {"patch.tokens": tokens, "logits": logits},
            "tuple": (logits, tokens),
            "object": Answers((tokens, tokens * 2), tokens.mean(1)),
        }[self.kind]


FORMS = {
    "tensor": ("logits",),
    "dense": ("features",),
    "dict": ("patch_tokens", "logits"),
    "tuple": ("logits", "output_1"),
    "object": ("hidden_0", "hidden_1", "pooler_output"),
}
X = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", FORMS)
def test_outputs_of_every_form_ship_under_their_names(kind: str, tmp_path: Path) -> None:
    model = Net(kind)
    for made in ship_all(model, [tmp_path / f"m{ending}" for ending in (".onnx", ".xml", ".pt2")], example=X):
        assert made.outputs == FORMS[kind] and made.parity.worst < 1e-5 and set(made.parity.outputs) == set(FORMS[kind])
        assert (made.parity.agreement is None) == (kind in ("dense", "object"))
    out = Runtime(tmp_path / "m.xml")(X)
    if kind == "object":
        assert out.keys() == set(FORMS[kind]) and torch.allclose(out["hidden_1"], 2 * out["hidden_0"])
        torch.testing.assert_close(out["pooler_output"], model(X).pooler_output.detach())


@pytest.mark.parametrize("how", ["half", "bfloat16", "compiled", "compiled inside", "replicas", "inference mode"])
def test_models_as_people_hold_them_ship(how: str, tmp_path: Path) -> None:
    inner = Net("tensor").eval()
    with torch.no_grad():
        wanted = inner(X)
    model: nn.Module = inner
    if how in ("half", "bfloat16"):
        model = inner.to(getattr(torch, how.replace("half", "float16")))
    elif how == "compiled":
        model = torch.compile(inner)
    elif how == "compiled inside":
        model.embed = torch.compile(inner.embed)
        model.compile()
    elif how == "replicas":
        model = nn.DataParallel(inner)
    else:
        with torch.inference_mode():
            model = Net("tensor").eval()
    made = ship(model, tmp_path / "m.onnx", example=X, batch=2)
    assert made.parity.worst < 1e-5 and made.outputs == ("logits",)
    answers = torch.cat([Runtime(made.path)(pair) for pair in X.split(2)])
    torch.testing.assert_close(answers, wanted, atol=2e-2 if how in ("half", "bfloat16") else 1e-5, rtol=0)
    if how in ("half", "bfloat16"):
        assert next(model.parameters()).dtype != torch.float32, "the model itself is left as it was"


def test_one_logit_agrees_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, honest = Net("tensor", classes=1), Runtime.__call__
    assert "same sign 100%" in str(ship(model, tmp_path / "m.onnx", example=X))
    monkeypatch.setattr(Runtime, "__call__", lambda self, x: -honest(self, x))
    made = ship(model, tmp_path / "n.onnx", example=X, tolerance=3)
    assert made.parity.agreement == 0 and made.parity.mean == pytest.approx(2)


def test_an_output_without_a_row_for_each_image_is_named(tmp_path: Path) -> None:
    class Loss(Net):
        def forward(self, images: Tensor) -> Any:
            return {"logits": super().forward(images), "loss": images.mean()}

    with pytest.raises(VitreousError, match="'loss'"):
        ship(Loss("tensor"), tmp_path / "m.onnx", example=X)


def test_two_ships_are_the_same_bytes(shipped: Path, model: nn.Module, tmp_path: Path) -> None:
    ship_all(model, [tmp_path / "model.onnx", tmp_path / "model.xml"])
    for name in ("model.onnx", "model.xml", "model.bin"):
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes()


def test_a_plain_program_that_computes_otherwise_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with bf16, where OpenVINO takes it unasked."""
    load, honest = Runtime._load_openvino, Runtime.__call__

    def loaded(self: Runtime, precision: str | None, batch: int | None) -> Any:
        run = load(self, precision, batch)
        if precision == "default":
            self.floats = "bf16"
        return run

    monkeypatch.setitem(ship_all.__globals__, "halves", lambda: True)
    monkeypatch.setattr(Runtime, "_load_openvino", loaded)
    monkeypatch.setattr(Runtime, "__call__", lambda s, x: honest(s, x).bfloat16().float() if s.floats == "bf16" else honest(s, x))
    made = ship(Net("tensor"), tmp_path / "m.xml", example=X)
    assert made.parity.mean < 1e-5 and made.plain is not None
    assert made.plain[0] == "bf16" and 5e-4 < made.plain[1].mean < 5e-3
    assert "plain compile_model computes in bf16 here: mean error" in str(made)
    assert Runtime(made.path).floats == "fp32"
