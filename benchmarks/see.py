"""The figures of docs/see.md: are the explanations true, and what do they cost?

    python benchmarks/see.py faithfulness                                                  # bundled model, Fashion-MNIST's sample
    python benchmarks/see.py faithfulness --weights W.safetensors --photos FOLDER          # DINOv2 ViT-S/14 at 224, photographs
    python benchmarks/see.py cost --weights W.safetensors --photos FOLDER                  # multiples of its forward pass
    python benchmarks/see.py rules --weights W.safetensors --photos FOLDER --images 8      # lrp by the stable and published rule
    python benchmarks/see.py memory --only lrp                                             # four images at 518 pixels

`faithfulness` keeps what it measured in docs/results/see-faithfulness-<model>.json, and measures what is not there; `--only`
names methods. What the sanity check found is written to src/vitreous/see/sanity.toml, from which every mark of a failed one
comes. DINOv2 has no classes: it is explained by the squared norm of its features, and the curves are those of the cosine to the
features of the whole photograph. `cost` interleaves all methods with the forward pass.
Prints Markdown. Needs `pip install -e ".[see]"`.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

import vitreous as vt
from vitreous.prove import interleave
from vitreous.prove.machine import describe
from vitreous.prove.statistics import median_ratio
from vitreous.see.methods import sanity

ROOT = Path(__file__).parent.parent
RESULTS, SANITY = ROOT / "docs" / "results", ROOT / "src" / "vitreous" / "see" / "sanity.toml"
Say = Callable[[str, float], None]


def opened(a: argparse.Namespace) -> tuple[str, nn.Module]:
    if a.weights is None:
        return "vit_fashion", vt.open()
    return "dinov2_vits14", vt.open("vit_small_patch14_dinov2", checkpoint=a.weights, img_size=224)


def faithfulness(a: argparse.Namespace, say: Say) -> None:
    name, model = opened(a)
    data = vt.data.open_data(str(a.photos or "sample"), model, limit=a.images, seed=a.seed)
    images = data.tensor(range(len(data)))
    kept = RESULTS / f"see-faithfulness-{name}.json"
    rows: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    asked = {"images": len(images), "sanity_images": a.sanity_images, "steps": a.steps, "seed": a.seed}
    done = [m for m, row in rows.items() if asked.items() <= row.items() and not a.again]
    if explain := {m: vt.see.METHODS[m] for m in a.only or vt.see.METHODS if m not in done}:
        found = vt.faithfulness(
            model, explain, images, steps=a.steps, sanity_images=a.sanity_images, seed=a.seed, progress=say
        ).to_dict()  # fmt: skip
        about = {k: v for k, v in found.items() if k != "rows"} | {"data": Path(data.name).name}
        rows |= {row["name"]: row | about for row in found["rows"]}
        kept.write_text(json.dumps(rows, indent=1) + "\n")
    write_sanity(name, rows)
    print_faithfulness({m: rows[m] for m in vt.see.METHODS if m in rows})


def write_sanity(model: str, rows: dict[str, Any]) -> None:
    measured = sanity()
    for method, row in rows.items():
        if row["error"] is None:
            measured.setdefault(method, {})[model] = {
                "model": model,
                "correlation": round(row["sanity"][-1]["correlation"]["value"], 4),
                "bound": row["bound"],
                "passes": row["passes"],
                "images": row["sanity_images"],
                "date": row["date"][:10],
            }
    lines = ["# Written by benchmarks/see.py: rank correlation of heatmaps with those of the model whose weights are all random."]
    for method, models in sorted(measured.items()):
        for key, found in sorted(models.items()):
            lines += ["", f"[{method}.{key}]", *(f"{k} = {json.dumps(v)}" for k, v in found.items())]
    SANITY.write_text("\n".join(lines) + "\n")


def print_faithfulness(rows: dict[str, Any]) -> None:
    def curve(c: dict[str, Any]) -> str:
        return f"{c['area']['value']:.3f} | {c['gain']['value']:+.3f} ({c['gain']['low']:+.3f} to {c['gain']['high']:+.3f})"

    print("| method | insertion ↑ | than random | deletion ↓ | than random | alike with random weights |")
    print("|---|---|---|---|---|---|")
    for method, r in rows.items():
        if r["error"]:
            print(f"| `{method}` | none: {r['error']} | | | | |")
            continue
        last = r["sanity"][-1]["correlation"]
        alike = f"{last['value']:.2f} ({last['low']:.2f} to {last['high']:.2f})" + ("" if r["passes"] else " **fails**")
        print(f"| `{method}` | {curve(r['insertion'])} | {curve(r['deletion'])} | {alike} |")
    r = next(iter(rows.values()))
    print(
        f"\n{r['images']} images of {r['data']}, sanity check on {r['sanity_images']}; score: {r['score']}, "
        f"{r['whole']:.2f} whole, {r['blurred']:.2f} blurred, {r['blank']:.2f} blank; "
        f"{r['steps']} steps; 95 % intervals; {r['date']}, seed {r['seed']}"
    )


def cost(a: argparse.Namespace, say: Say) -> None:
    name, model = opened(a)
    data = vt.data.open_data(str(a.photos or "sample"), model, limit=1, seed=a.seed) if a.photos or a.weights is None else None
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(a.seed)) if data is None else data.tensor([0])

    def forward() -> Tensor:
        with torch.no_grad():
            return model(x)

    methods = {m: (lambda m=m: vt.see.METHODS[m](model, x)) for m in a.only or vt.see.METHODS}
    times = interleave(
        {"forward": forward, **methods}, rounds=a.rounds, seed=a.seed, tick=lambda done: say("interleaved rounds", done)
    )
    ratios = {m: median_ratio(times[m], times["forward"]) for m in methods}
    about = {"model": name, "threads": a.threads, "rounds": a.rounds, "machine": describe(), "seed": a.seed}
    found = {m: {"value": r.value, "low": r.low, "high": r.high} for m, r in ratios.items()}
    best = about["machine"]["instructions"][-1]  # speed is the processor's
    (RESULTS / f"see-cost-{name}-{best}.json").write_text(json.dumps({**about, "forward passes": found}, indent=1) + "\n")
    print("| method | forward passes |\n|---|---|")
    for m, r in ratios.items():
        print(f"| `{m}` | {r.value:.1f} ({r.low:.1f} to {r.high:.1f}) |")
    print(f"\n{name}, one image, {a.threads} threads, {a.rounds} interleaved rounds, medians and 95 % intervals")


def rules(a: argparse.Namespace, say: Say) -> None:
    """How alike are `lrp` by the stable rule in float32, by the published rule in float64, and by that in float32?"""
    name, model = opened(a)
    data = vt.data.open_data(str(a.photos or "sample"), model, limit=a.images, seed=a.seed)
    maps: dict[str, list[Tensor]] = {}
    for i in range(len(data)):
        x = data.tensor([i])
        maps.setdefault("stable, float32", []).append(vt.see.lrp(model, x))
        maps.setdefault("stable, float64", []).append(vt.see.lrp(copy.deepcopy(model).double(), x.double()))
        maps.setdefault("published, float64", []).append(vt.see.lrp(model, x, published=True))
        # Rounding of the picture to the last digits of float32 is the smallest change that there is.
        nudged = x * (1 + 1e-7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(a.seed)))
        maps.setdefault("published, float64, picture changed by 1e-7", []).append(vt.see.lrp(model, nudged, published=True))
        say("photographs", (i + 1) / len(data))
    base = torch.cat(maps["published, float64"]).flatten(1)
    print("| rule | correlation with the published rule in float64, mean and range over images |\n|---|---|")
    for rule, found in maps.items():
        pairs = zip(torch.cat(found).flatten(1).double(), base.double(), strict=True)
        each = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
        print(f"| {rule} | {float(each.mean()):.2f} ({float(each.min()):.2f} to {float(each.max()):.2f}) |")
    print(f"\n{name}, {len(data)} images, seed {a.seed}, torch {torch.__version__}")


def memory(a: argparse.Namespace, say: Say) -> None:
    """The most memory that a process has held after four images at 518 pixels by one method, less what it held before."""
    method = (a.only or ["lrp"])[0]
    name, model = "dinov2_vits14 at 518", vt.open("vit_small_patch14_dinov2", img_size=518)
    x = torch.randn(4, 3, 518, 518, generator=torch.Generator().manual_seed(a.seed))
    with torch.no_grad():
        model(x[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    vt.see.METHODS[method](model, x)
    held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"{method}, {name}, 4 images: {held:.1f} GiB above the {before / 2**20:.1f} GiB of a forward pass")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("faithfulness", "cost", "rules", "memory"))
    p.add_argument("--weights", type=Path, help="DINOv2 ViT-S/14 under timm's names; without, the bundled model")
    p.add_argument("--photos", type=Path, help="folder of photographs")
    p.add_argument("--only", nargs="*", choices=list(vt.see.METHODS), help="these methods")
    p.add_argument("--again", action="store_true", help="measure anew what has been measured")
    p.add_argument("--images", type=int, default=64)
    p.add_argument("--sanity-images", type=int, default=16)
    p.add_argument("--steps", type=int, default=16)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    with Progress(transient=True) as bar:
        tasks: dict[str, Any] = {}

        def say(what: str, share: float) -> None:
            tasks[what] = tasks[what] if what in tasks else bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share)

        {"faithfulness": faithfulness, "cost": cost, "rules": rules, "memory": memory}[a.what](a, say)


if __name__ == "__main__":
    main()
