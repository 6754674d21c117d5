"""The figures of docs/pretrain.md: methods of pretraining at equal time, beside none and beside supervised training.

    python benchmarks/pretrain.py queue --data cifar10-jpeg --dinov2 dinov2_vits14_224.safetensors   # folders train/ and test/
    python benchmarks/pretrain.py queue --data cifar10-jpeg --dinov2 … --scale large --device cuda --processes 6 --seconds 250
    python benchmarks/pretrain.py queue --scale tiny --budget 0.2   # drawn pictures, to see that every arm runs
    python benchmarks/pretrain.py tables                            # docs/results/pretrain.json into docs/pretrain.md

Each arm pretrains the same small ViT on the same pictures without labels, with as many steps as fit into `--budget` seconds. How
long a step takes is measured first, alone: on a GPU every other process of the queue waits meanwhile, on a CPU the processor's
own time is taken. Then k-NN over all labelled pictures, and a linear layer and fine-tuning on a tenth of the labels. Results are
written arm by arm, an arm that fails leaves its traceback beside them, and a queue that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lessons.bench import apart
from pretraining import (
    ALONE,
    DUAL,
    FEATURES,
    METHODS,
    NONE,
    POA,
    SCALES,
    SHARE,
    SINGLE,
    SUPERVISED,
    Bench,
    pictures,
)
from side_by_side import failed, work_through, written

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results" / "pretrain.json"


def _begin(a: argparse.Namespace) -> Callable[[tuple[str, str, int]], Any]:
    torch.set_num_threads(a.threads)
    bench = Bench(a)

    def do(job: tuple[str, str, int]) -> Any:
        found = bench.run(job[0], job[2]), bench.where
        gc.collect()
        torch.cuda.empty_cache()  # of a GPU that others want too
        return found

    return do


def queue(a: argparse.Namespace) -> None:
    """Every arm with every seed that the results have not yet, until `--seconds` are over: then what runs is given up."""
    held: dict[str, Any] = json.loads(a.results.read_text()) if a.results.exists() else {}
    a.results.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + a.seconds
    if a.data is not None:
        pictures(a)  # read once, not by every process
    # POA's arms judge several models, and come first
    names = a.only or [POA, ALONE, SHARE, DUAL, SINGLE, *(n for n in METHODS if n != POA and (n != FEATURES or a.dinov2))]
    left = [(n, a.scale, s) for s in range(a.seeds) for n in names if str(s) not in held.get(n, {}).get(a.scale, {})]
    stamp = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "budget": a.budget, "device": a.device}
    for job, found, wrong, seconds in work_through(left, _begin, (a,), a.processes, until):
        if wrong is not None:
            failed(a.results, job, wrong, seconds)
            continue
        name, scale, seed = job
        figures = {"figures": found[0], "seconds": seconds, "where": found[1], **stamp}
        held.setdefault(name, {}).setdefault(scale, {})[str(seed)] = figures
        written(a.results, held)
        print(f"{name}, seed {seed}: {seconds:.0f} s", flush=True)
    print(f"{sum(str(s) not in held.get(n, {}).get(a.scale, {}) for n, _, s in left)} left", flush=True)


# ---- the tables


def interval(ours: list[float], theirs: list[float], images: int) -> str:
    """Of the seeds that both have; see `apart`."""
    n = min(len(ours), len(theirs))
    return apart(np.array(ours[:n]), np.array(theirs[:n]), images) if n else "–"


def tables(a: argparse.Namespace) -> None:
    """Writes the tables between the marks of docs/pretrain.md, of the largest scale that has figures."""
    held = json.loads(a.results.read_text())
    scale = next(s for s in ("large", "small", "tiny") if any(s in runs for runs in held.values()))
    runs = {name: [r["figures"] for _, r in sorted(found[scale].items())] for name, found in held.items() if scale in found}
    several = [r for found in held.values() for r in found.get(scale, {}).values()]
    made = {"methods": methods_table(runs, SCALES[scale].test), "sizes": sizes_table(runs), "decoder": decoder_table(runs)}
    kinds = [sorted({str(r[k]) for r in several}) for k in ("where", "torch", "budget", "date")]
    seeds = {n: len(found.get(scale, {})) for n, found in held.items()}
    few = ", ".join(f"{n}: {c}" for n, c in seeds.items() if c < max(seeds.values()))
    said = f"Scale `{scale}`, {', '.join(kinds[0])}, torch {', '.join(kinds[1])}, budget of {', '.join(kinds[2])} s, "
    said += f"{max(seeds.values())} seeds{f' ({few})' if few else ''}, {', '.join(kinds[3])}."
    page = DOCS / "pretrain.md"
    text = page.read_text()
    for name, table in made.items():
        before, _, rest = text.partition(f"<!-- table {name} -->\n")
        _, _, after = rest.partition("<!-- end -->\n")
        text = f"{before}<!-- table {name} -->\n{table}\n\n{said}\n<!-- end -->\n{after}" if table else text
    page.write_text(text)


def of(runs: list[dict[str, Any]], key: str) -> list[float]:
    return [r[key] for r in runs if key in r]


def percent(values: list[float]) -> str:
    return f"{100 * np.mean(values):.1f}" if values else "–"


def methods_table(runs: dict[str, Any], images: int) -> str:
    heads = ["", "k-NN %", "against none", "linear %", "fine-tuned %", "against labels alone", "epochs in the time", "RankMe"]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in METHODS:
        if name not in runs:
            continue
        ours = {k: of(runs[name], k) for k in ("knn", "linear", "finetune", "epochs", "rankme", "collapsed", "capped")}
        apart = [
            interval(ours[k], of(runs.get(base, []), k), images) if name != base else "–"
            for k, base in (("knn", NONE), ("finetune", SUPERVISED))
        ]
        epochs = f"{'capped, ' if any(ours['capped']) else ''}{np.mean(ours['epochs']):.1f}" if ours["epochs"] else "–"
        said = ", collapsed" if any(ours["collapsed"]) else ""
        shown = [percent(ours["knn"]), apart[0], percent(ours["linear"]), percent(ours["finetune"]), apart[1], epochs]
        rows.append(f"| {name} | " + " | ".join(shown) + f" | {np.mean(ours['rankme']):.1f}{said} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def sizes_table(runs: dict[str, Any]) -> str:
    sizes = list(dict.fromkeys(size for n in (POA, ALONE, SHARE) for r in runs.get(n, []) for size in r["sizes"]))
    rows = ["| width × depth | | k-NN % | linear % | fine-tuned % | steps |", "|---|---|---|---|---|---|"]
    for size in sizes:
        for name, said in ((POA, "taken out of one run"), (ALONE, ALONE), (SHARE, SHARE)):
            found = [r["sizes"][size] for r in runs.get(name, []) if size in r["sizes"]]
            if found:
                steps = of(found, "steps") or of(runs[POA], "steps")
                shown = " | ".join(percent(of(found, k)) for k in ("knn", "linear", "finetune"))
                rows.append(f"| {size} | {said} | {shown} | {np.mean(steps):.0f} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def decoder_table(runs: dict[str, Any]) -> str:
    depths = (2, 4, 8)
    heads = ["", "k-NN %", "steps in the time", *(f"decoder of {d}: ms a step, MiB" for d in depths)]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in (DUAL, SINGLE):
        if name in runs:
            mean = lambda k, name=name: float(np.mean(of(runs[name], k)))
            memory = lambda d, mean=mean: "" if np.isnan(m := mean(f"memory of {d}")) else f", {m:.0f}"
            cells = [f"{1000 * mean(f'step of {d}'):.1f}{memory(d)}" for d in depths]
            rows.append(f"| {name} | {percent(of(runs[name], 'knn'))} | {mean('steps'):.0f} | " + " | ".join(cells) + " |")
    return "\n".join(rows) if len(rows) > 2 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["queue", "tables"])
    parser.add_argument("--data", type=Path, help="class folders train/ and test/ of 32 × 32 pictures; drawn ones without")
    parser.add_argument("--dinov2", type=Path, help="weights of DINOv2 ViT-S/14; without, EVA is left out")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="*", choices=[*METHODS, DUAL, SINGLE, ALONE, SHARE])
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of pretraining of an arm")
    parser.add_argument("--most", type=int, default=20_000, help="steps that no arm goes beyond")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these, whatever is not done")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--kept", type=Path, default=Path("runs/learn"), help="folder of decoded pictures and of what a step takes"
    )
    a = parser.parse_args()
    a.kept.mkdir(parents=True, exist_ok=True)
    {"queue": queue, "tables": tables}[a.what](a)


if __name__ == "__main__":
    main()
