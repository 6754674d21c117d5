"""The figures of docs/benchmarks.md: Vitreous beside its peers, each set of models timed interleaved in one run.

    python benchmarks/spine.py bundled --data /usr/share/datasets/fashion-mnist   # accuracy on all 10,000 test images, and speed
    python benchmarks/spine.py deit                                              # speed of DeiT-S/16 at 224, random weights
    python benchmarks/spine.py profile --depth 4                                 # where both runtimes spend the time of DeiT-S
    python benchmarks/spine.py dinov2 --weights W.safetensors --photos FOLDER     # feature error of each step on real photographs

Needs `pip install -e ".[bench]"`. Writes docs/results/<name>.json, with the processor's best
instructions in the name where speed is measured, and prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from rich.progress import Progress
from torch import Tensor, nn

import vitreous as vt
from vitreous.processor import multiplies_bf16, saturates
from vitreous.prove import Proof
from vitreous.ship import ship_all
from vitreous.ship.runtime import files

RESULTS = Path(__file__).parent.parent / "docs" / "results"


class Peer:
    """Another tool's model behind the interface that `prove` measures."""

    def __init__(self, kind: str, run: Callable[[np.ndarray], np.ndarray], size: int) -> None:
        self.kind, self.run, self.bytes = kind, run, size

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.run(np.ascontiguousarray(x.numpy())))


def size_of(path: Path) -> int:
    return sum(p.stat().st_size for p in files(path))


def onnxruntime(path: Path, kind: str, threads: int) -> Peer:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads slow down whoever is timed next
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Peer(kind, lambda x: session.run(None, {name: x})[0], size_of(path))


def onnxruntime_int8(path: Path, threads: int) -> Peer:
    """ONNX Runtime's dynamic quantization, as its documentation recommends for transformers."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready, target = path.with_name("ort-ready.onnx"), path.with_name("ort-int8.onnx")
    quant_pre_process(path, ready, skip_symbolic_shape=True)
    quantize_dynamic(ready, target)
    return onnxruntime(target, "ONNX Runtime int8 dynamic", threads)


def nncf_int8(path: Path, images: Tensor, threads: int, fix_overflow: bool = False, precision: str = "f32") -> Peer:
    """NNCF's post-training quantization with its transformer preset, on the same calibration images.

    fix_overflow: keep weights to 7 bits, for processors without VNNI. precision: of what is not integers.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    nncf.set_log_level(logging.ERROR)
    data = nncf.Dataset(images.split(1), lambda x: x.numpy())
    model = nncf.quantize(
        ov.Core().read_model(path),
        data,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE) if fix_overflow else None,
    )
    target = path.with_name(f"nncf{'-fixed' * fix_overflow}.xml")
    ov.save_model(model, target, compress_to_fp16=False)
    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    compiled = ov.Core().compile_model(target, "CPU", config)
    return Peer("OpenVINO int8 by NNCF", lambda x: compiled(x)[0], size_of(target))


class Bf16(nn.Module):
    """timm's model under bf16 autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.num_classes = model.num_classes

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x).float()


def field(
    model: nn.Module, images: Tensor, recipes: dict[str, list[vt.Step]], threads: int, folder: Path, r: int
) -> dict[str, Any]:
    """Every model of a comparison; the first is the reference. Each recipe runs in both runtimes, from the same export.

    bf16 is compared where the processor multiplies it: where it is emulated it takes ten times as long as fp32.
    """
    bf16 = multiplies_bf16()
    tome = vt.slim(model, vt.tokens.ToMe(r=r))
    ship_all(model, [folder / "original.onnx", folder / "original.xml"], example=images[:16])
    models: dict[str, Any] = {
        "timm fp32 eager": model,
        **({"timm bf16 autocast": Bf16(model)} if bf16 else {}),
        f"ToMe r={r}, eager": tome,
        "ONNX Runtime fp32": onnxruntime(folder / "original.onnx", "ONNX Runtime fp32", threads),
        "ONNX Runtime int8 dynamic": onnxruntime_int8(folder / "original.onnx", threads),
        "OpenVINO fp32": vt.Runtime(folder / "original.xml", threads=threads),
        **({"OpenVINO bf16": vt.Runtime(folder / "original.xml", threads=threads, precision="bf16")} if bf16 else {}),
        "OpenVINO int8 by NNCF": nncf_int8(folder / "original.xml", images, threads),
    }
    for i, (name, steps) in enumerate(recipes.items()):
        small = vt.slim(model, steps, images)
        for shipment in ship_all(small, [folder / f"{i}.onnx", folder / f"{i}.xml"], example=images[:16]):
            runtime = vt.Runtime(shipment.path, threads=threads)
            models[f"Vitreous {name}, {runtime.engine}"] = runtime
        if bf16:
            models[f"Vitreous {name}, OpenVINO bf16"] = vt.Runtime(folder / f"{i}.xml", threads=threads, precision="bf16")
    return models


def show(proof: Proof, name: str) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    proof.save(RESULTS / f"{name}-{proof.machine['instructions'][-1]}.json")  # speed is the processor's
    batches = proof.batches
    head = ["model", "accuracy %", "Δ points [95 %]", *(f"b{b} ms/image" for b in batches), *(f"b{b} ×" for b in batches), "MB"]
    where = f"{proof.threads} threads, {proof.machine.get('cpu', '')}, {proof.date}, seed {proof.seed}"
    print(f"\n{proof.data}, {proof.images} images, {where}\n")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for m in proof.models:
        a, d = m.answers.accuracy, m.answers.difference
        times = {t.batch: t for t in m.latency}
        cells = [m.name, f"{100 * a.value:.2f}" if a else "–"]
        cells.append(f"{100 * d.value:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]" if d else "–")
        cells += [f"{times[b].median:.3f}" if b in times else "simulated" for b in batches]
        cells += [f"{r.value:.2f}" if b in times and (r := times[b].ratio) else "–" for b in batches]
        cells.append(f"{m.cost.bytes / 1e6:.1f}" if m.cost.bytes else "–")
        print("| " + " | ".join(cells) + " |")


def bundled(a: argparse.Namespace, folder: Path, progress: Callable[[str, float], None]) -> None:
    model = vt.open()
    images = vt.data.calibration("sample", model, 128, a.seed)
    data = vt.data.open_data("fashion-mnist", model, root=a.data)
    recipes: dict[str, list[vt.Step]] = {
        "RepQ W8A8": [vt.quant.RepQ()],
        "EViT 0.2 in block 0": [vt.tokens.EViT(keep=0.2, at=(0,))],
        "EViT 0.2 in block 0 + RepQ W8A8": [vt.tokens.EViT(keep=0.2, at=(0,)), vt.quant.RepQ()],
    }
    models = field(model, images, recipes, a.threads, folder, r=5)
    show(vt.prove(models, data, batches=(1, 64), seconds=a.seconds, threads=a.threads, seed=a.seed, progress=progress), "bundled")


def deit(a: argparse.Namespace, folder: Path, progress: Callable[[str, float], None]) -> None:
    torch.manual_seed(a.seed)
    model = vt.open("deit_small_patch16_224")
    images = torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(a.seed))
    recipes: dict[str, list[vt.Step]] = {
        "RepQ W8A8": [vt.quant.RepQ()],
        "EViT 0.7": [vt.tokens.EViT(keep=0.7)],
        "EViT 0.7 + RepQ W8A8": [vt.tokens.EViT(keep=0.7), vt.quant.RepQ()],
        "EViT 0.5 + RepQ W8A8": [vt.tokens.EViT(keep=0.5), vt.quant.RepQ()],
        "EViT 0.2 in block 0, 0.5 in block 6 + RepQ W8A8": [
            vt.tokens.EViT(keep=0.2, at=(0,)),
            vt.tokens.EViT(keep=0.5, at=(6,)),
            vt.quant.RepQ(),
        ],
    }
    models = field(model, images, recipes, a.threads, folder, r=13)
    data = (images[:16], None)
    show(vt.prove(models, data, batches=(1, 16), seconds=a.seconds, threads=a.threads, seed=a.seed, progress=progress), "deit")


def openvino_operators(path: Path, x: np.ndarray, threads: int, rounds: int) -> tuple[dict[str, float], float]:
    """Milliseconds of each kind of operator in one call, as OpenVINO counts them, and of the whole call: medians."""
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(path, "CPU", {**config, "PERF_COUNT": True}).create_infer_request()
    counted, whole = [], []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        request.infer([x], share_inputs=True)
        whole.append(1000 * (time.perf_counter() - start))
        kinds: dict[str, float] = {}
        for info in request.profiling_info:
            kind = f"{info.node_type} {info.exec_type.rsplit('_', 1)[-1]}"
            kinds[kind] = kinds.get(kind, 0) + info.real_time.total_seconds() * 1000
        counted.append(kinds)
    return {k: float(np.median([c.get(k, 0) for c in counted[2:]])) for k in counted[-1]}, float(np.median(whole[2:]))


def onnxruntime_operators(path: Path, x: np.ndarray, threads: int, rounds: int) -> tuple[dict[str, float], float]:
    """The same of ONNX Runtime, with the settings of `vt.Runtime`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    options.profile_file_prefix = str(path.with_suffix(""))
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(path, options, ["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"])
    whole = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        session.run(None, {"images": x})
        whole.append(1000 * (time.perf_counter() - start))
    events = [e for e in json.loads(Path(session.end_profiling()).read_text()) if e.get("name", "").endswith("_kernel_time")]
    kinds: dict[str, dict[str, list[float]]] = {}
    for e in events:
        kinds.setdefault(e["args"]["op_name"], {}).setdefault(e["name"], []).append(e["dur"] / 1000)
    return {k: sum(float(np.median(t[2:])) for t in nodes.values()) for k, nodes in kinds.items()}, float(np.median(whole[2:]))


def profile(a: argparse.Namespace, folder: Path, progress: Callable[[str, float], None]) -> None:
    """Where the time goes, by operator and precision, and each file's error: ours, NNCF's, ONNX Runtime's own integers."""
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    model = vt.open("deit_small_patch16_224", depth=a.depth)
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(a.seed))
    shown: list[tuple[str, Path]] = []
    for name, m in {"fp32": model, "RepQ W8A8": vt.slim(model, [vt.quant.RepQ()], images)}.items():
        made = ship_all(m, [folder / f"{name}.onnx", folder / f"{name}.xml"], example=images)
        shown += [(name, shipment.path) for shipment in made]
    onnxruntime_int8(folder / "fp32.onnx", a.threads)
    nncf_int8(folder / "fp32.xml", images, a.threads)
    shown += [("ONNX Runtime's own int8 dynamic", folder / "ort-int8.onnx"), ("int8 by NNCF", folder / "nncf.xml")]
    with torch.inference_mode():
        wanted = model.eval()(images)
    print(f"\nDeiT-S/16 at 224, {a.depth} blocks, batch 16, {a.threads} threads; load average {os.getloadavg()[0]:.1f}\n")
    print("| file | error | ms/image | share of the time |\n|---|---|---|---|")
    for name, path in shown:
        runtime = vt.Runtime(path, threads=a.threads)
        error = ((runtime(images) - wanted).norm(dim=1) / wanted.norm(dim=1)).mean()
        count = openvino_operators if path.suffix == ".xml" else onnxruntime_operators
        kinds, whole = count(path, images.numpy(), a.threads, rounds=5)
        total = sum(kinds.values())
        shares = ", ".join(f"{k} {100 * v / total:.0f} %" for k, v in sorted(kinds.items(), key=lambda kind: -kind[1])[:9])
        print(f"| {name}, {runtime.engine} | {error:.1e} | {whole / 16:.1f} | {shares} |", flush=True)


def dinov2(a: argparse.Namespace, folder: Path, progress: Callable[[str, float], None]) -> None:
    model = vt.open("vit_small_patch14_dinov2", checkpoint=a.weights, img_size=224)
    data = vt.data.open_data(a.photos, model)
    images = data.tensor(range(32))
    steps: dict[str, list[vt.Step]] = {
        "EViT 0.9": [vt.tokens.EViT(keep=0.9)],
        "EViT 0.7": [vt.tokens.EViT(keep=0.7)],
        "ToMe r=8": [vt.tokens.ToMe(r=8)],
        "Heads 10 %": [vt.prune.Heads(share=0.1)],
        "MinMax W8A8": [vt.quant.MinMax()],
        "RepQ W8A8": [vt.quant.RepQ()],
        "RepQ W4A4": [vt.quant.RepQ(weights=4, activations=4)],
        "ToMe r=8 + RepQ W8A8": [vt.tokens.ToMe(r=8), vt.quant.RepQ()],
    }
    models: dict[str, Any] = {"original": model, **{n: vt.slim(model, s, images) for n, s in steps.items()}}
    path = folder / "shipped.xml"
    print(vt.ship(models["ToMe r=8 + RepQ W8A8"], path, example=data.tensor(range(16))))
    models["shipped: ToMe r=8 + RepQ W8A8"] = vt.Runtime(path, threads=a.threads)
    proof = vt.prove(models, data, batches=(1,), rounds=1, threads=a.threads, seed=a.seed, progress=progress)  # no speeds here
    RESULTS.mkdir(parents=True, exist_ok=True)
    proof.save(RESULTS / "dinov2.json")
    print(f"\n{proof.data}, {proof.images} photographs, {proof.machine.get('cpu', '')}, {proof.date}\n")
    print("| step | feature error, mean | worst | cosine, mean | attention drift |\n|---|---|---|---|---|")
    for m in proof.models[1:]:
        f, d = m.answers.features, m.drift
        assert f is not None
        moved = f"{d.total_variation.value:.3f}" if d else "–"
        print(f"| {m.name} | {f.mean:.4f} | {f.worst:.3f} | {f.mean_cosine:.5f} | {moved} |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("bundled", "deit", "profile", "dinov2"))
    p.add_argument("--data", default=None, help="folder with Fashion-MNIST's IDX files")
    p.add_argument("--weights", type=Path, help="DINOv2 ViT-S/14 under timm's names")
    p.add_argument("--photos", help="folder of photographs")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seconds", type=float, default=60.0)
    p.add_argument("--depth", type=int, default=12, help="blocks of the profiled model")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder, Progress() as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, share: float) -> None:
            tasks[what] = tasks[what] if what in tasks else bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share)

        {"bundled": bundled, "deit": deit, "profile": profile, "dinov2": dinov2}[a.what](a, Path(folder), progress)


if __name__ == "__main__":
    main()
