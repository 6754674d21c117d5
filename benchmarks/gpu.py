"""Every way to run a model on a GPU: does it compute the same, and how fast, beside timm in bf16 under torch.compile.

    python benchmarks/gpu.py                       # DeiT-S/16 and DINOv2 ViT-S/14 at 224, random weights; under eight minutes
    python benchmarks/gpu.py --device cpu --tiny   # one small block, to see that every path works

Everything is compiled first, by several processes; what is timed then comes from torch's cache. Paths whose library or provider
is missing here are named with the reason. ONNX Runtime with CUDA and TensorRT needs `onnxruntime-gpu`, int8 in torch `torchao`.
Times are medians of interleaved calls, images and answers on the device except where ONNX Runtime copies them. The error is that
of a path beside the same recipe in float32.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vitreous as vt
from vitreous.prove.latency import interleave
from vitreous.ship.inductor import load_inductor, ship_inductor

Run = Callable[[Tensor], Tensor]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeiT-S/16 at 224": ("deit_small_patch16_224", {}),
    "DINOv2 ViT-S/14 at 224": ("vit_small_patch14_dinov2", {"img_size": 224}),
    "tiny": ("vit_tiny_patch16_224", dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=7)),
}
BASELINE = "timm bf16 + torch.compile"
GRAPHS = f"{BASELINE}, CUDA graphs"
SPARSE = "2:4"
SMALLER = {"EViT 0.7": vt.tokens.EViT(keep=0.7), "EViT 0.5": vt.tokens.EViT(keep=0.5), SPARSE: vt.prune.TwoFour()}


def built(name: str, recipe: str = "") -> nn.Module:
    torch.manual_seed(0)
    called, arguments = MODELS[name]
    model = vt.open(called, **arguments).eval()
    return vt.slim(model, SMALLER[recipe]) if recipe else model


def ways(name: str, device: str) -> list[str]:
    low, shrunk = ("bfloat16", "float16") if device == "cuda" else ("bfloat16",), SMALLER if name != "tiny" else ()
    graphs = [GRAPHS] if device == "cuda" else []
    found = [BASELINE, *graphs, "timm fp32", *(f"AOTInductor {d}" for d in low), "AOTInductor launched anew", "torchao int8"]
    found += [f"{r}, {way}" for r in shrunk if r != SPARSE for way in (f"AOTInductor {low[-1]}", *graphs)]
    found += ["timm fp16", f"{SPARSE}, its kernels fp16"] if graphs and shrunk else []
    return [*found, "ONNX Runtime CUDA fp32", "ONNX Runtime TensorRT fp16"]


def recipe_of(way: str) -> str:
    return next((r for r in SMALLER if way.startswith(r)), "")


def made(name: str, way: str, images: Tensor, folder: Path) -> Run:
    """Raises whatever the path raises that this machine cannot run."""
    recipe = recipe_of(way)
    model, low = built(name, recipe).to(images.device), torch.float16 if images.is_cuda else torch.bfloat16
    if way == "timm fp32":
        return model
    if way.endswith("fp16") and "ONNX" not in way:
        half = vt.prune.on_tensor_cores(model) if recipe else model.half()
        return lambda x: half(x.half())
    if "torch.compile" in way:
        compiled = torch.compile(model.to(torch.bfloat16), mode="reduce-overhead" if way.endswith(GRAPHS) else "default")
        return lambda x: compiled(x.to(torch.bfloat16)).clone()
    if "AOTInductor" in way:
        dtype = torch.bfloat16 if "bfloat16" in way else low
        path = folder / f"{name} {recipe} {dtype}.pt2".replace("/", "-").replace(" ", "_")
        if not path.exists():
            ship_inductor(model, path, images[:4], dtype=dtype, tolerance=0.1)
        return load_inductor(path, graphs="anew" not in way)
    if "torchao" in way:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model.to(torch.bfloat16), Int8DynamicActivationInt8WeightConfig())
        compiled = torch.compile(model, mode="reduce-overhead" if images.is_cuda else "default")
        return lambda x: compiled(x.to(torch.bfloat16)).clone()
    import onnxruntime as ort

    provider = "CUDAExecutionProvider" if "CUDA" in way else "TensorrtExecutionProvider"
    if provider not in ort.get_available_providers():
        raise ImportError(f"onnxruntime has no {provider} here")
    file = folder / "model.onnx"
    vt.ship(model.cpu(), file, example=images[:4].cpu(), overwrite=True)
    session = ort.InferenceSession(file, providers=[(provider, {"trt_fp16_enable": True} if "TensorRT" in way else {})])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.cpu().numpy()})[0])


def pictures(name: str, batch: int, device: str) -> Tensor:
    side = MODELS[name][1].get("img_size", 224)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)


def prepare(name: str, way: str, a: argparse.Namespace, folder: Path) -> str:
    """Compile for every batch in a process of its own; says why not."""
    torch.set_num_threads(2)
    began = time.monotonic()
    try:
        images = pictures(name, a.batch, a.device)
        with torch.no_grad():
            run = made(name, way, images, folder)
            for batch in (a.batch, 1):
                waited(run, images[:batch])
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
    print(f"{name}: {way} ready after {time.monotonic() - began:.0f} s", flush=True)
    return ""


def waited(run: Run, x: Tensor) -> None:
    run(x)
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(name: str, a: argparse.Namespace, folder: Path, failed: dict[tuple[str, str], str]) -> dict[str, Any]:
    start, images = time.monotonic(), pictures(name, a.batch, a.device)
    runs, rows, exact = {}, {}, {}
    for way in ways(name, a.device):
        recipe = recipe_of(way)
        try:
            if reason := failed.get((name, way)):
                raise RuntimeError(reason)
            if recipe not in exact:
                exact[recipe] = built(name, recipe).to(a.device)(images).cpu()
            run = made(name, way, images, folder)
            got, wanted = run(images).float().cpu(), exact[recipe]
        except Exception as error:  # a path that this machine lacks is named, and the others go on
            print(f"{way}: left out, {(str(error).strip().splitlines() or [type(error).__name__])[0][:150]}", flush=True)
            continue
        off = ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).mean().item()
        same = (got.argmax(1) == wanted.argmax(1)).float().mean().item()
        rows[way], runs[way] = {"error": off, "same": same}, run
        print(f"{way}: {off:.1e} off, after {time.monotonic() - start:.0f} s", flush=True)
    for batch in (1, a.batch):
        x = images[:batch].contiguous()
        for run in runs.values():
            waited(run, x)
        print(f"timing {name}, batch {batch}", flush=True)
        time.sleep(1)  # whoever reads this may halt what else runs here
        times = interleave({p: partial(waited, r, x) for p, r in runs.items()}, seconds=a.seconds)
        print("timed", flush=True)
        for way, t in times.items():
            rows[way][f"b{batch}"] = 1000 * sorted(t)[len(t) // 2]
    return rows


def table(name: str, rows: dict[str, Any]) -> None:
    batches = [k for k in rows[BASELINE] if k.startswith("b")]
    print(f"\n| {name} | error | same answer | " + " | ".join(f"{b} ms | ×" for b in batches) + " |\n|---" + "|---" * 6 + "|")
    for way, r in rows.items():
        cells = [f"{r[b]:.2f} | {rows[BASELINE][b] / r[b]:.2f}" for b in batches]
        print(f"| {way} | {r['error']:.1e} | {r['same']:.0%} | " + " | ".join(cells) + " |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="a model of one small block")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--processes", type=int, default=8, help="that compile at once")
    p.add_argument("--seconds", type=float, default=8.0, help="of timing for each model and batch")
    p.add_argument("--out", type=Path, help="write the figures as JSON too")
    a = p.parse_args()
    names = ["tiny"] if a.tiny else [n for n in MODELS if n != "tiny"]
    if a.tiny:
        a.batch, a.processes, a.seconds = 4, 2, 1.0
    jobs = [
        (n, w) for n in names for w in ways(n, a.device) if w != "AOTInductor launched anew"
    ]  # of a file that is made already
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        folder, began = Path(place), time.monotonic()
        with ProcessPoolExecutor(a.processes, multiprocessing.get_context("spawn")) as pool:
            done = {job: pool.submit(prepare, *job, a, folder) for job in jobs}
            failed = {job: reason for job, future in done.items() if (reason := future.result())}
        print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
        found = {name: measure(name, a, folder, failed) for name in names}
    device = torch.cuda.get_device_name() if a.device == "cuda" else "CPU"
    stamp = f"{device}, torch {torch.__version__}, timm {timm.__version__}, {time.strftime('%Y-%m-%d')}"
    for name, rows in found.items():
        table(name, rows)
    print(f"\n{stamp}, {time.monotonic() - began:.0f} s, batch {a.batch}")
    if a.out:
        a.out.write_text(json.dumps({"stamp": stamp, "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
