"""What only a GPU can show: precisions, compiled code, kernels, times, the command line. The rest is in `test_devices.py`."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import SMALL
from support import command, small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous.prune.two_four import on_tensor_cores
from vitreous.ship.inductor import SHAPES, load_inductor, ship_inductor

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def exactly() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def pictures(n: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    y = torch.arange(n) % 7
    return torch.randn(n, 3, 32, 32, generator=g) + torch.randn(7, 3, 1, 1, generator=g)[y], y


@pytest.mark.parametrize("name", SMALL)
def test_every_architecture(name: str) -> None:
    """Answers and gradients."""
    small = SMALL[name]
    model, x = small.make(), small.images()
    found = []
    for device in ("cpu", "cuda"):
        m = copy.deepcopy(model).to(device)
        y = m(x.to(device))
        y = (y if isinstance(y, Tensor) else y[0]).float()
        y.square().sum().backward()
        found.append((y.detach().cpu(), {n: p.grad.cpu() for n, p in m.named_parameters() if p.grad is not None}))
    (a, ours), (b, theirs) = found
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert ours.keys() == theirs.keys()
    for n, g in ours.items():
        assert (g - theirs[n]).norm() <= 1e-2 * g.norm() + 1e-3, n


WAYS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16-mixed"},
    "fp16": {"precision": "16-mixed"},
    "compiled": {"compiled": True},
    "bf16, compiled": {"precision": "bf16-mixed", "compiled": True},
    "fp16, SAM": {"precision": "16-mixed", "optimiser": vt.learn.SAM(vt.learn.AdamW(3e-3))},
    "bf16, EMA, pieces": {"precision": "bf16-mixed", "ema": 0.9, "micro": 16},
    "compiled, mixed pictures": {"compiled": True, "mixup": 0.8, "cutmix": 1.0},
    "SGD-SaI, bf16": {"precision": "bf16-mixed", "optimiser": vt.learn.SGDSaI()},
    "distilled, fp16": {"precision": "16-mixed", "objective": [vt.learn.CrossEntropy(), vt.learn.NKD(small_vit(seed=5))]},
    "slimmed": {"precision": "bf16-mixed", "steps": vt.tokens.EViT(keep=0.7, at=(1,))},
    "fewer activations": {"precision": "bf16-mixed", "objective": [vt.learn.CrossEntropy(), vt.learn.SlimFit()]},
}


@pytest.mark.parametrize("name", WAYS)
def test_learning(name: str) -> None:
    given = dict(epochs=8, batch=32, augment="shift", optimiser=vt.learn.AdamW(3e-3), accelerator="cuda") | WAYS[name]
    start = small_vit(depth=2)
    if (steps := given.pop("steps", None)) is not None:
        start = vt.slim(start, steps)
    taught = vt.train(start, pictures(), **given)
    assert all(torch.isfinite(p).all() and p.device.type == "cpu" for p in taught.parameters())
    x, y = pictures()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(m(x), y) for m in (taught, start)]
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_stopped_run_goes_on(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitreous.learn.run._curves", lambda rows: "")
    given = dict(epochs=4, batch=16, augment="shift", ema=0.9, mixup=0.5, precision=precision, accelerator="cuda")
    whole = vt.train(small_vit(depth=2, drop_rate=0.1), pictures(), **given, out=tmp_path / "whole")

    def stop(line: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vt.train(small_vit(depth=2, drop_rate=0.1), pictures(), **given, out=tmp_path / "part", every=0.0, progress=stop)
    again = vt.train(small_vit(depth=2, drop_rate=0.1), pictures(), **given, out=tmp_path / "part")
    for k, v in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[k], v, atol=1e-6, rtol=1e-5)


def test_shipped(tmp_path: Path) -> None:
    model, (x, _) = small_vit().cuda(), pictures(4)
    vt.ship(model, tmp_path / "model.onnx")
    assert next(model.parameters()).is_cuda
    torch.testing.assert_close(vt.Runtime(tmp_path / "model.onnx")(x), small_vit()(x).detach(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_ahead(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = small_vit(depth=1).cuda(), pictures(8)[0].cuda()
    ship_inductor(model, tmp_path / "m.pt2", x, dtype=dtype)
    run = load_inductor(tmp_path / "m.pt2")
    with torch.no_grad():
        for n in (1, 2, 5, 8):
            off = (run(x[:n]).float() - model(x[:n])).norm() / model(x[:n]).norm()
            assert off < {torch.float32: 1e-3, torch.float16: 1e-2}.get(dtype, 5e-2)


def test_what_is_recorded_on_a_gpu_is_what_is_launched(tmp_path: Path) -> None:
    model = vt.slim(small_vit(), vt.tokens.ToMe(r=2)).cuda()
    x = torch.randn(SHAPES + 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).cuda()
    ship_inductor(model, tmp_path / "m.pt2", x[:4], dtype=torch.float32)
    recorded, launched = load_inductor(tmp_path / "m.pt2"), load_inductor(tmp_path / "m.pt2", graphs=False)
    with torch.no_grad():
        first = recorded(x[:1])
        for n in [*range(1, len(x) + 1), 1]:  # more sizes than are held, and one that was let go
            assert torch.allclose(recorded(x[:n]), launched(x[:n]), atol=1e-5)
            assert torch.allclose(recorded(x[-n:]), model(x[-n:]), atol=1e-4)
        assert torch.allclose(first, model(x[:1]), atol=1e-4)  # an answer stays when others are computed
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(recorded, [x[i : i + 1] for i in range(len(x))] * 4))
        assert torch.allclose(torch.cat(answers), model(x).repeat(4, 1), atol=1e-4)


def test_two_of_four_in_its_kernels() -> None:
    model = vt.slim(small_vit(depth=2, embed_dim=64, num_heads=4), vt.prune.TwoFour())
    fast, x = on_tensor_cores(model), pictures(64)[0]
    assert any("Sparse" in type(p.data).__name__ for p in fast.parameters())
    with torch.no_grad():
        y = fast(x.cuda().half()).float().cpu()
        assert (y - model(x)).norm() / model(x).norm() < 2e-2


def test_times_have_intervals() -> None:
    """Of a GPU that has finished: a hundred times the work takes longer."""
    small, big = small_vit(depth=1).cuda(), small_vit(depth=12, embed_dim=384, num_heads=6).cuda()
    proof = vt.prove({"small": small, "big": big}, pictures(), batches=(64,), rounds=20)
    latency = proof.models[1].latency[0]
    assert latency.ratio is not None and latency.ratio.high < 1 and len(latency.samples) >= 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes by colour, in parts to train on and to test."""
    home, g = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part in ("train", "test"):
        for c, name in enumerate(("blue", "green", "red")):
            (home / part / name).mkdir(parents=True)
            for i in range(16):
                pixels = g.integers(0, 120, (32, 32, 3)) + 120 * np.eye(3, dtype=int)[2 - c]
                Image.fromarray(pixels.astype(np.uint8)).save(home / part / name / f"{i}.png")
    return home


VIT = [
    "vit_tiny_patch16_224", "--img-size", "32", "--device", "cuda",
    *(w for a in ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=3") for w in ("--model-arg", a)),
]  # fmt: skip
COMMANDS: dict[str, list[str]] = {
    "anatomy": ["anatomy", *VIT],
    "see": ["see", "photos/train/red/0.png", *VIT, "--method", "grad_rollout"],
    "see, lrp": ["see", "photos/train/red/0.png", "--device", "cuda", "--method", "lrp"],
    "heads": ["heads", "--device", "cuda", "--limit", "8"],
    "faithful": ["faithful", "--device", "cuda", "--methods", "rollout,grad_cam,occlusion", "--limit", "8"],
    "prove": ["prove", "--device", "cuda", "--limit", "16", "--seconds", "1"],
    "slim": [
        "slim",
        "--device",
        "cuda",
        "--steps",
        "EViT(keep=0.7), RepQ()",
        "--limit",
        "64",
        "--calibrate",
        "32",
        "--budget",
        "50",
    ],
    "ship": ["ship", *VIT, "--out", "m.onnx"],
    "train": ["train", *VIT, "--data", "photos", "--batch", "16", "--epochs", "2", "--precision", "bf16-mixed"],
    "probe": ["probe", *VIT, "--data", "photos"],
    "pretrain": ["pretrain", *VIT, "--data", "photos", "--method", "SimMIM(cell=8)", "--batch", "16", "--epochs", "1"],
    "thin": ["thin", "--device", "cuda", "--keep", "0.5", "--limit", "64", "--out", "kept.csv"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(
    name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("see", "see, lrp", "prove", "slim", "train", "pretrain"):
        pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    status, _, error = command(monkeypatch, capsys, *COMMANDS[name])
    assert status == 0, error
    assert "Traceback" not in error
