"""Distillation: NKD and USKD, DeiT-LT, GPT4Image."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

import vitreous as vt
from vitreous.learn.objective import Batch, Now, Seen, objective

from .bench import CLASSES, Bench, Figures, experiment


@experiment("nkd", baseline="cross-entropy")
def nkd(bench: Bench, seed: int) -> dict[str, Figures]:
    """A CNN teaches a ViT; NKD beside Hinton's distillation, and USKD, which has no teacher."""
    ce, teacher = vt.learn.CrossEntropy(), bench.cnn(seed)
    arms = {
        "cross-entropy": [ce],
        "KD, T = 4": [ce, vt.learn.KD(teacher, temperature=4.0)],
        "NKD, γ = 1.5": [ce, vt.learn.NKD(teacher)],
        "USKD": [ce, vt.learn.USKD(0.1, 0.1, 0.1)],
    }
    found = {n: {"accuracy": bench.right(bench.teach(bench.vit(seed), bench.train, o, seed=seed))} for n, o in arms.items()}
    return {n: f | {"gradients": 1.0} for n, f in found.items()} | {"(the teacher)": {"accuracy": bench.right(teacher)}}


@objective
@dataclass(frozen=True)
class TeacherSeesClean(vt.learn.DeiTLT):
    """DeiT-LT whose teacher is shown the picture itself, as plain distillation would: what the paper argues against."""

    clean: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        own = self.clean[batch.index.to(self.clean.device)]
        return super().__call__(seen, batch, replace(now, teach=lambda teacher, _: now.teach(teacher, own)))


@experiment("deit-lt", baseline="teacher sees clean pictures")
def deit_lt(bench: Bench, seed: int) -> dict[str, Figures]:
    """A long tail of 1 : 0.02; head, middle and tail are classes 0–2, 3–6 and 7–9."""
    x, y = bench.pool
    tail = vt.learn.long_tailed(y.cpu(), 0.02, seed).to(y.device)
    data = x[tail], y[tail]
    counts = tuple(torch.bincount(data[1].cpu(), minlength=CLASSES).tolist())
    teacher = bench.cnn(seed, data, "long-tail", optimiser=vt.learn.SAM())
    student = bench.vit(seed, "deit_tiny_distilled_patch16_224")
    strong = dict(seed=seed, mixup=0.8, cutmix=1.0, batch=32 if bench.scale.batch < 256 else 256, times=2)
    arms = {
        "labels alone": (vt.learn.CrossEntropy(), {}),
        "teacher sees clean pictures": (TeacherSeesClean(teacher, clean=data[0]), {}),
        "teacher sees mixed pictures": (vt.learn.DeiTLT(teacher), {}),
        "and deferred weights (DeiT-LT)": (vt.learn.DeiTLT(teacher, counts, defer=0.8), {"mix_until": 0.8}),
    }
    groups = {"head": (0, 1, 2), "middle": (3, 4, 5, 6), "tail": (7, 8, 9)}
    found: dict[str, Figures] = {}
    for name, (objective_, given) in arms.items():
        taught = bench.teach(student, data, objective_, **(strong | given))
        found[name] = {"accuracy": bench.right(taught), "gradients": 1.0}
        for group, classes in groups.items():
            some = torch.isin(bench.test[1], torch.tensor(classes, device=bench.test[1].device))
            found[name][group] = bench.right(taught, (bench.test[0][some], bench.test[1][some]))
    return found | {"(the teacher)": {"accuracy": bench.right(teacher)}}


@experiment("gpt4image", baseline="labels alone")
def gpt4image(bench: Bench, seed: int) -> dict[str, Figures]:
    """No language model is here: a row of the table is the CNN's feature of the image; shuffled, it should teach nothing."""
    cnn = bench.cnn(seed)
    with torch.no_grad():
        table = torch.cat([cast(nn.Module, cnn.features)(x) for x in bench.train[0].split(256)]).cpu()
    g, labels = torch.Generator().manual_seed(seed), bench.train[1].cpu()
    within = torch.arange(len(labels))
    for c in range(CLASSES):
        own = (labels == c).nonzero()[:, 0]
        within[own] = own[torch.randperm(len(own), generator=g)]
    align = lambda rows: vt.learn.AlignToTable(rows.to(bench.device))
    arms = {
        "labels alone": [],
        "own rows": [align(table)],
        "rows of others of the class": [align(table[within])],
        "rows of any image": [align(table[torch.randperm(len(table), generator=g)])],
    }
    ce = vt.learn.CrossEntropy()
    return {
        n: {"accuracy": bench.right(bench.teach(bench.vit(seed), bench.train, [ce, *o], seed=seed)), "gradients": 1.0}
        for n, o in arms.items()
    }
