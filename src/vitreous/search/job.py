"""The whole job behind `vitreous slim`: open, choose, slim, ship, prove, report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import see, store
from ..data import Data
from ..errors import VitreousError
from ..learn import heal
from ..prove import Picture, Proof, prove, write_report
from ..ship import Runtime
from ..ship.card import beside
from ..steps import Recipe, history_of, slim
from ..work import fingerprint
from .budget import Goal, Loss
from .choose import Chooser, Judge
from .healed import healed_options
from .space import told_by
from .split import split, to_heal
from .trial import Trial, best, exported, kept, timed

PICTURES = 12
TOGETHER = 8  # of them looked into at once
HEAL_BATCH = 64
SECONDS = 8.0  # of timing in the proof
QUICK = 2e9  # multiply-accumulates of an image up to which 64 at once are timed too


class Job:
    """One run into `folder`; `progress` is told what is being done and the share of it that is done."""

    def __init__(
        self,
        folder: Path,
        data: str,
        seed: int,
        threads: int | None,
        goal: Goal,
        limit: int | None,
        progress: Callable[[str, float], None],
        resume: Path | None = None,
        heal: float = 0.0,
        options: Callable[[Chooser, Tensor], dict[str, nn.Module]] | None = None,
    ) -> None:
        self.folder, self.source, self.seed, self.threads, self.resume = folder, data, seed, threads, resume
        self.heal = heal
        self.options = options or (lambda chooser, images: chooser.options())  # what to choose from; a search tries more
        self.goal, self.limit, self.progress = goal, limit, progress
        self.notes: list[str] = []  # what one must know to understand the figures
        self.log: list[str] = []  # what was tried, and how it went

    def run(self, net: nn.Module, recipe: Recipe | None, calibrate: int | None = None, download: bool = False) -> Proof:
        """Do the whole job; everything it writes lies in the folder when it returns.

        recipe: None to choose one. calibrate: images, None for 128 or as many as there are. download: let torchvision fetch.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        self.progress("opening the data", 0.0)
        images = split(
            self.source,
            net,
            choosing=recipe is None,
            calibrate=calibrate,
            limit=self.limit,
            seed=self.seed,
            download=download,
            progress=lambda done, total: self.progress("looking through the data", done / max(total, 1)),
        )
        data = images.prove
        learn_from: Data | None = None
        if self.heal:
            learn_from, data = to_heal(self.source, net, data, seed=self.seed, download=download)
        self.log += [*store.about(net), str(images)]
        if data.skipped:
            self.notes.append(f"{len(data.skipped)} files skipped, named in the report and in proof.json")
        before = history_of(net).steps()
        tried = (images.choose or data).tensor(range(min(16, len(images.choose or data))))
        judge: Judge | None = None
        if recipe is None:
            assert images.choose is not None
            self.progress("running the original", 0.0)
            judge = Judge(net, images.choose)
            given = net, judge, images.calibrate, self.goal
            if learn_from is not None:
                taught = lambda small: self._healed(small, net, learn_from)
                options = healed_options(*given, taught, self.progress, self.log)
            else:
                options = self.options(Chooser(*given, self.progress, self.log), tried)
        else:
            options = {"the recipe": self._made(net, recipe, images.calibrate, learn_from)}
        trials, shipments = exported(options, self.folder, tried, self.threads, self.goal, self.progress, self.log)
        timed(trials, net, tried, self.goal, self.progress)
        chosen = best(trials, self.goal, self.notes, lambda trial: self._lost(judge, trial))
        self._too_few(images.choose, chosen.lost)
        if self.goal.energy is not None and chosen.energy is not None:
            self.notes.append(f"energy: {chosen.energy:.2f} of what the original takes, by {told_by()}")
        small, runtime = options[chosen.option], kept(chosen, trials, shipments, self.folder, self.log)
        self.progress("writing files", 0.0)
        store.save_model(small, self.folder / "model.safetensors")
        for name, text in beside(small).items():
            (self.folder / name).write_text(text)
        proof = self._proof(net, small, runtime, data)
        self.progress("writing the report", 0.0)
        done = [str(s) for s in history_of(small).steps()[len(before) :]]
        base = history_of(net).base
        title = f"{base['name'] if base else type(net).__name__} on {data.name}"
        pictures = self._pictures(proof, net, small, data)
        covered = {m.coverage for m in proof.models if m.coverage}
        facts = {"images": str(images).partition(": ")[2], "preparation": "; ".join(store.about(net))}
        facts |= {"in few bits": " ".join(covered)} if covered else {}
        said: dict[str, Any] = dict(recipe=done, pictures=pictures, notes=self.notes, log=self.log, facts=facts)
        write_report(proof, self.folder / "report.html", title=title, **said)
        return proof

    def _made(self, net: nn.Module, recipe: Recipe, calibrate: Tensor, learn_from: Data | None) -> nn.Module:
        """`net` through the recipe; with images to learn from it is healed before the first step that quantizes."""
        if learn_from is None:
            return slim(net, recipe, calibrate, self.progress, self.resume)
        first = next((i for i, s in enumerate(recipe.steps) if s.family == "quant"), len(recipe.steps))
        if late := [s.name for s in recipe.steps[first:] if s.family != "quant"]:
            raise VitreousError(f"with --heal integers come last: put {late[0]} before {recipe.steps[first].name}")
        small = slim(net, recipe.steps[:first], calibrate, self.progress, self.resume)
        return slim(self._healed(small, net, learn_from), recipe.steps[first:], calibrate, self.progress, self.resume)

    def _healed(self, small: nn.Module, net: nn.Module, learn_from: Data) -> nn.Module:
        steps = ", ".join(str(s) for s in history_of(small).steps())
        run = None if self.resume is None else self.resume / "heal" / fingerprint(steps)[:12]
        self.notes.append(f"{steps}: healed for {self.heal:g} epochs on {len(learn_from)} images, none of which it is proven on")
        return heal(
            small,
            net,
            learn_from,
            epochs=self.heal,
            batch=min(HEAL_BATCH, len(learn_from)),
            augment="shift",
            seed=self.seed,
            out=run,
            progress=lambda line, share: self.progress("healing", share),
        )

    def _lost(self, judge: Judge | None, trial: Trial) -> Loss | None:
        self.progress(f"what {trial.name} loses", 0.0)
        return judge.loss(trial.runtime) if judge else None

    def _proof(self, net: nn.Module, small: nn.Module, runtime: Runtime, data: Data) -> Proof:
        models: dict[str, Any] = {"original": net, "slimmed": small, "shipped": runtime}
        batches = (1, 64) if (runtime.macs or 0) <= QUICK else (1, 16)
        proof = prove(
            models, data, batches=batches, seconds=SECONDS, threads=self.threads, seed=self.seed, progress=self.progress
        )
        proof.save(self.folder / "proof.json")
        return proof

    def _too_few(self, choose: Data | None, lost: Loss | None) -> None:
        """Where one image is more than the whole budget, the recipe was chosen by luck."""
        if choose is None or lost is None:
            return
        budget = self.goal.allowed(lost.criterion)
        if 100 / len(choose) > budget:
            self.notes.append(
                f"the recipe was chosen on {len(choose)} images, of which each is {100 / len(choose):.1f} {lost.criterion.unit}: "
                f"too few to keep to {budget:g}; the proof, on others, says what was really lost"
            )

    # ---- pictures of the report

    def _pictures(self, proof: Proof, net: nn.Module, small: nn.Module, data: Data) -> list[Picture]:
        answers = proof["shipped"].answers
        changed = {c.index: c for c in answers.changed}
        rest = [i for i in range(len(data)) if i not in changed]
        indices = [*list(changed)[:PICTURES], *rest][: max(PICTURES, min(len(changed), PICTURES) + 4)]
        pictures: list[Picture] = []
        for start in range(0, len(indices), TOGETHER):
            self.progress("drawing pictures", start / len(indices))
            some = indices[start : start + TOGETHER]
            x = data.tensor(some)
            before = after = layers = None
            with suppress(VitreousError):  # the report says why there is no drift
                before = see.rollout(net, x).numpy()
                after = see.rollout(small, x).numpy()
                layers = see.survival(small, x)
            for j, i in enumerate(some):
                c = changed.get(i)
                label = data.classes[data.labels[i]] if data.labels is not None and len(data.classes) else None
                picture = Picture(data.picture(i), f"image {i}", label, c.before if c else None, c.after if c else None)
                picture.attention_before = None if before is None else before[j]
                picture.attention_after = None if after is None else after[j]
                picture.survival = [(layer, groups[j]) for layer, groups in layers or ()]
                pictures.append(picture)
        return pictures
