"""The figures of docs/quant.md: every quantizer at 8, 6 and 4 bits, beside NNCF, ONNX Runtime and torchao.

    python benchmarks/quant.py dinov2 --weights W.safetensors --data /usr/share/datasets/fashion-mnist   # feature error
    python benchmarks/quant.py photos --weights W.safetensors --photos FOLDER   # the same on photographs, and neighbours
    python benchmarks/quant.py bundled --data /usr/share/datasets/fashion-mnist # accuracy of the bundled model
    python benchmarks/quant.py cifar10 --weights W --head H --photos cifar10-jpeg   # of a ViT fine-tuned by tokens.py
    python benchmarks/quant.py agreement --weights W --data /usr/share/datasets/fashion-mnist   # runtimes against the simulated
    python benchmarks/quant.py calibration --weights W --data /usr/share/datasets/fashion-mnist   # how long each method takes
    python benchmarks/quant.py speed --weights W --data /usr/share/datasets/fashion-mnist   # what runs in integers, and its peers

What is measured is kept in docs/results/quant-<what>.json, method by method: a run that was stopped goes on, and `--only` names
the methods to measure. `dinov2` is the protocol of docs/quant.md: calibrated on the first 32 training images of Fashion-MNIST,
tested on the first 100 test images, bicubic to 224 pixels, normalised as ImageNet; the error is the relative L2 distance of the
class feature from that of the float model, mean over images. `speed` is the same protocol,
all models interleaved in one run. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from spine import nncf_int8
from torch import Tensor, nn
from torchvision.transforms import functional as TF

import vitreous as vt
from vitreous.data.fashion import fashion_arrays
from vitreous.processor import multiplies_bf16, saturates
from vitreous.prove.machine import describe
from vitreous.prove.statistics import paired_difference
from vitreous.ship import ship, ship_all

DOCS = Path(__file__).parent.parent / "docs"
BITS = ((8, 8), (6, 6), (4, 4))
Run = Callable[[Tensor], Tensor]

q = vt.quant
METHODS: dict[str, Callable[[int, int], vt.Step]] = {  # ranges are whole, as if every machine multiplied int8 exactly
    "MinMax": lambda w, a: q.MinMax(w, a, reduce_range=False),
    "Percentile": lambda w, a: q.Percentile(w, a, reduce_range=False),
    "MSE": lambda w, a: q.MSE(w, a, reduce_range=False),
    "SmoothQuant": lambda w, a: q.SmoothQuant(w, a, reduce_range=False),
    "RepQ": lambda w, a: q.RepQ(w, a, reduce_range=False),
    "AdaLog": lambda w, a: q.AdaLog(w, a, reduce_range=False),
    "DopQ": lambda w, a: q.DopQ(w, a, reduce_range=False),
    "MPTQ": lambda w, a: q.MPTQ(w, a, reduce_range=False),
    "MPTQ mixed": lambda w, a: q.MPTQ(w, a, mixed=True, reduce_range=False),
    "LRPQViT": lambda w, a: q.LRPQViT(w, a, mixed=False, reduce_range=False),
    "LRPQViT mixed": lambda w, a: q.LRPQViT(w, a, reduce_range=False),
    "ISViT": lambda w, a: q.ISViT(w, a, reduce_range=False),
    "GradientPTQ": lambda w, a: q.GradientPTQ(w, a, mixed=False, reduce_range=False),
    "GradientPTQ mixed": lambda w, a: q.GradientPTQ(w, a, reduce_range=False),
    "Auto": lambda w, a: q.Auto(w, a, reduce_range=False),
    "Auto, products too": lambda w, a: q.Auto(w, a, softmax=True, reduce_range=False),
}
ONCE: dict[str, Callable[[], vt.Step]] = {  # of one precision only
    "IViT": lambda: q.IViT(),
    "WeightOnly 8": lambda: q.WeightOnly(8),
    "WeightOnly 4": lambda: q.WeightOnly(4),
    "WeightOnly 4 learned": lambda: q.WeightOnly(4, rounding="learned"),
    "WeightOnly 4 second-order": lambda: q.WeightOnly(4, rounding="second-order"),
}


def linear_only(model: nn.Module, w: int, a: int, images: Tensor) -> nn.Module:
    """Min-max of the linear layers alone, the attention products in floats: the first row of the protocol."""
    small = q.MinMax(w, a, reduce_range=False).apply(model, images)
    for block in small.blocks:
        block.attn.operands = None
    return small


def torchao_int8(model: nn.Module, dynamic: bool) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    small = copy.deepcopy(model)
    quantize_(small, Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig())
    return small


def onnxruntime_static(path: Path, images: Tensor, threads: int, reduce_range: bool = False) -> Run:
    """ONNX Runtime's own static quantization of the linear layers, int8 weights for each channel, as its documentation says."""
    import onnx
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images.split(1))

        def get_next(self) -> Any:
            image = next(self.left, None)
            return None if image is None else {"images": image.numpy()}

    ready, target = path.with_name("static-ready.onnx"), path.with_name(f"static{'-7' * reduce_range}.onnx")
    quant_pre_process(path, ready, skip_symbolic_shape=True)
    graph = onnx.load(ready).graph
    stored = {t.name for t in graph.initializer}
    linear = [n.name for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in stored]
    quantize_static(
        ready,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        nodes_to_quantize=linear,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def entries(model: nn.Module, images: Tensor, a: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Run]]:
    """What to measure, by name; each is made when its turn comes."""

    def applied(step: vt.Step) -> Callable[[], Run]:
        return lambda: step.apply(model, images)

    found: dict[str, Callable[[], Run]] = {}
    for w, x in BITS:
        found[f"MinMax, linear layers only W{w}A{x}"] = lambda w=w, x=x: linear_only(model, w, x, images)
        for name, make in METHODS.items():
            if ("mixed" not in name or w < 8) and ("products" not in name or w == 8):
                found[f"{name} W{w}A{x}"] = applied(make(w, x))
    found |= {name: applied(make()) for name, make in ONCE.items()}

    def shipped() -> Run:
        small = q.Auto(reduce_range=False).apply(model, images)
        ship(small, folder / "auto.onnx", example=images[:8], overwrite=True)
        return vt.Runtime(folder / "auto.onnx", threads=a.threads)

    def original() -> Path:
        path = folder / "float.onnx"
        if not path.exists():
            ship(model, path, example=images[:8])
        return path

    found["Auto W8A8, shipped in ONNX Runtime"] = shipped
    found["NNCF int8"] = lambda: nncf_int8(original(), images, a.threads)
    found["NNCF int8, overflow_fix"] = lambda: nncf_int8(original(), images, a.threads, True)
    found["ONNX Runtime static int8, linear layers"] = lambda: onnxruntime_static(original(), images, a.threads)
    found["ONNX Runtime static int8, reduce_range"] = lambda: onnxruntime_static(original(), images, a.threads, True)
    found["torchao int8 dynamic"] = lambda: torchao_int8(model, True)
    found["torchao int8 weight-only"] = lambda: torchao_int8(model, False)
    return found


def outputs(run: Run, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([run(part) for part in x.split(64)]).float()


def neighbours(features: Tensor) -> Tensor:
    """Of each image the one whose feature is nearest by angle."""
    unit = nn.functional.normalize(features, dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).argmax(1)


def measure(model: nn.Module, images: Tensor, x: Tensor, y: Tensor | None, a: argparse.Namespace) -> None:
    path = DOCS / "results" / f"quant-{a.what}.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    wanted = outputs(model, x)
    with tempfile.TemporaryDirectory() as folder:
        for name, make in entries(model, images, a, Path(folder)).items():
            if name in kept["rows"] or (a.only and not any(part in name for part in a.only)):
                continue
            began = time.perf_counter()
            try:
                run = make()
            except vt.VitreousError as error:
                kept["rows"][name] = {"refused": str(error)}
            else:
                seconds, got = time.perf_counter() - began, outputs(run, x)
                off = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
                row: dict[str, Any] = {"error": off.mean().item(), "worst": off.max().item(), "seconds": seconds}
                row |= {"threads": a.threads, "instructions": describe()["instructions"], "date": time.strftime("%Y-%m-%d")}
                if y is None:
                    row["neighbours"] = (neighbours(got) == neighbours(wanted)).float().mean().item()
                else:
                    before, after = (logits.argmax(1) == y for logits in (wanted, got))
                    d = paired_difference(int((before & ~after).sum()), int((after & ~before).sum()), len(y), a.seed)
                    row |= {"accuracy": after.float().mean().item(), "difference": [d.value, d.low, d.high]}
                kept["rows"][name] = row
            print(name, kept["rows"][name], flush=True)
            kept |= {"images": len(x), "calibration": len(images), "machine": describe()}
            path.write_text(json.dumps(kept, indent=1) + "\n")
    show(kept)
    plot(kept, a.what)


def plot(kept: dict[str, Any], what: str) -> None:
    """Every method a row, its figure at each precision a point: docs/quant-<what>.png."""
    names = [n for n in ("MinMax, linear layers only", *METHODS) if any(f"{n} W{w}A{x}" in kept["rows"] for w, x in BITS)]
    once = [n for n, r in kept["rows"].items() if "error" in r and not any(n.endswith(f" W{w}A{x}") for w, x in BITS)]
    accuracy = any("accuracy" in r for r in kept["rows"].values())
    figure, axes = plt.subplots(figsize=(9, 0.27 * (len(names) + len(once)) + 1.4), layout="constrained")
    series = [(f"W{w}A{x}", [f"{n} W{w}A{x}" for n in names]) for w, x in BITS] + [("as it comes", once)]
    looks = zip(series, ("#1b7837", "#e08214", "#7b3294", "#555555"), "osD^", (-0.22, 0, 0.22, 0), strict=True)
    for (label, keys), colour, marker, beside in looks:
        above = len(names) * (keys is once) + beside * accuracy  # intervals lie beside each other
        found = [(i + above, kept["rows"][k]) for i, k in enumerate(keys) if k in kept["rows"]]
        found = [(i, r) for i, r in found if "error" in r]
        at = [i for i, _ in found]
        if accuracy:
            values = [100 * r["difference"][0] for _, r in found]
            off = [[100 * abs(r["difference"][j] - r["difference"][0]) for _, r in found] for j in (1, 2)]
            axes.errorbar(values, at, xerr=off, fmt=marker, color=colour, label=label, markersize=5, linewidth=1)
        else:
            axes.plot([r["error"] for _, r in found], at, marker, color=colour, label=label, markersize=5)
    axes.set_yticks(range(len(names) + len(once)), names + once)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    if accuracy:
        axes.axvline(0, color="#999999", linewidth=1)
        axes.set_xlabel("accuracy above the float model, points, with 95 % interval")
    else:
        axes.set_xscale("log")
        axes.set_xlabel("relative error of the feature against the float model, mean over images")
    axes.legend(frameon=False, loc="best")
    figure.savefig(DOCS / f"quant-{what}.png", dpi=120)


def show(kept: dict[str, Any]) -> None:
    shown = [r for r in kept["rows"].values() if "error" in r]
    accuracy, near = any("accuracy" in r for r in shown), any("neighbours" in r for r in shown)
    head = ["method", *(f"W{w}A{x}" for w, x in BITS), "calibration at W4A4, s"]
    value = lambda r: f"{r['error']:.3f}"
    if accuracy:  # points above the float model, with interval
        value = lambda r: "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * d for d in r["difference"]))
    if near:
        value = lambda r: f"{r['error']:.3f}, {100 * r['neighbours']:.0f} %"
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in ("MinMax, linear layers only", *METHODS):
        found = [kept["rows"].get(f"{name} W{w}A{x}", {}) for w, x in BITS]
        cells = [value(r) if "error" in r else "–" for r in found]
        print(f"| {name} | " + " | ".join(cells) + f" | {found[-1].get('seconds', float('nan')):.0f} |")
    for name, r in kept["rows"].items():
        if "error" in r and not any(name.endswith(f" W{w}A{x}") for w, x in BITS):
            print(f"| {name} | {value(r)} | | | |")


def calibration(model: nn.Module, images: Tensor, x: Tensor, a: argparse.Namespace) -> None:
    """Seconds that each method takes for the 32 images, at 8 and 4 bits, on a machine that does nothing else."""
    path = DOCS / "results" / "quant-calibration.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"seconds": {}}
    for name, make in METHODS.items():
        for w in (8, 4):
            row = f"{name} W{w}A{w}"
            unasked = row in kept["seconds"] or (a.only and not any(part in row for part in a.only))
            if unasked or "products" in name or (w == 8 and "mixed" in name):
                continue
            began = time.perf_counter()
            make(w, w).apply(model, images)
            kept["seconds"][row] = time.perf_counter() - began
            kept |= {"threads": a.threads, "machine": describe(), "date": time.strftime("%Y-%m-%d")}
            path.write_text(json.dumps(kept, indent=1) + "\n")
            print(f"{row}: {kept['seconds'][row]:.0f} s", flush=True)


def speed(model: nn.Module, images: Tensor, x: Tensor, a: argparse.Namespace) -> None:
    """All that executes integers, ours and the peers', error and speed in one interleaved run."""
    made = {"Auto": q.Auto(), "MinMax": q.MinMax(), "WeightOnly 8": q.WeightOnly(8), "WeightOnly 4": q.WeightOnly(4)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run: dict[str, Any] = {"torch fp32": model}
        small = {what: step.apply(model, images) for what, step in made.items()}
        for what, net in {"fp32": model, **small}.items():
            file = folder / ("float" if what == "fp32" else what.replace(" ", "-"))
            ship_all(net, [file.with_suffix(".onnx"), file.with_suffix(".xml")], example=images[:8])
            run[f"{what}, ONNX Runtime"] = vt.Runtime(file.with_suffix(".onnx"), threads=a.threads)
            run[f"{what}, OpenVINO"] = vt.Runtime(file.with_suffix(".xml"), threads=a.threads, precision="f32")
            if multiplies_bf16():
                run[f"{what}, OpenVINO, rest in bf16"] = vt.Runtime(file.with_suffix(".xml"), threads=a.threads, precision="bf16")
        original = folder / "float.onnx"
        run["NNCF int8, OpenVINO"] = nncf_int8(original, images, a.threads)
        run["ONNX Runtime's static int8"] = onnxruntime_static(original, images, a.threads)
        if multiplies_bf16():
            run["NNCF int8, OpenVINO, rest in bf16"] = nncf_int8(original, images, a.threads, precision="bf16")
        if saturates():
            run["NNCF int8, overflow_fix, OpenVINO"] = nncf_int8(original, images, a.threads, True)
            run["ONNX Runtime's static int8, reduce_range"] = onnxruntime_static(original, images, a.threads, True)
        compiled = torch.compile(torchao_int8(model, True))
        run["torchao int8 dynamic, compiled"] = lambda x: compiled(x)  # no module: looking into it takes minutes
        proof = vt.prove(run, (x, None), batches=(1, 16), seconds=a.seconds, threads=a.threads, seed=a.seed)
    rows = []
    for m in proof.models:
        error = m.answers.features.mean if m.answers.features else 0.0
        rows.append({"model": m.name, "error": error, "ms": [t.median for t in m.latency]})
    stamp = (
        f"{proof.images} test images, {proof.threads} threads, {proof.machine.get('cpu', '')}, {proof.date}, seed {proof.seed}"
    )
    content = {"stamp": stamp, "machine": proof.machine, "rows": rows}
    best = proof.machine["instructions"][-1]
    (DOCS / "results" / f"quant-speed-{best}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{stamp}\n\n| | error | b1, ms | b16, ms an image | × b16 |\n|---|---|---|---|---|")
    for r in rows:
        b1, b16 = r["ms"][0], r["ms"][1]
        print(f"| {r['model']} | {r['error']:.3f} | {b1:.1f} | {b16:.1f} | {rows[0]['ms'][1] / b16:.2f} |")


def agreement(model: nn.Module, images: Tensor, x: Tensor, a: argparse.Namespace) -> None:
    """How far the runtimes are from the simulated model, and how far noise of 1e-5 in the images moves that by itself."""
    noise = 1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(a.seed))
    made = {"MinMax": q.MinMax(), "MinMax, 8-bit weights": q.MinMax(reduce_range=False), "Auto": q.Auto()}
    print("| | noise | ONNX Runtime | OpenVINO |\n|---|---|---|---|")
    for what, step in made.items():
        small = step.apply(model, images)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            simulated = small(x)
            files = [Path(folder) / "small.onnx", Path(folder) / "small.xml"]
            ship_all(small, files, example=images[:16], tolerance=1.0)
            answers = [small(x + noise), *(vt.Runtime(file, threads=a.threads)(x) for file in files)]
        off = ((y - simulated).norm(dim=1) / simulated.norm(dim=1) for y in answers)
        print(f"| {what} | " + " | ".join(f"{o.mean():.3f}" for o in off) + " |", flush=True)


MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def fashion_at_224(part: str, n: int, root: str | None) -> Tensor:
    pictures, _ = fashion_arrays(part, root)
    sized = (Image.fromarray(p).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for p in pictures[:n])
    return torch.stack([(TF.to_tensor(p) - MEAN) / STD for p in sized])


def dinov2(a: argparse.Namespace) -> nn.Module:
    return vt.open("vit_small_patch14_dinov2", checkpoint=a.weights, img_size=224)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("dinov2", "photos", "bundled", "cifar10", "agreement", "calibration", "speed"))
    p.add_argument("--data", default=None, help="folder with Fashion-MNIST's IDX files")
    p.add_argument("--weights", type=Path, help="DINOv2 ViT-S/14 under timm's names")
    p.add_argument("--head", type=Path, help="its fine-tuned weights, as benchmarks/tokens.py keeps them")
    p.add_argument("--photos", help="folder of photographs, or of CIFAR-10 with train/ and test/")
    p.add_argument("--test", type=int, default=None, help="test images; by default 100 (dinov2), 256 (photos), or all")
    p.add_argument("--only", nargs="*", help="parts of the names of what is to be measured")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seconds", type=float, default=240.0, help="for timing (speed)")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    if a.what in ("dinov2", "agreement", "calibration", "speed"):
        model, images, x = dinov2(a), fashion_at_224("train", 32, a.data), fashion_at_224("test", a.test or 100, a.data)
        if a.what == "dinov2":
            measure(model, images, x, None, a)
        else:
            {"agreement": agreement, "calibration": calibration, "speed": speed}[a.what](model, images, x, a)
    elif a.what == "photos":
        model = dinov2(a)
        data = vt.data.open_data(a.photos, model, seed=a.seed)
        drawn = np.random.default_rng(a.seed).permutation(len(data))
        measure(model, data.tensor(drawn[:32]), data.tensor(drawn[32 : 32 + (a.test or 256)]), None, a)
    elif a.what == "bundled":
        model = vt.open()
        data = vt.data.open_data("fashion-mnist", model, root=a.data, limit=a.test, seed=a.seed)
        images = vt.data.calibration("sample", model, 128, a.seed)
        measure(model, images, data.tensor(range(len(data))), torch.as_tensor(data.labels), a)
    else:
        model = vt.open("vit_small_patch14_dinov2", checkpoint=a.weights, img_size=98)
        model.reset_classifier(10)
        model.load_state_dict(load_file(a.head))
        data = vt.data.open_data(Path(a.photos) / "test", model, limit=a.test, seed=a.seed)
        images = vt.data.calibration(Path(a.photos) / "train", model, 128, a.seed)
        measure(model, images, data.tensor(range(len(data))), torch.as_tensor(data.labels), a)


if __name__ == "__main__":
    main()
