"""The figures of docs/analytics.md: speed of ablation, memory, agreement of metrics, patterns, paths.

    python benchmarks/heads.py speed --images 16            # against one pass a head, ViT-S/16 at 224, random weights
    python benchmarks/heads.py memory --images 1000         # peak of each analysis on it, each in a process of its own
    python benchmarks/heads.py bundled                      # agreement, patterns and paths on Fashion-MNIST's sample
    python benchmarks/heads.py dinov2 --weights W.safetensors --data photos/

`speed` runs a whole round of each, one after the other, and repeats; `--every` takes only every so many heads of the slow loops
and scales. Each prints Markdown.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import vitreous as vt
from vitreous.see.ablation import hot_blocks, without_each_head
from vitreous.see.distance import MEASURES as OF_DISTANCE
from vitreous.see.head_importance import PRECISIONS, kendall
from vitreous.see.paths import MEASURES


def vit_s(size: int = 224) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224", img_size=size, num_classes=1000).eval()


def loop(model: nn.Module, batches: list[Tensor], every: int, **options: Any) -> tuple[float, dict[tuple[int, int], Tensor]]:
    """Seconds for one pass a head over all batches, and the outputs of the last; with `every` 2 of every second head, doubled."""
    heads = [(layer, head) for layer in range(12) for head in range(6)][::every]
    start, made = time.perf_counter(), {}
    for x in batches:
        with torch.no_grad():
            model(x)
            for layer, head in heads:
                with vt.glass(model, **options) as g:
                    g.mask_heads(layer, head)
                    made[layer, head] = model(x)
    return (time.perf_counter() - start) * 73 / (len(heads) + 1), made


def speed(a: argparse.Namespace) -> None:
    model = vit_s(a.size)
    anatomy = vt.read(model)
    batches = list(torch.randn(a.images, 3, a.size, a.size).split(a.batch))
    seconds: dict[str, list[float]] = {"recording": [], "quiet": [], "f32": [], "bf16": []}
    worst = {"f32": 0.0, "bf16": 0.0}
    for _ in range(a.rounds):
        took, made = loop(model, batches, a.every, record=())
        seconds["quiet"].append(took)
        seconds["recording"].append(loop(model, batches, a.every)[0])
        for precision in worst:
            start, shared, blocks = time.perf_counter(), [], hot_blocks(model, anatomy, precision)
            for x in batches:
                shared = without_each_head(model, x, anatomy, blocks)[1]
            seconds[precision].append(time.perf_counter() - start)
            off = max(float((shared[i][h] - out).abs().max() / out.abs().max()) for (i, h), out in made.items())
            worst[precision] = max(worst[precision], off)
    print(
        f"\n{a.images} images at {a.size}, batch {a.batch}, {torch.get_num_threads()} threads, {a.rounds} rounds, every {a.every}"
    )
    print("\n| one pass a head | s, median | of that shared, f32 | shared, bf16 |\n|---|---|---|---|")
    for name, text in (("recording", "glass(model)"), ("quiet", "glass(model, record=())")):
        ratios = [np.median(np.array(seconds[name]) / seconds[precision]) for precision in worst]
        print(f"| under `{text}` | {np.median(seconds[name]):.1f} | {ratios[0]:.2f} × | {ratios[1]:.2f} × |")
    for precision, off in worst.items():
        took = np.median(seconds[precision])
        print(f"\nshared prefix, batched copies, {precision}: {took:.1f} s; an output is off by {off:.1e} of the largest at most")


class Noise:
    """Images that exist only while they are looked at."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def batches(self, size: int):
        draw = torch.Generator().manual_seed(0)
        for i in range(0, self.n, size):
            b = min(size, self.n - i)
            yield torch.randn(b, 3, 224, 224, generator=draw), torch.randint(1000, (b,), generator=draw)


ANALYSES: dict[str, Callable[..., Any]] = {
    "head_importance": vt.see.head_importance,
    "distance": vt.see.distance,
    "patterns": vt.see.patterns,
    "artifacts": vt.see.artifacts,
    "paths": vt.see.paths,
}


def _peak(name: str, n: int, gate: Any) -> None:
    start = time.perf_counter()
    ANALYSES[name](vit_s(), Noise(n))
    gate.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.perf_counter() - start))


def memory(a: argparse.Namespace) -> None:
    spawn = multiprocessing.get_context("spawn")
    print(f"\n{a.images} images at 224, ViT-S/16, peak of the whole process\n\n| analysis | GiB | s |\n|---|---|---|")
    for name in a.only or ANALYSES:
        gate = spawn.Queue()
        process = spawn.Process(target=_peak, args=(name, a.images, gate))
        process.start()
        gib, took = gate.get()
        process.join()
        print(f"| `{name}` | {gib:.2f} | {took:.0f} |", flush=True)


def agreement(found: vt.see.HeadImportance) -> None:
    print("\n| Kendall's τ | " + " | ".join(found.metrics) + " |\n|" + "---|" * (len(found.metrics) + 1))
    for i, name in enumerate(found.metrics):
        cells = [
            f"{found.agreement[i, j]:.2f} ({found.agreement_low[i, j]:.2f} to {found.agreement_high[i, j]:.2f})"
            if j != i
            else "–"
            for j in range(len(found.metrics))
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def classes(found: vt.see.Patterns) -> None:
    print("\n| pattern | share of heads |\n|---|---|")
    for name, share in found.shares.items():
        print(f"| {name} | {100 * share:.0f} % |")
    print(f"\n{found.images} images; the autoencoder leaves {100 * found.error:.1f} % of the variance")


def bundled(a: argparse.Namespace) -> None:
    model = vt.open()
    data = vt.data.open_data("sample", model, limit=a.images)
    agreement(vt.see.head_importance(model, data))
    classes(vt.see.patterns(model, data))
    # The claim of the path ensemble: some paths pull the answer down. Chosen on one half of the images, cut on the other.
    half = len(data) // 2
    x, y = data.tensor(range(half)), torch.from_numpy(data.labels)
    found = vt.see.paths(model, x, y[:half])
    row = MEASURES.index("loss_without_direct")
    cut = [n for n in range(len(found.names)) if found.high[row, n] < 0]
    print(
        f"\npaths whose direct removal lowers the loss, 95 % interval below 0, on {half} images: {[found.names[n] for n in cut]}"
    )
    other = data.tensor(range(half, len(data)))
    with torch.no_grad():
        outs = {"whole": model(other), "cut": vt.see.without_paths(model, other, cut)}
    for name, out in outs.items():
        loss = torch.nn.functional.cross_entropy(out, y[half:])
        right = (out.argmax(1) == y[half:]).float().mean()
        print(f"{name}: loss {loss:.4f}, accuracy {100 * right:.2f} % on the other {len(other)}")
    print("\n| length | path | " + " | ".join(MEASURES) + " |\n|" + "---|" * (len(MEASURES) + 2))
    for n, name in enumerate(found.names):
        print(f"| {n} | {name} | " + " | ".join(f"{v:.3f}" for v in found.values[:, n]) + " |")


def dinov2(a: argparse.Namespace) -> None:
    model = vt.open("vit_small_patch14_dinov2", checkpoint=a.weights, img_size=224)
    data = vt.data.open_data(a.data, model, limit=a.images)
    classes(vt.see.patterns(model, data))
    for name, (value, low, high) in zip(OF_DISTANCE, vt.see.distance(model, data).trend, strict=True):
        print(f"{name} over layers: {value:.2f} ({low:.2f} to {high:.2f})")
    found = vt.see.artifacts(model, data)
    print("outliers by layer, %: " + ", ".join(f"{100 * s:.2f}" for s in found.norms[0]))
    twice = [vt.see.head_importance(model, data, metrics=["output"], precision=p).values.ravel() for p in PRECISIONS]
    print(f"Kendall's τ of the heads' order in f32 and bf16: {kendall(np.stack(twice))[0, 1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "bundled", "dinov2"))
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", nargs="*", choices=tuple(ANALYSES))
    parser.add_argument("--weights")
    parser.add_argument("--data")
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    a.images = a.images or {"speed": 16, "memory": 1000, "bundled": 1000, "dinov2": 64}[a.what]
    {"speed": speed, "memory": memory, "bundled": bundled, "dinov2": dinov2}[a.what](a)


if __name__ == "__main__":
    main()
