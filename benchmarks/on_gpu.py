"""All experiments that want a GPU, in one go: the largest gain first, within `--seconds`, resumable.

    python benchmarks/on_gpu.py --data cifar10-jpeg --dinov2 dinov2_vits14_224.safetensors --out runs/gpu --seconds 520
    python benchmarks/on_gpu.py … --only gpu claims tests
    python benchmarks/on_gpu.py … --plan      # prints the commands and runs none

`--data` holds class folders train/ and test/ of 32 × 32 pictures. Each job writes its results piece by piece into `--out`, with a
log beside them, and goes on where it was when the whole is started again; merge the JSON files into docs/results and print their
tables. While gpu.py times, every other job is halted. Needs a POSIX system; NVIDIA's MPS, where it can be started, lets jobs of
small kernels share the GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """A command, begun when the jobs `after` are over; `mps`: it shares the GPU by MPS; `nice`: how far behind the others."""

    command: str
    after: tuple[str, ...] = ()
    mps: bool = True
    nice: int = 0


def plan(a: argparse.Namespace, left: int) -> dict[str, Job]:
    data, out, weights = a.data, a.out, a.dinov2
    script = lambda name: f"{sys.executable} {HERE / name}"
    tests = "tests/test_cuda.py tests/test_devices.py tests/pretrain/test_devices.py"
    until = f"--device cuda --seconds {left}"
    learn = f"{script('learn.py')} queue --data {data} --results {out}/learn-large.json --kept {out}/learn --scale large"
    net = f"{script('supernet.py')} queue --only proxies widths supernet stitched --data {data} --kept {out}/learn"
    pretrain = f"{script('pretrain.py')} queue --data {data} --dinov2 {weights} --scale large --budget 5 --seeds 3 --threads 2"
    return {
        "claims": Job(
            f"{script('claims.py')} queue --data {data} --dinov2 {weights} {until} --processes 4 --kept {out}/claims "
            f"--results {out}/claims.json"
        ),
        "gpu": Job(f"{script('gpu.py')} --processes 8 --out {out}/gpu.json", mps=False),
        "tests": Job(f"{sys.executable} -m pytest -n 3 --timeout 100 {tests}", nice=5),
        "learn": Job(f"{learn} {until} --processes 8 --seeds 1", after=("gpu",)),
        "supernet": Job(f"{net} {until} --processes 6 --epochs 8 --batch 256 --results {out}/supernet.json", after=("learn",)),
        "pretrain": Job(f"{pretrain} {until} --processes 6 --results {out}/pretrain.json --kept {out}/pre", after=("supernet",)),
    }


def shared(out: Path) -> dict[str, str]:
    """The environment of MPS, if a program runs under it; else nothing."""
    there = {"CUDA_MPS_PIPE_DIRECTORY": str(out / "mps"), "CUDA_MPS_LOG_DIRECTORY": str(out / "mps-log")}
    for folder in there.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    env = os.environ | there
    try:
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=env, capture_output=True, timeout=20)
        probe = [sys.executable, "-c", "import torch; torch.zeros(8, device='cuda').sum().item()"]
        works = subprocess.run(probe, env=env, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return there if works else {}


def times(log: Path) -> bool:
    """Whether gpu.py is timing, by the last word that its log says of it."""
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("timing", "timed"))]
    return bool(said) and said[-1].startswith("timing")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--dinov2", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("runs/gpu"))
    p.add_argument("--seconds", type=float, default=520)
    p.add_argument("--only", nargs="*", default=[])
    p.add_argument("--plan", action="store_true")
    a = p.parse_args()
    began = time.monotonic()
    passed = lambda: time.monotonic() - began
    say = lambda *words: print(f"[{passed():.0f} s]", *words, flush=True)
    left = [name for name in plan(a, 0) if not a.only or name in a.only]
    if a.plan:
        print(*(f"{name}: {job.command}" for name, job in plan(a, int(a.seconds)).items() if name in left), sep="\n")
        return
    a.out.mkdir(parents=True, exist_ok=True)
    mps = shared(a.out)
    say("jobs share the GPU by MPS" if mps else "no MPS: jobs take turns on the GPU")
    running: dict[str, subprocess.Popen[bytes]] = {}
    wanted, halted = set(left), False
    env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}

    def tell(name: str, number: signal.Signals) -> None:
        if running[name].poll() is None:
            os.killpg(running[name].pid, number)  # a job is a group of processes of its own

    while passed() < a.seconds and (left or any(r.poll() is None for r in running.values())):
        for name in list(left):
            job = plan(a, int(a.seconds - passed() - 10))[name]
            if all(n in running and running[n].poll() is not None for n in job.after if n in wanted):
                left.remove(name)
                with (a.out / f"{name}.log").open("ab") as log:
                    command = f"exec nice -n {job.nice} {job.command}"
                    given = env | (mps if job.mps else {})
                    running[name] = subprocess.Popen(
                        command, shell=True, env=given, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                say("begun:", name)
        quiet = "gpu" in running and running["gpu"].poll() is None and times(a.out / "gpu.log")
        if quiet != halted:
            halted = quiet
            for name in running:
                if name != "gpu":
                    tell(name, signal.SIGSTOP if quiet else signal.SIGCONT)
        time.sleep(0.2)
    for name, process in running.items():
        say(name, "is over" if process.poll() is not None else "is stopped", process.poll())
        tell(name, signal.SIGKILL)
    if mps:
        subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", env=os.environ | mps, capture_output=True, timeout=20)


if __name__ == "__main__":
    main()
