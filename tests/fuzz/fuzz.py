"""Bad input without end: pictures, checkpoints, saved files, recipes and arguments, from a seed.

    python tests/fuzz/fuzz.py --seconds 600 --seed 7
    python tests/fuzz/fuzz.py --only saved --number 1000

Every input is either taken or refused by a `VitreousError` (a picture by `Unreadable`); the command line answers with exit status
0 or 2 and one line. Anything else is printed with the seed that makes it again: each input has a seed of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save as save_tensors

import vitreous as vt
from vitreous.cli import UNFORESEEN, main
from vitreous.data import open_data
from vitreous.data.pictures import Unreadable, read_picture
from vitreous.data.signals import Reader
from vitreous.learn import written
from vitreous.ship import ship_all
from vitreous.steps import Recipe
from vitreous.studio.runs_view import find_runs

SHAPE: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7)
NAME = "vit_tiny_patch16_224"
ODD_TEXTS = ["", " ", ".", "..", "/", "\0", "a\0b", "\udcff", "é", "x" * 300, "x" * 5000, "-1", "0", "9" * 30, "1e999"]
ODD_TEXTS += ["nan", "-0.0", "[", "((((", "]" * 50, "{}", "null", "True", "None", "__class__", "EViT", "EViT()", "%s%n", "\u202e"]
ODD_TEXTS += ["RepQ(weights=2)", "../../etc", "hf-hub:timm/x", "local-dir:/tmp", "/dev/null", "/dev/zero", "[bold]", "<b>", '"']
ODD_TEXTS += ["'", "--", "\n", "\r\n", "＿"]
ODD_VALUES: list[Any] = [None, True, False, 0, -1, 1, 2**31, -(2**63), 10**30, 0.5, -0.5, 1e308, "x"]
ODD_VALUES += [[], {}, [[]], {"a": 1}, [None]]
Case = Callable[[random.Random, Path], None]


def flipped(rng: random.Random, content: bytes) -> bytes:
    """Bits changed, parts cut out, doubled, or filled."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 4, 100))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + n]
        elif kind == 2:
            data[at:at] = data[at : at + n]
        elif kind == 3:
            data[at : at + n] = bytes([rng.choice((0, 255, 127))]) * n
        elif kind == 4:
            data[at:at] = rng.randbytes(n)
        else:
            del data[at:]
    return bytes(data)


def bent(rng: random.Random, value: Any) -> Any:
    """JSON with one or a few of its parts replaced, removed, renamed or nested."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 3))):
        places = list(walk(value))
        if not places:
            return rng.choice(ODD_VALUES)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = rng.choice(ODD_TEXTS)
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice([*ODD_TEXTS, "name", "self", "plan", "step", "checkpoint_path", "depth"])] = holder.pop(key)
        elif kind == 3:
            holder[key] = [holder[key]] * rng.choice((1, 2, 50))
        elif kind == 4 and isinstance(holder[key], int | float):
            holder[key] = holder[key] * rng.choice((-1, 0, 2, 1000, 10**12)) + rng.choice((0, 1))
        else:
            holder[key] = rng.choice(ODD_VALUES)
    return value


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from walk(inner)


def text_of(rng: random.Random, value: Any) -> str:
    text = json.dumps(value)
    if rng.random() < 0.2:
        text = flipped(rng, text.encode()).decode(errors="replace")
    return text if rng.random() > 0.03 else rng.choice(("[", '{"a":')) * 50_000


# ---- the kinds


@cache
def pictures() -> list[tuple[str, bytes]]:
    made = []
    for name, mode, more in (
        *(("a.png", "RGB", {}), ("a.png", "LA", {}), ("a.png", "P", {}), ("a.png", "I;16", {}), ("a.jpg", "RGB", {})),
        *(("a.jpg", "CMYK", {}), ("a.gif", "P", {}), ("a.bmp", "RGB", {}), ("a.tif", "RGBA", {"compression": "tiff_lzw"})),
        *(("a.webp", "RGB", {}), ("a.ppm", "L", {}), ("a.jp2", "RGB", {})),
    ):
        held = io.BytesIO()
        held.name = name
        with contextlib.suppress(OSError, KeyError, ValueError):  # a codec that is not there
            Image.new(mode, (33, 21)).save(held, **more)
            made.append((name, held.getvalue()))
    return made


def images(rng: random.Random, folder: Path) -> None:
    name, content = rng.choice(pictures())
    path = folder / name
    path.write_bytes(flipped(rng, content))
    for probe in (True, False):
        with contextlib.suppress(Unreadable):
            assert read_picture(path, probe=probe).mode in ("L", "RGB")


@cache
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return vt.open(NAME, **SHAPE).state_dict()


def checkpoints(rng: random.Random, folder: Path) -> None:
    state: Any = dict(weights())
    for _ in range(rng.choice((0, 1, 2))):
        key = rng.choice(list(state))
        kind = rng.randrange(6)
        if kind == 0:
            state[rng.choice(ODD_TEXTS)] = state.pop(key)
        elif kind == 1:
            state[key] = rng.choice(
                [state[key].double(), state[key].flatten(), state[key][:0], state[key].bool(), torch.tensor(1)]
            )
        elif kind == 2:
            state[key] = state[key] * rng.choice([float("nan"), float("inf"), 3e38, 0.0])
        elif kind == 3:
            del state[key]
        elif kind == 4:
            state = {f"{rng.choice(['module.', '_orig_mod.', 'backbone.', ''])}{k}": v for k, v in state.items()}
    held = io.BytesIO()
    if rng.random() < 0.5:
        path = folder / "c.safetensors"
        held.write(save_tensors({k.encode(errors="replace").decode(): v.contiguous() for k, v in state.items()}))
    else:
        path = folder / rng.choice(("c.pt", "c.pth", "c.bin"))
        wrapped = rng.choice(
            [state, {"model": state}, {"state_dict": state, "epoch": 3}, {"model": {}}, [state], list(state), 3, None]
        )
        torch.save(wrapped, held)
    path.write_bytes(flipped(rng, held.getvalue()) if rng.random() < 0.6 else held.getvalue())
    refused(lambda: vt.open(NAME, checkpoint=path, **SHAPE))


@cache
def slimmed() -> list[tuple[dict[str, Any], dict[str, torch.Tensor], bytes]]:
    model = vt.open(NAME, **SHAPE)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for recipe in (
            [vt.tokens.EViT(keep=0.5), vt.quant.WeightOnly(bits=4)],
            [vt.prune.Heads(share=0.3), vt.quant.MinMax(weights=4)],
            [vt.tokens.Sparsifiner(), vt.quant.RepQ()],
            [vt.quant.IViT()],
            [],
        ):
            path = vt.save(vt.slim(model, recipe, x), Path(folder, "m.safetensors"))
            with safe_open(path, "pt") as f:
                state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
                made.append((json.loads(f.metadata()["vitreous"]), state, path.read_bytes()))
    return made


def saved(rng: random.Random, folder: Path) -> None:
    about, state, whole = rng.choice(slimmed())
    path = folder / "m.safetensors"
    if rng.random() < 0.3:
        path.write_bytes(flipped(rng, whole))
    else:
        text = text_of(rng, bent(rng, about))
        path.write_bytes(save_tensors(state, {"vitreous": text.encode(errors="replace").decode()}))
    refused(lambda: vt.load(path))


@cache
def recorded() -> dict[str, tuple[str, bytes]]:
    """By the name of a small file: what it holds, and its bytes."""
    import av
    import nibabel
    import soundfile
    import tifffile

    with tempfile.TemporaryDirectory() as name:
        home, draw = Path(name), np.random.default_rng(0)
        for end in ("nii", "nii.gz"):
            nibabel.save(nibabel.Nifti1Image(draw.random((8, 8, 4), np.float32), np.eye(4)), home / f"volumes.{end}")
        for end in ("mp4", "avi"):
            with av.open(str(home / f"clips.{end}"), "w") as file:
                stream: Any = file.add_stream("mpeg4", rate=8)
                stream.width = stream.height = 32
                for t in range(6):
                    frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 30 * t, np.uint8), format="rgb24")
                    file.mux(stream.encode(frame))
                file.mux(stream.encode())
        for end in ("wav", "flac", "ogg"):
            soundfile.write(home / f"sound.{end}", draw.random(4000) - 0.5, 16000)
        np.save(home / "channels.npy", draw.random((5, 8, 8), np.float32))
        tifffile.imwrite(home / "channels.tif", draw.random((5, 8, 8), np.float32), photometric="minisblack")
        return {p.name: (p.name.split(".")[0], p.read_bytes()) for p in sorted(home.iterdir())}


READ = {"volumes": ((8, 8, 4), 1), "clips": ((2, 8, 8), 3), "sound": ((16, 24), 1), "channels": ((8, 8), 5)}


def signals(rng: random.Random, folder: Path) -> None:
    name, (what, content) = rng.choice(list(recorded().items()))
    (folder / name).write_bytes(flipped(rng, content))
    sides, channels = READ[what]
    with contextlib.suppress(Unreadable), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = Reader(what, sides, channels)(folder / name)
        assert x.shape == (channels, *sides) and bool(x.isfinite().all())


@cache
def shard() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as file:
        for i in range(4):
            picture = io.BytesIO()
            Image.new("RGB", (20, 20), (60 * i, 9, 9)).save(picture, "PNG")
            for end, content in (("png", picture.getvalue()), ("cls", str(i % 2).encode())):
                about = tarfile.TarInfo(f"{i:03}.{end}")
                about.size = len(content)
                file.addfile(about, io.BytesIO(content))
    return held.getvalue()


def shards(rng: random.Random, folder: Path) -> None:
    for i in range(2):
        content = shard()
        (folder / f"s-{i}.tar").write_bytes(flipped(rng, content) if i == 0 or rng.random() < 0.3 else content)
    model = vt.open(NAME, **{**SHAPE, "depth": 1, "embed_dim": 12})
    refused(lambda: list(open_data(folder / "s-{0..1}.tar", model).batches(2)))


RECIPES = ["EViT(keep=0.7), RepQ(weights=8, activations=8)", "ToMe(r=4)", "Heads(share=0.25), WeightOnly(bits=4, group=32)"]
RECIPES += [
    "tokens.MCTF(r=0.2, tau_sim=1), quant.MPTQ(weights=4)",
    "EViT(at=(1, 2)), Auto(softmax=True)",
    "SemanticTokens(tokens=4)",
]
PIECES = [*ODD_TEXTS, "(", ")", "]", "[", ",", "=", "**", "keep=", "0.7, keep=0.5", "lambda: 1", "#", ":", "9" * 400]


def recipes(rng: random.Random, folder: Path) -> None:
    if rng.random() < 0.5:
        entries = [s.to_dict() for s in Recipe.parse(rng.choice(RECIPES)).steps]
        text = text_of(rng, bent(rng, rng.choice([entries, {"steps": entries}])))
        (folder / "r.json").write_text(text, encoding="utf-8", errors="replace")
        refused(lambda: str(Recipe.read(folder / "r.json")))
        return
    text = rng.choice(RECIPES)
    for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice(PIECES)
        text = text[:at] + piece + text[at + rng.choice((0, 0, 3)) :]
    refused(lambda: str(Recipe.parse(text)))


@cache
def files() -> dict[str, bytes]:
    """A small model as `ship` writes it, and the folder of a training run."""
    model = vt.open(NAME, **{**SHAPE, "depth": 1})
    with tempfile.TemporaryDirectory() as folder:
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        ship_all(model, [Path(folder, "m.onnx"), Path(folder, "m.xml")], example=x, batch=2)
        taught(Path(folder, "run"))
        return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def put(rng: random.Random, folder: Path, names: tuple[str, ...]) -> None:
    """All files, one of `names` damaged."""
    bad = rng.choice(names)
    for name, content in files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(flipped(rng, content) if name == bad else content)


def shipped(rng: random.Random, folder: Path) -> None:
    put(rng, folder, ("m.onnx", "m.xml", "m.bin"))
    for name in ("m.onnx", "m.xml"):
        refused(lambda name=name: vt.Runtime(folder / name)(torch.zeros(2, 3, 32, 32)))


def taught(folder: Path) -> None:
    torch.manual_seed(0)
    model = vt.open(NAME, **{**SHAPE, "depth": 1, "embed_dim": 12})
    data = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 7
    vt.train(model, data, vt.learn.CrossEntropy(), epochs=1, batch=8, check=data, out=folder)


def runs(rng: random.Random, folder: Path) -> None:
    put(rng, folder, ("run/run.json", "run/last.pt", "run/log.csv"))
    refused(lambda: taught(folder / "run"))
    find_runs(folder)


WRITTEN = {
    "objectives": ["CrossEntropy(), NKD(gamma=1.5)", "KD(temperature=2)", "CrossEntropy(smoothing=0.1)"],
    "optimiser": ["Lion(lr=1e-4)", "AdamW(lr=1e-3, decay=0.05)", "SGD()", "SGDSaI(lr=0.1)"],
    "rule": ["GreedySoup()", "UniformSoup()", "LearnedSoup(epochs=2)", "OPCM(alpha=0.5)"],
}


def calls(rng: random.Random, folder: Path) -> None:
    kind = rng.choice(list(WRITTEN))
    text = rng.choice(WRITTEN[kind])
    for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(PIECES) + text[at + rng.choice((0, 0, 3)) :]
    refused(lambda: str(getattr(written, kind)(text)))


FLAGS = {
    "anatomy": ["--checkpoint", "--num-classes", "--img-size", "--model-arg", "--classes", "--mean", "--std", "--crop-pct"],
    "see": ["--method", "--target", "--layer", "--out", "--img-size", "--interpolation", "--device", "--tokens", "--tree"],
    "heads": ["--limit", "--csv", "--json", "--seed", "--data", "--precision"],
    "faithful": ["--methods", "--limit", "--json", "--seed", "--data"],
    "slim": ["--recipe", "--steps", "--calibrate", "--budget", "--out", "--resume", "--threads", "--data"],
    "steps": ["--json"],
    "train": ["--objective", "--optimiser", "--epochs", "--batch", "--augment", "--ema", "--precision", "--teacher", "--sam"],
    "merge": ["--rule", "--base", "--out", "--data", "--seed", "--overwrite"],
    "prove": ["--batches", "--seconds", "--json", "--report", "--threads", "--mean", "--num-classes"],
    "ship": ["--out", "--repository", "--name", "--format", "--batch", "--tolerance", "--img-size"],
    "run": ["--data", "--out", "--batch", "--shard", "--threads", "--precision"],
    "systems": ["--family", "--json"],
}
SURE = {name: ["--data", "absent"] for name in ("heads", "faithful", "slim", "train", "prove", "ship")}  # or they take minutes


def arguments(rng: random.Random, folder: Path) -> None:
    command = rng.choice(list(FLAGS))
    words = [command] + (["good.png"] if command == "see" and rng.random() < 0.8 else [])
    if rng.random() < 0.2:
        words.append(rng.choice(ODD_TEXTS))
    for _ in range(rng.choice((1, 1, 2, 3))):
        words += [rng.choice(FLAGS[command])] + ([rng.choice(ODD_TEXTS)] if rng.random() < 0.9 else [])
    words += SURE.get(command, [])
    Image.new("L", (28, 28), 99).save(folder / "good.png")
    out, error, before, here = io.StringIO(), io.StringIO(), sys.argv, os.getcwd()
    status: Any = 0
    try:
        os.chdir(folder)
        sys.argv = ["vitreous", *words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            main()
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = before
        os.chdir(here)
    said = error.getvalue()
    assert status in (0, 2) and UNFORESEEN not in said and "Traceback" not in said, (words, status, said)
    assert status == 0 or said.splitlines()[-1].startswith("vitreous: "), (words, said)


def refused(attempt: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attempt()
        except vt.VitreousError as error:
            assert 0 < len(str(error)) < 4000, f"a message of {len(str(error))} letters"


KINDS: dict[str, Case] = {
    f.__name__: f for f in (images, signals, shards, checkpoints, saved, recipes, calls, shipped, runs, arguments)
}


def attempt(kind: str, seed: int) -> str:
    """Try the input of that kind and seed; how it failed, or the empty string."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            KINDS[kind](random.Random(f"{kind} {seed}"), Path(folder))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{kind} {seed}: {traceback.format_exc()}"
    return ""


def run() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, help="go on for so long")
    p.add_argument("--number", type=int, help="inputs of each kind")
    p.add_argument("--seed", type=int, default=0, help="the first input's; each next has the next number")
    p.add_argument("--only", choices=KINDS, action="append", help="kinds [default: all]")
    a = p.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + (a.seconds or float("inf"))
    number = a.number or (100 if a.seconds is None else sys.maxsize)
    kinds, failures, tried = a.only or list(KINDS), 0, dict.fromkeys(KINDS, 0)
    for seed in range(a.seed, a.seed + number):
        for kind in kinds:
            if time.monotonic() > end:
                break
            tried[kind] += 1
            if failed := attempt(kind, seed):
                failures += 1
                print(failed, flush=True)
        else:
            continue
        break
    print(f"{sum(tried.values())} inputs ({', '.join(f'{n} {k}' for k, n in tried.items() if n)}): {failures} failures")
    return min(1, failures)


if __name__ == "__main__":
    sys.exit(run())
