"""Every way to run a model on a GPU: does it compute the same, and how fast, beside timm in bf16 under torch.compile.

    python benchmarks/gpu.py                       # DeiT-S/16 and DINOv2 ViT-S/14 at 224, random weights; under eight minutes
    python benchmarks/gpu.py --device cpu --tiny   # one small block, to see that every path works

Paths whose library or provider is missing here are named with the reason. ONNX Runtime with CUDA and TensorRT needs
`onnxruntime-gpu`, int8 in torch `torchao`. Times are medians of interleaved calls, images and answers on the device except where
ONNX Runtime copies them.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
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


def compiled(model: nn.Module, dtype: torch.dtype, how: str) -> Run:
    inner = torch.compile(copy.deepcopy(model).to(dtype), mode=how)
    return lambda x: inner(x.to(dtype))


def inductor(model: nn.Module, images: Tensor, folder: Path, dtype: torch.dtype) -> Run:
    path = folder / f"{str(dtype)[6:]}.pt2"
    ship_inductor(model, path, images, dtype=dtype, tolerance=0.1, overwrite=True)
    return load_inductor(path)


def torchao_int8(model: nn.Module, dtype: torch.dtype, how: str) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    inner = copy.deepcopy(model).to(dtype)
    quantize_(inner, Int8DynamicActivationInt8WeightConfig())
    inner = torch.compile(inner, mode=how)
    return lambda x: inner(x.to(dtype))


def onnxruntime(path: Path, provider: str, **options: Any) -> Run:
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        raise ImportError(f"onnxruntime has no {provider} here")
    session = ort.InferenceSession(path, providers=[(provider, options)])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.cpu().numpy()})[0])


def paths(model: nn.Module, images: Tensor, folder: Path, how: str) -> dict[str, Callable[[], Run]]:
    on_gpu = images.is_cuda
    file = folder / "model.onnx"
    low = (torch.bfloat16, torch.float16) if on_gpu else (torch.bfloat16,)
    found: dict[str, Callable[[], Run]] = {
        "timm bf16 + torch.compile": lambda: compiled(model, torch.bfloat16, how),
        "timm fp32 eager": lambda: model,
        **{f"AOTInductor {str(d)[6:]}": (lambda d=d: inductor(model, images, folder, d)) for d in low},
        "torchao int8 + torch.compile": lambda: torchao_int8(model, torch.bfloat16, how),
    }
    providers = {
        "CUDA fp32": ("CUDAExecutionProvider", {}),
        "TensorRT fp16": ("TensorrtExecutionProvider", {"trt_fp16_enable": True}),
    }
    if not on_gpu:
        providers = {"CPU fp32": ("CPUExecutionProvider", {}), **providers}
    for name, (provider, options) in providers.items():
        found[f"ONNX Runtime {name}"] = lambda p=provider, o=options: onnxruntime(file, p, **o)
    return found


def waited(run: Run, x: Tensor) -> None:
    run(x)
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(name: str, model: nn.Module, images: Tensor, seconds: float, how: str) -> None:
    with tempfile.TemporaryDirectory() as place, torch.inference_mode(False), torch.no_grad():
        folder, start = Path(place), time.time()
        vt.ship(copy.deepcopy(model).cpu(), folder / "model.onnx", example=images[:4].cpu())
        wanted, runs, rows = model(images).float().cpu(), {}, {}
        for path, make in paths(model, images, folder, how).items():
            try:
                run = make()
                got = run(images).float().cpu()
            except Exception as error:  # a path that this machine lacks is named, and the others go on
                print(f"{path}: left out, {(str(error).strip().splitlines() or [type(error).__name__])[0][:150]}")
                continue
            off = ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).mean().item()
            print(f"{path}: {off:.1e} off, after {time.time() - start:.0f} s", flush=True)
            rows[path] = [f"{off:.1e}", f"{(got.argmax(1) == wanted.argmax(1)).float().mean():.0%}"]
            runs[path] = run
        batches = (1, len(images))
        for batch in batches:
            x = images[:batch].contiguous()
            times = interleave({p: partial(waited, r, x) for p, r in runs.items()}, seconds=seconds)
            medians = {p: sorted(t)[len(t) // 2] for p, t in times.items()}
            for path, t in medians.items():
                rows[path] += [f"{1000 * t / batch:.3f}", f"{medians['timm bf16 + torch.compile'] / t:.2f}"]
    device = torch.cuda.get_device_name() if images.is_cuda else "CPU"
    print(f"\n{name} on {device}, torch {torch.__version__}, timm {timm.__version__}, {time.time() - start:.0f} s\n")
    print("| path | error | same top-1 | " + " | ".join(f"b{b} ms/image | ×" for b in batches) + " |\n|---" + "|---" * 6 + "|")
    for path, row in rows.items():
        print(f"| {path} | " + " | ".join(row) + " |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="a model of one small block")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--seconds", type=float, default=15.0, help="of timing for each model and batch")
    a = p.parse_args()
    names = {
        "DeiT-S/16 at 224": ("deit_small_patch16_224", {}),
        "DINOv2 ViT-S/14": ("vit_small_patch14_dinov2", {"img_size": 224}),
    }
    side, batch, seconds, how = 224, a.batch, a.seconds, "max-autotune-no-cudagraphs"
    if a.tiny:
        small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 7}
        names, side, batch, seconds, how = {"tiny": ("vit_tiny_patch16_224", small)}, 32, 4, 1.0, "default"
    for name, (called, arguments) in names.items():
        torch.manual_seed(0)
        model = timm.create_model(called, **arguments).eval().to(a.device)
        images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(a.device)
        measure(name, model, images, seconds, how)


if __name__ == "__main__":
    main()
