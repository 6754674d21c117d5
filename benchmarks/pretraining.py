"""What the arms of benchmarks/pretrain.py do: a small ViT, steps that fit into a budget, and how encoders are judged."""

from __future__ import annotations

import argparse
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from lessons.bench import drawn, read
from side_by_side import written
from torch import Tensor, nn

import vitreous as vt
from vitreous.learn.pretrain import EVA, VideoViT, extract
from vitreous.learn.pretrain.encode import shape
from vitreous.learn.pretrain.eva import FeatureHead
from vitreous.learn.pretrain.patches import normalised, patchify
from vitreous.prove.machine import describe


@dataclass(frozen=True)
class Scale:
    """The ViT (patches of 4 in pictures of 32); pictures without labels, with, and to test on; decoder, heads and views of the
    methods; sizes that are taken out of POA's; clips to pretrain on, their batch, and those whose step is timed."""

    width: int
    depth: int
    heads: int
    pool: int
    few: int
    test: int
    batch: int
    epochs: int
    decoder: tuple[int, int, int]
    prototypes: int
    local: int
    sizes: tuple[tuple[int, int], ...]
    clips: int
    clip_batch: int
    timed: tuple[int, int, int] = (8, 32, 32)


SCALES = {
    "small": Scale(96, 4, 3, 4000, 400, 1000, 64, 15, (64, 2, 4), 512, 2, ((64, 3), (64, 2)), 1000, 16),  # two cores
    "large": Scale(  # a GPU
        192, 6, 6, 45_000, 4500, 10_000, 256, 20, (128, 2, 4), 2048, 4, ((128, 4), (96, 3)), 10_000, 64, (16, 224, 224)
    ),
    "tiny": Scale(32, 2, 2, 160, 48, 40, 16, 1, (16, 1, 2), 16, 2, ((16, 1),), 32, 8),  # to try the queue
}
NONE, SUPERVISED, POA = "no pretraining", "supervised, the same labels", "POA"
FEATURES, PIXELS = "EVA, features of DINOv2", "EVA's masks, pixels"
METHODS = {
    NONE: "",
    SUPERVISED: "",
    "SimMIM, squares of 4": "SimMIM(cell=4)",
    "SimMIM, squares of 8": "SimMIM(cell=8)",
    "GMML": "GMML()",
    "MAE": "MAE(width={0}, depth={1}, heads={2})",
    "SemAIM": "SemAIM()",
    "SemAIM, raster": "SemAIM(order='raster')",
    "SelfPatch": "SelfPatch(local={local}, prototypes={prototypes}, patch_prototypes={prototypes})",
    POA: "POA(local={local}, prototypes=({prototypes},){more})",
    "Mask & Match": "MaskAndMatch()",
    FEATURES: "EVA(mask=0.4)",
    PIXELS: "",
}
DUAL, SINGLE = "VideoMAE V2, half decoded", "VideoMAE, all hidden decoded"
ALONE, SHARE = "alone", "alone, a share of the time"
CLASS_TOKEN = (SUPERVISED, POA, ALONE, SHARE)  # teach it; of the others the mean of the patch tokens is read


class Pixels(EVA):
    """EVA's masks and head with normalised pixels for a target, and a squared error."""

    def parts(self, model: nn.Module) -> nn.Module:
        s = shape(model, "Pixels")
        return FeatureHead(s.width, s.patch[0] * s.patch[1] * s.channels)

    def __call__(self, seen: Any, batch: Any, now: Any) -> dict[str, Tensor]:
        s = shape(now.model, "Pixels")
        mask = self.draw(s.grid, len(batch.images)).to(batch.images.device)
        target = normalised(patchify(batch.images, s.patch))[mask.flatten(1)]
        return {"pixels": F.mse_loss(self.predict(now.model, now.parts, batch.images, mask).float(), target.float())}


class Timed(Exception):
    """A step has been timed often enough."""


class Bench:
    """Pictures on the device, and what the arms do with them. `turn` is an open file: it is locked by all that are at work for
    as long as a step takes, and by one that times steps for itself."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.scale, self.device = a, SCALES[a.scale], torch.device(a.device)
        s, (train, test) = self.scale, pictures(a)
        self.x, self.y = (t[: s.pool].to(self.device) for t in train)
        self.test = test[0][: s.test].to(self.device), test[1][: s.test].to(self.device)
        self.few = self.x[: s.few], self.y[: s.few]
        self.turn = (a.kept / "turn.lock").open("w")
        where = torch.cuda.get_device_name() if a.device == "cuda" else str(describe()["cpu"])
        self.where = where
        self.paces = a.kept / f"paces-{a.scale}-{a.device}.json"
        self.given: dict[str, Any] = dict(augment="shift", warmup=0.1, accelerator=a.device)
        if a.device == "cuda":
            torch.set_float32_matmul_precision("high")
            self.given["precision"] = "bf16-mixed"

    # ---- time

    @contextmanager
    def locked(self, how: int) -> Iterator[None]:
        fcntl.flock(self.turn, how)
        try:
            yield
        finally:
            fcntl.flock(self.turn, fcntl.LOCK_UN)

    def passed(self, *_: Any) -> None:
        """Called after each step: waits while another process times its own."""
        with self.locked(fcntl.LOCK_SH):
            pass

    def now(self) -> float:
        if self.a.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def pace(self, name: str, run: Callable[..., Any]) -> dict[str, float]:
        """Seconds that a step of `run(epochs=, progress=)` takes alone, and the most memory it holds, MiB; of all seeds once."""
        held = json.loads(self.paces.read_text()) if self.paces.exists() else {}
        if name not in held:
            self.stopped(run, 3, 0.0, self.passed)  # what is loaded or compiled once
            with self.locked(fcntl.LOCK_EX):
                if cuda := self.a.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                took = self.stopped(run, 5, 0.05 if self.a.scale == "tiny" else 0.7)
                memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else float("nan")
                held = json.loads(self.paces.read_text()) if self.paces.exists() else {}
                held[name] = {"step": float(np.median(np.diff(took)[1:])), "memory": memory}
                written(self.paces, held)
        return held[name]

    def stopped(
        self, run: Callable[..., Any], steps: int, seconds: float, then: Callable[[], None] = lambda: None
    ) -> list[float]:
        """When each step of a run ended that is stopped after so many, and so long."""
        at: list[float] = []

        def tick(*_: Any) -> None:
            then()
            at.append(self.now())
            if len(at) >= steps and at[-1] - at[0] >= seconds:
                raise Timed

        with suppress(Timed):
            run(epochs=1e6, progress=tick)
        return at

    def for_budget(self, name: str, run: Callable[..., nn.Module], an_epoch: int, share: float = 1.0, more: int = 0) -> Any:
        """`run` for as many steps as fit into the budget, and `more`; the model on the device, and what it cost."""
        pace = self.pace(name, run)
        wanted = max(2, round(share * self.a.budget / pace["step"])) + more
        steps = min(wanted, self.a.most)
        began = self.now()
        model = run(epochs=steps / an_epoch, progress=self.passed).to(self.device)
        cost = {"steps": steps, "epochs": steps / an_epoch, "capped": float(steps < wanted), "pace": pace["step"]}
        return model, cost | {"seconds": self.now() - began}

    # ---- arms

    def vit(self, seed: int, width: int = 0, depth: int = 0) -> nn.Module:
        s = self.scale
        width, depth = width or s.width, depth or s.depth
        torch.manual_seed(seed)
        size = dict(embed_dim=width, depth=depth, num_heads=width * s.heads // s.width)
        return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=0, **size).eval()

    def judge(self, model: nn.Module, name: str, seed: int, tuned: bool = True) -> dict[str, float]:
        read = "pooled" if name in CLASS_TOKEN else "patches"
        model = model.to(self.device).eval()
        with self.locked(fcntl.LOCK_SH):
            found = vt.probe(model, (self.x, self.y), self.test, ("knn",), tokens=read)
            linear = vt.probe(model, self.few, self.test, ("linear",), tokens=read, seed=seed)["linear"]
        found = {k: found[k] for k in ("knn", "rankme", "spread")} | {"linear": linear}
        if tuned:
            s = self.scale
            how: dict[str, Any] = dict(epochs=s.epochs, batch=min(256, s.few // 2), augment="shift", layer_decay=0.75, seed=seed)
            given = vt.probe(model, self.few, self.test, ("finetune",), tokens=read, progress=self.passed, **how)
            found["finetune"] = given["finetune"]
        return found

    def pretrained(self, model: nn.Module, method: Any, name: str, seed: int, share: float = 1.0, x: Tensor | None = None) -> Any:
        """The encoder after its budget, what it cost, and whether it has collapsed."""
        s, said = self.scale, []
        x, batch = (self.x, s.batch) if x is None else (x, s.clip_batch)
        given = self.given | ({"augment": None} if x.ndim == 5 or name.startswith(("POA", "SelfPatch")) else {})
        if method == METHODS[FEATURES]:
            teacher = vt.open("vit_small_patch14_dinov2", checkpoint=self.a.dinov2, img_size=112, num_classes=0)
            given["teacher"] = teacher
        optimiser = vt.learn.AdamW(lr=1e-3)
        run = lambda **how: vt.pretrain(
            model, (x, None), method, optimiser, batch=batch, seed=seed, say=said.append, **given, **how
        )
        self.pace(name, run)
        said.clear()
        model, cost = self.for_budget(name, run, len(x) // batch, share)
        return model, cost | {"collapsed": float(bool(said and "epochs" not in said[-1])), "collapses": len(said)}

    def run(self, name: str, seed: int) -> dict[str, Any]:
        s = self.scale
        if name in (DUAL, SINGLE):
            return self.video(name, seed)
        if name.startswith(ALONE):
            return self.alone(name, seed)
        model = self.vit(seed)
        if name == NONE:
            return self.judge(model, name, seed)
        if name == SUPERVISED:
            return self.supervised(model, seed)
        model, cost = self.pretrained(model, self.method(name), name, seed)
        found = self.judge(model, name, seed) | cost
        if name == POA:
            found["sizes"] = {f"{w} × {d}": self.judge(extract(model, w, d), name, seed) for w, d in s.sizes}
        return found

    def method(self, name: str, more: str = "") -> Any:
        if name == PIXELS:
            return Pixels(mask=0.4)
        return METHODS[name].format(*self.scale.decoder, local=self.scale.local, prototypes=self.scale.prototypes, more=more)

    def supervised(self, model: Any, seed: int) -> dict[str, Any]:
        """Labels alone, for the time of pretraining and of fine-tuning together."""
        s, batch = self.scale, min(256, self.scale.few // 2)
        model.reset_classifier(10)
        optimiser = vt.learn.AdamW(lr=1e-3)
        run = lambda **how: vt.train(
            model, self.few, vt.learn.CrossEntropy(), optimiser, batch=batch, seed=seed, **self.given, **how
        )
        an_epoch = s.few // batch
        model, cost = self.for_budget(SUPERVISED, run, an_epoch, more=s.epochs * an_epoch)
        right = vt.learn.measure.accuracy_on(model, self.test, 256)
        model.reset_classifier(0)
        return self.judge(model, SUPERVISED, seed, tuned=False) | cost | {"finetune": right}

    def alone(self, name: str, seed: int) -> dict[str, Any]:
        """Each of POA's smaller sizes pretrained by itself, by the same method without an elastic student."""
        s, found = self.scale, {}
        share = 1 / (1 + len(s.sizes)) if name == SHARE else 1.0
        method = self.method(POA, ", smallest=1")
        for w, d in s.sizes:
            model, cost = self.pretrained(self.vit(seed, w, d), method, f"POA {w} × {d}", seed, share)
            found[f"{w} × {d}"] = self.judge(model, name, seed) | cost
        return {"sizes": found}

    def video(self, name: str, seed: int) -> dict[str, Any]:
        """A ViT of clips that a window makes, moving over each picture; and a step on clips of `timed`, of noise."""
        s, masked = self.scale, 0.5 if name == DUAL else 0.0
        clips, others = (moving(x[: s.clips], seed) for x in (self.x, self.test[0]))
        torch.manual_seed(seed)
        model = VideoViT((8, 32, 32), (2, 4, 4), s.width, s.depth, s.heads)
        width, depth, heads = s.decoder
        method = f"VideoMAEv2(decoder_mask={masked}, width={width}, depth={depth}, heads={heads})"
        model, cost = self.pretrained(model, method, name, seed, x=clips)
        labels = self.y[: s.clips], self.test[1][: s.clips]
        judged = vt.probe(model.eval(), (clips, labels[0]), (others, labels[1]), ("knn",))
        found = {k: judged[k] for k in ("knn", "rankme")} | cost
        del clips, others
        side = 16 if s.timed[1] > 32 else 4
        large = VideoViT(s.timed, (2, side, side), s.width * 2, s.depth * 2, s.heads)
        noise = torch.randn(s.clip_batch, 3, *s.timed, device=self.device)
        given = self.given | {"augment": None}
        for depth in (2, 4, 8):
            method = f"VideoMAEv2(decoder_mask={masked}, depth={depth}, width={s.width}, heads={s.heads})"
            run = lambda method=method, **how: vt.pretrain(
                large, (noise, None), method, batch=len(noise), say=str, **given, **how
            )
            pace = self.pace(f"{name}, {depth} blocks", run)
            found |= {f"step of {depth}": pace["step"], f"memory of {depth}": pace["memory"]}
        return found


def moving(x: Tensor, seed: int, frames: int = 8) -> Tensor:
    """Clips `[N, 3, frames, H, W]`: a window that moves over each picture, mirrored beyond its border, by up to two pixels a
    frame."""
    draw = torch.Generator().manual_seed(seed)
    n, _, h, w = x.shape
    pad = 2 * frames
    padded = F.pad(x, (pad,) * 4, mode="reflect")
    speed = torch.randint(-2, 3, (n, 2), generator=draw).to(x.device)
    made = []
    for t in range(frames):
        top, left = (pad + speed * (t - frames // 2)).unbind(1)
        rows, columns = top[:, None] + torch.arange(h, device=x.device), left[:, None] + torch.arange(w, device=x.device)
        place = rows[:, :, None] * (w + 2 * pad) + columns[:, None]
        made.append(padded.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, 3, -1)).view_as(x))
    return torch.stack(made, 2)


def pictures(a: argparse.Namespace) -> Any:
    s = SCALES[a.scale]
    if a.data is None:
        x, y = drawn(s.pool)
        return (x[: s.pool], y[: s.pool]), (x[s.pool :], y[s.pool :])
    return [read(a.data / part, n, a.kept / f"{part}-{n}.npz") for part, n in (("train", s.pool), ("test", s.test))]
