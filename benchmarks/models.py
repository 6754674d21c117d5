"""The figures of docs/models.md: what each architecture costs here, at its small size and as the image grows.

    python benchmarks/models.py small                # each architecture's small one, beside deit_small
    python benchmarks/models.py small van_b0 pvt_tiny --seconds 2   # these two; options come last
    python benchmarks/models.py resolution           # latency from 224 to 1024 pixels, by complexity
    python benchmarks/models.py write                # the tables and the plot of docs/models.md from what was measured

Random weights: speed does not depend on them. Each model is timed turn by turn with timm's deit_small, so that the ratio holds
whatever else the machine does; each result is kept in docs/results/models.json when it is there, and a run that was stopped goes
on after it. What fails is kept with its reason; `--again` measures anew. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.progress import Progress
from torch import Tensor, nn

import vitreous as vt
from vitreous.cli.systems import listed
from vitreous.files import write_whole
from vitreous.prove.cost import cost
from vitreous.prove.latency import interleave
from vitreous.prove.machine import describe
from vitreous.prove.statistics import median_ratio
from vitreous.ship import ship_all

DOCS = Path(__file__).parent.parent / "docs"
KEPT = DOCS / "results" / "models.json"
YARDSTICK = "deit_small_patch16_224"
WAYS = ("torch", "OpenVINO")
BATCHES = (1, 16)
SIDES = (224, 384, 512, 768, 1024)
COMPLEXITY = {  # how the cost grows with the number of tokens, and a model of about deit_small's size
    YARDSTICK: "quadratic",
    "swin_tiny_patch4_window7_224": "windowed",
    "van_b2": "linear",
    "vig_gla_s": "linear",
    "msvmamba_tiny": "linear",
}
UNTOLD = {  # of these no figures were published, so that systems.toml has no variants of them
    "channelvit_tiny": "channelvit",
    "chada_vit_moyen": "chada-vit",
    "minimal_transformer_cifar10_6_1_nomlp_unchanged": "minimal-transformer",
}
STAMPED = ("machine", "threads", "seed")


def small(a: argparse.Namespace, say: Callable[[str, float], None]) -> None:
    """Parameters, MACs, memory and latency of each model at the size it was published for."""
    kept = read(a)
    known = {next(iter(row["variants"])): row["slug"] for row in listed("backbone") if row.get("variants")} | UNTOLD
    names = a.models or list(known)
    torch.manual_seed(a.seed)
    images = torch.randn(max(BATCHES), 3, 224, 224, generator=torch.Generator().manual_seed(a.seed))
    with tempfile.TemporaryDirectory() as folder:
        yardstick = ways("yardstick", vt.open(YARDSTICK), images, Path(folder), a)
        for i, name in enumerate(names):
            say("models", i / len(names))
            if name not in kept["small"] or a.again:
                kept["small"][name] = {"system": known.get(name, ""), **measured(name, yardstick, a)}
                keep(kept)
    say("models", 1.0)


def measured(name: str, yardstick: dict[str, Callable[[int], Any]], a: argparse.Namespace) -> dict[str, Any]:
    """One model beside the yardstick, both in torch and OpenVINO."""
    torch.manual_seed(a.seed)
    try:
        model = vt.open(name)
        size = tuple(model.pretrained_cfg["input_size"])
        images = torch.randn(max(BATCHES), *size, generator=torch.Generator().manual_seed(a.seed))
        found = cost(name, model, images)
        row: dict[str, Any] = {"size": size, "parameters": found.parameters, "macs": found.macs, "memory": found.memory}
        with tempfile.TemporaryDirectory() as folder:
            calls = yardstick | ways("model", model, images, Path(folder), a)
            for batch in BATCHES:
                times = timed({who: partial(call, batch) for who, call in calls.items()}, a.seconds)
                for way in WAYS:
                    ours, theirs = times[f"model {way}"], times[f"yardstick {way}"]
                    ratio = median_ratio(theirs, ours)
                    row[f"{way} {batch}"] = {
                        "ms": 1000 * float(np.median(ours)) / batch,
                        "times": [ratio.value, ratio.low, ratio.high],
                        "rounds": len(ours),
                    }
    except vt.VitreousError as reason:
        return {"failed": str(reason)}
    return row | {"date": now()}


def ways(who: str, model: nn.Module, images: Tensor, folder: Path, a: argparse.Namespace) -> dict[str, Callable[[int], Any]]:
    """`model` in torch and shipped to OpenVINO, as functions of the batch size."""
    ship_all(model, [folder / f"{who}.xml"], example=images[:2])
    shipped = vt.Runtime(folder / f"{who}.xml", threads=a.threads, precision="f32")
    runs: dict[str, Callable[[Tensor], Tensor]] = dict(zip(WAYS, (model, shipped), strict=True))
    return {f"{who} {way}": (lambda batch, run=run: run(images[:batch])) for way, run in runs.items()}


def timed(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        return interleave(runs, seconds=seconds)


def resolution(a: argparse.Namespace, say: Callable[[str, float], None]) -> None:
    """Latency of one image against its side, all models turn by turn."""
    kept = read(a)
    names = a.models or list(COMPLEXITY)
    for i, side in enumerate(SIDES[: a.sides]):
        say("sides", i / len(SIDES))
        done = kept["resolution"].setdefault(str(side), {})
        todo = [n for n in names if n not in done or a.again]
        if not todo:
            continue
        image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(a.seed))
        with tempfile.TemporaryDirectory() as folder:
            calls: dict[str, Callable[[int], Any]] = {}
            for name in todo:
                try:
                    calls |= ways(name, sized(name, side, a.seed), image, Path(folder), a)
                except vt.VitreousError as reason:
                    done[name] = {"failed": str(reason)}
            times = timed({who: partial(call, 1) for who, call in calls.items()}, a.seconds)
        for who, samples in times.items():
            name, _, way = who.rpartition(" ")
            done.setdefault(name, {"date": now()})[way] = 1000 * float(np.median(samples))
        keep(kept)
    say("sides", 1.0)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def sized(name: str, side: int, seed: int) -> nn.Module:
    """The model for images of `side` pixels: built for them where it asks for that, else as it is."""
    torch.manual_seed(seed)
    try:
        return vt.open(timm.create_model(name, img_size=side))
    except TypeError:  # it takes any size, and so has no such argument
        return vt.open(timm.create_model(name))


def read(a: argparse.Namespace) -> dict[str, Any]:
    """What is kept so far, if it was measured as this run would."""
    stamp = {"machine": describe(), "threads": a.threads, "seed": a.seed}
    if not KEPT.exists():
        return {**stamp, "small": {}, "resolution": {}}
    kept: dict[str, Any] = json.loads(KEPT.read_text())
    if other := [k for k in STAMPED if kept[k] != stamp[k]]:
        raise SystemExit(f"{KEPT} was measured with another {' and '.join(other)}: delete it to begin anew")
    return kept


def keep(kept: dict[str, Any]) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    write_whole(KEPT, json.dumps(kept, indent=1) + "\n")


# ---- the page


def write(a: argparse.Namespace, say: Callable[[str, float], None]) -> None:
    """Put tables and plot into docs/models.md."""
    kept = json.loads(KEPT.read_text())
    page = DOCS / "models.md"
    text = page.read_text()
    for part, table in {"small": small_table, "resolution": resolution_table}.items():
        if kept[part]:
            begin, end = f"<!-- {part} -->", f"<!-- /{part} -->"
            before, _, rest = text.partition(begin)
            text = before + "\n".join([begin, stamp(kept, part), "", *table(kept), end]) + rest.partition(end)[2]
    write_whole(page, text)
    if kept["resolution"]:
        draw(kept)


def stamp(kept: dict[str, Any], part: str) -> str:
    versions = kept["machine"]["versions"]
    rows = kept["small"].values() if part == "small" else [r for side in kept["resolution"].values() for r in side.values()]
    days = sorted({r["date"][:10] for r in rows if "date" in r})
    when = " to ".join(dict.fromkeys(days[:1] + days[-1:]))
    threads = f"{kept['threads']} thread{'s' if kept['threads'] > 1 else ''}"
    said = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "openvino"))
    return f"{threads} of {kept['machine']['cpu']}, float32, {said}, seed {kept['seed']}, {when}."


def small_table(kept: dict[str, Any]) -> list[str]:
    figures = [f"{way} {what}" for way in WAYS for what in ("ms b1, b16", "×")]
    heads = ["model", "system", "pixels", "M parameters", "GMACs", "MB, b16", *figures]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, r in sorted(kept["small"].items(), key=lambda item: item[1].get("macs") or 0):
        if "failed" in r:
            lines.append(f"| `{name}` | {r['system']} | not measured: {r['failed']} |" + " |" * 7)
            continue
        speeds = []
        for way in WAYS:
            found = [r[f"{way} {b}"] for b in BATCHES]
            speeds += [", ".join(f"{f['ms']:.1f}" for f in found), ", ".join(f"{f['times'][0]:.2f}" for f in found)]
        cells = [r["size"][-1], f"{r['parameters'] / 1e6:.1f}", f"{r['macs'] / 1e9:.2f}", f"{r['memory'] / 1e6:.0f}", *speeds]
        lines.append(f"| `{name}` | {r['system']} | " + " | ".join(map(str, cells)) + " |")
    return lines


def resolution_table(kept: dict[str, Any]) -> list[str]:
    sides = sorted(kept["resolution"], key=int)
    lines = ["![Latency against resolution](models-resolution.svg)", ""]
    lines += ["| model | cost | " + " | ".join(f"{s}: torch, OpenVINO ms" for s in sides) + " |", "|---" * (2 + len(sides)) + "|"]
    for name, kind in COMPLEXITY.items():
        rows = [kept["resolution"][s].get(name, {}) for s in sides]
        cells = [", ".join(f"{r[way]:.0f}" for way in WAYS) if WAYS[0] in r else r.get("failed", "–") for r in rows]
        lines.append(f"| `{name}` | {kind} | " + " | ".join(cells) + " |")
    return lines


def draw(kept: dict[str, Any]) -> None:
    """Latency against the image's side, both logarithmic: a slope of 2 is linear in tokens, of 4 quadratic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(WAYS), figsize=(11, 4.5), sharey=True, layout="constrained")
    markers = {"quadratic": "s", "windowed": "o", "linear": "^"}
    sides = sorted(map(int, kept["resolution"]))
    for axes, way in zip(panels, WAYS, strict=True):
        for name, kind in COMPLEXITY.items():
            points = [(s, kept["resolution"][str(s)].get(name, {}).get(way)) for s in sides]
            points = [p for p in points if p[1] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=markers[kind], label=f"{name}, {kind}")
        axes.set(xscale="log", yscale="log", xlabel="pixels a side", title=f"{way}, float32, batch 1")
        axes.set_xticks(sides, map(str, sides))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds an image")
    panels[0].legend(fontsize=8)
    figure.suptitle(stamp(kept, "resolution"), fontsize=8)
    figure.savefig(DOCS / "models-resolution.svg", metadata={"Date": None})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("small", "resolution", "write"))
    p.add_argument("models", nargs="*", help="timm names, all by default")
    p.add_argument("--sides", type=int, default=len(SIDES), help="how many of the resolutions, from the smallest")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seconds", type=float, default=20.0, help="for one model at one batch size, or all models at one resolution")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--again", action="store_true", help="measure also what is there")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    with Progress() as bar:
        tasks: dict[str, Any] = {}

        def say(what: str, share: float) -> None:
            tasks[what] = tasks[what] if what in tasks else bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share)

        {"small": small, "resolution": resolution, "write": write}[a.what](a, say)


if __name__ == "__main__":
    main()
