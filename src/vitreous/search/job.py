"""The whole job behind `vitreous slim`: open, choose, slim, ship, prove, report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import quant, see, store, tokens
from ..anatomy import read
from ..data import Data, calibration, open_data
from ..errors import VitreousError
from ..processor import multiplies_bf16
from ..prove import Picture, Proof, interleave, prove, write_report
from ..ship import Runtime, ship_all
from ..steps import Recipe, history_of, slim

EARLY = (0.2, 0.3, 0.4)  # shares kept in the first block, for models trained with EViT there
SPREAD = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares kept in each of the paper's three blocks
CHOOSING = 1000  # images on which the default recipe is chosen
PICTURES = 12


class Job:
    """One run into `folder`; `progress` is told what is being done and the share of it that is done."""

    def __init__(
        self,
        folder: Path,
        data: str,
        seed: int,
        threads: int | None,
        budget: float,
        limit: int | None,
        progress: Callable[[str, float], None],
        resume: Path | None = None,
    ) -> None:
        self.folder, self.source, self.seed, self.threads, self.resume = folder, data, seed, threads, resume
        self.budget, self.limit, self.progress = budget / 100, limit, progress
        self.notes: list[str] = []

    def run(
        self,
        model: str | nn.Module | None,
        recipe: Recipe | None,
        calibrate: int | None,
        pretrained: bool,
        checkpoint: Path | None,
        download: bool,
        extra: dict[str, Any],
    ) -> Proof:
        """Do the whole job; everything it writes lies in the folder when it returns."""
        if self.threads:
            torch.set_num_threads(self.threads)
        self.progress("opening model and data", 0.0)
        net = store.open_model(model, pretrained=pretrained, checkpoint=checkpoint, **extra)
        data = open_data(
            self.source,
            net,
            limit=self.limit,
            seed=self.seed,
            download=download,
            progress=lambda done, total: self.progress("looking through the data", done / max(total, 1)),
        )
        self.notes += store.about(net)
        if data.skipped:
            self.notes.append(f"{len(data.skipped)} files skipped, named in the report and in proof.json")
        images = self._calibration(net, calibrate, download)
        before = history_of(net).steps()
        if recipe:
            options = {"the recipe": slim(net, recipe, images, self.progress, self.resume)}
        else:
            chosen = self._tokens(net, data)
            int8 = slim(chosen, [quant.RepQ(weights=8, activations=8)], images, self.progress)
            options = {"int8": int8, "float": chosen}
        small, runtime = self._fastest(net, data, options)
        self.progress("writing files", 0.0)
        store.save_model(small, self.folder / "model.safetensors")
        models: dict[str, Any] = {"original": net, "slimmed": small, "shipped": runtime}
        proof = prove(models, data, threads=self.threads, seed=self.seed, progress=self.progress)
        proof.save(self.folder / "proof.json")
        self.progress("writing the report", 0.0)
        done = [str(s) for s in history_of(small).steps()[len(before) :]]
        base = history_of(net).base
        title = f"{base['name'] if base else type(net).__name__} on {data.name}"
        pictures = self._pictures(proof, net, small, data)
        write_report(proof, self.folder / "report.html", title=title, recipe=done, pictures=pictures, notes=self.notes)
        return proof

    def _calibration(self, net: nn.Module, n: int | None, download: bool) -> Tensor:
        if n is not None:
            return calibration(self.source, net, n, self.seed, download=download)
        for n in (128, 64, 32, 16, 8, 4, 2):
            try:
                return calibration(self.source, net, n, self.seed, download=download)
            except VitreousError:
                continue
        return calibration(self.source, net, 1, self.seed, download=download)

    # ---- the default recipe: as few tokens as the budget allows, then whichever execution is fastest within it

    def _tokens(self, net: nn.Module, data: Data) -> nn.Module:
        anatomy = read(net)
        if not anatomy.plain or any(len(getattr(net.get_submodule(b.name), "reducers", ())) for b in anatomy.blocks):
            self.notes.append("tokens left as they are: " + self._why_no_tokens(net))
            return net
        # The work that remains, as a share: with one early reduction, and with the paper's three spread over the depth.
        ways = [(k, tokens.EViT(keep=k, at=(0,))) for k in EARLY] + [
            ((1 + k + k**2 + k**3) / 4, tokens.EViT(keep=k)) for k in SPREAD
        ]
        ways.sort(key=lambda way: way[0])
        for i, (_, way) in enumerate(ways):
            self.progress("choosing how many tokens to keep", i / len(ways))
            small = slim(net, way)
            if self._loss(net, small, data) <= self.budget / 2:
                return small
        self.notes.append(f"tokens left as they are: even {ways[-1][1]} loses over half of the budget")
        return net

    def _fastest(self, net: nn.Module, data: Data, options: dict[str, nn.Module]) -> tuple[nn.Module, Runtime]:
        """Export every option, run each file, and leave in the folder the files of the fastest option within the budget."""
        what = "exporting and checking"
        candidates: dict[str, tuple[str, Path, str | None, Runtime]] = {}
        shipments = {}
        for i, (option, model) in enumerate(options.items()):
            self.progress(what, i / len(options))
            paths = [self.folder / option / name for name in ("model.onnx", "model.xml")]
            try:
                shipments[option] = ship_all(model, paths, example=data.tensor(range(min(8, len(data)))))
            except VitreousError as reason:
                if i == len(options) - 1 and not shipments:
                    raise
                self.notes.append(f"{option} was not shipped: {reason}")
                continue
            for path in paths:
                precision = "bf16" if path.suffix == ".xml" and multiplies_bf16() else None
                runtime = Runtime(path, threads=self.threads, precision=precision)
                candidates[f"{option} in {runtime.engine}"] = option, path, precision, runtime
        x = data.tensor(np.arange(64) % len(data))
        runs = {f"{name} {b}": (lambda run=c[3], b=b: run(x[:b])) for name, c in candidates.items() for b in (1, 64)}
        what = "trying the ways to run it"
        times = interleave(runs, seconds=4.0, tick=lambda done: self.progress(what, done))
        cost = {n: float(np.median(times[f"{n} 1"]) * np.median(times[f"{n} 64"])) ** 0.5 for n in candidates}
        loss = {name: self._loss(net, c[3], data) for name, c in candidates.items()}
        within = [n for n in candidates if loss[n] <= self.budget]
        best = min(within, key=cost.__getitem__) if within else min(candidates, key=loss.__getitem__)
        option, path, precision, _ = candidates[best]
        for s in shipments[option]:
            for file in s.files:
                file.replace(self.folder / file.name)
            self.notes.append(str(replace(s, path=Path(s.path.name))))
        for other in options:
            shutil.rmtree(self.folder / other, ignore_errors=True)
        self.notes.append(f"shipped as {best}, the fastest of these that loses at most {100 * self.budget:g} points:")
        self.notes += [
            f"{name}: {cost[name] / cost[best]:.2f} × its time, {100 * loss[name]:+.1f} points lost" for name in candidates
        ]
        return options[option], Runtime(self.folder / path.name, threads=self.threads, precision=precision)

    def _why_no_tokens(self, net: nn.Module) -> str:
        try:
            read(net).require_plain("a token step")
        except VitreousError as reason:
            return str(reason)
        return "the model already drops or merges some"

    def _loss(self, net: nn.Module, other: Any, data: Data) -> float:
        """Points of accuracy (as a share) that `other` loses against `net`; 0 for models that only embed."""
        if getattr(net, "num_classes", 0) == 0:
            return 0.0
        if not hasattr(self, "_right"):
            self._right = self._accuracy(net, data)
        return self._right - self._accuracy(other, data)

    def _accuracy(self, model: Any, data: Data) -> float:
        right = n = 0
        with torch.inference_mode():
            for x, y in data.batches(64, limit=CHOOSING):
                right += int((model(x).argmax(1) == torch.as_tensor(y)).sum())
                n += len(x)
        return right / n

    # ---- pictures of the report

    def _pictures(self, proof: Proof, net: nn.Module, small: nn.Module, data: Data) -> list[Picture]:
        answers = proof["shipped"].answers
        changed = {c.index: c for c in answers.changed}
        rest = [i for i in range(len(data)) if i not in changed]
        indices = [*list(changed)[:PICTURES], *rest][: max(PICTURES, min(len(changed), PICTURES) + 4)]
        pictures = []
        for done, i in enumerate(indices):
            self.progress("drawing pictures", done / len(indices))
            x, c = data.tensor([i]), changed.get(i)
            label = data.classes[data.labels[i]] if data.labels is not None and len(data.classes) else None
            picture = Picture(data.picture(i), f"image {i}", label, c.before if c else None, c.after if c else None)
            try:
                picture.attention_before = see.rollout(net, x)[0].numpy()
                picture.attention_after = see.rollout(small, x)[0].numpy()
                picture.survival = [(layer, groups[0]) for layer, groups in see.survival(small, x)]
            except VitreousError:
                pass  # the report says why there is no drift
            pictures.append(picture)
        return pictures
