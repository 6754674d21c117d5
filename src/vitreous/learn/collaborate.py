"""Two students, a CNN and a ViT, that learn together and teach each other where each is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..data.transform import preparation
from ..errors import VitreousError
from ..outputs import answer
from ..score import two
from .maps import as_map, last_stages, probe
from .objective import Batch, Now, Objective, Seen, look, objective


class Students(nn.Module):
    """Two models that see the same pictures. It answers with the mean of their logits; `cnn` and `vit` are taken out by name."""

    vitreous_embeds = False  # classes, of the image or of each pixel

    def __init__(self, cnn: nn.Module, vit: nn.Module) -> None:
        super().__init__()
        self.cnn, self.vit = cnn, vit
        if hasattr(vit, "pretrained_cfg"):
            self.pretrained_cfg: Any = dict(preparation(vit).config)  # pictures as the ViT wants them

    def forward(self, images: Tensor) -> Tensor:
        a, b = together(answer(self.cnn(images)), answer(self.vit(images)))
        return (a + b) / 2


def fitted(x: Tensor, size: torch.Size) -> Tensor:
    """Maps `[B, C, h, w]` at another size, bilinearly; what is no map stays."""
    return x if x.ndim < 4 or x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def together(a: Tensor, b: Tensor, size: torch.Size | None = None) -> tuple[Tensor, Tensor]:
    """Both logits at one size, the second's by default, one logit as two classes. Raises `VitreousError` where they are not of
    the same classes."""
    if a.shape[:2] != b.shape[:2] or a.ndim != b.ndim:
        raise VitreousError(f"the students answer {list(a.shape[1:])} and {list(b.shape[1:])}: give two of the same classes")
    a, b = (two(z.movedim(1, -1)).movedim(-1, 1) for z in (a, b))
    size = b.shape[2:] if size is None else size
    return fitted(a, size), fitted(b, size)


def better(a: Tensor, b: Tensor, labels: Tensor, regions: int | None = None) -> Tensor:
    """Where logits `a` `[B, K, …]` have the lower cross-entropy than `b`, 1, where the higher, −1, and 0 where they are alike:
    `[B, …]`, or of `regions` × `regions` regions by their means. A label of −1 counts for nobody."""
    with torch.no_grad():
        own, other = (F.cross_entropy(z.float(), labels, reduction="none", ignore_index=-1) for z in (a, b))
        if regions:
            own, other = (F.adaptive_avg_pool2d(x, regions) for x in (own, other))
        return (other - own).sign()


def pixel_wise(a: Tensor, b: Tensor, who: Tensor, tau: float = 1.0) -> Tensor:
    """Of logits `[B, K, …]`, τ² KL(better ‖ worse) where there is a better one (`who`, as `better` tells); no gradient into the
    better. The mean over all places."""
    log_a, log_b = (F.log_softmax(z.float() / tau, 1) for z in (a, b))
    to_b = F.kl_div(log_b, log_a.detach(), reduction="none", log_target=True).sum(1)
    to_a = F.kl_div(log_a, log_b.detach(), reduction="none", log_target=True).sum(1)
    return tau * tau * ((who > 0) * to_b + (who < 0) * to_a).mean()


def region_wise(a: Tensor, b: Tensor, who: Tensor) -> Tensor:
    """Of features `[B, C, h, w]`, pooled to the regions of `who [B, r, r]`: the worse student's is turned to the better one's,
    which stands still. 1 − cosine, the mean over all regions."""
    a, b = (F.adaptive_avg_pool2d(x, (who.shape[1], who.shape[2])) for x in (a, b))
    to_b, to_a = 1 - F.cosine_similarity(a.detach(), b, dim=1), 1 - F.cosine_similarity(a, b.detach(), dim=1)
    return ((who > 0) * to_b + (who < 0) * to_a).mean()


@objective
@dataclass(frozen=True)
class Collaborate(Objective):
    """Zhu et al., "A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic Segmentation"
    (ICCV 2023), for a model that is `Students(cnn, vit)`, and labels `[B, H, W]` (segmentation; −1 where nobody is asked) or
    `[B]`, where an image counts as one pixel and there are no regions.

    Both learn the labels. Heterogeneous feature distillation (weight `features`): the low features of each, projected to the
    other's width, draw near to the other's. Bidirectional selective distillation: in each of `regions` × `regions` regions
    (weight `region`), and at each pixel (weight `pixel`), whoever has the lower cross-entropy there teaches the other.

    No code was published, and of the text only the idea could be had. Ours: cosine distances, weights, KL at `tau`, and the low
    and high features, which are the last two stages of either student where `low` and `high` (a submodule of the CNN, one of
    the ViT) do not name others. `size`: pixels a side of the pictures, where it is not what the ViT expects.
    """

    wants = ()
    features: float = 0.1
    region: float = 0.5
    pixel: float = 1.0
    regions: int = 4
    tau: float = 1.0
    low: tuple[str, str] | None = None
    high: tuple[str, str] | None = None
    size: int | None = None

    def _students(self, model: nn.Module) -> list[tuple[nn.Module, tuple[str, str], int]]:
        """Each student, its low and its high submodule, its prefix tokens."""
        if not isinstance(model, Students):
            raise VitreousError("Collaborate teaches two students: train vt.learn.Students(cnn, vit), or give --partner")
        found = []
        for i, student in enumerate((model.cnn, model.vit)):
            low, high = self.low[i] if self.low else None, self.high[i] if self.high else None
            stages = last_stages(student, "Collaborate") if low is None or high is None else ("", "")
            found.append((student, (low or stages[0], high or stages[1]), read(student).prefix))
        return found

    def parts(self, model: nn.Module) -> nn.Module:
        students = self._students(model)
        size = self.size or preparation(students[1][0]).config["input_size"][-1]
        widths = [[as_map(t, prefix).shape[1] for t in probe(m, size, names)] for m, names, prefix in students]
        (low_a, high_a), (low_b, high_b) = widths
        pairs = {"to_b": (low_a, low_b), "to_a": (low_b, low_a), "high": (high_a, high_b)}
        return nn.ModuleDict({name: nn.Conv2d(i, o, 1) for name, (i, o) in pairs.items()})

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        parts, labels = cast(nn.ModuleDict, now.parts), batch.one_each
        logits, maps = [], []
        for student, names, prefix in self._students(now.model):
            view = look(student, batch.images, ("logits",), (), names)
            logits.append(view.logits)
            maps.append([as_map(view.layers[n], prefix).float() for n in names])
        (low_a, high_a), (low_b, high_b) = maps
        dense = labels.ndim == 3
        a, b = together(logits[0], logits[1], labels.shape[1:] if dense else None)
        seen.logits = (a + b).detach() / 2
        target, hard = labels if labels.ndim != 2 else labels.to(a), labels if labels.ndim != 2 else labels.argmax(1)
        terms = {f"cls {n}": F.cross_entropy(z.float(), target, ignore_index=-1) for n, z in (("cnn", a), ("vit", b))}
        if self.features:
            near = [(parts["to_b"](low_a), low_b), (parts["to_a"](low_b), low_a)]
            apart = [1 - F.cosine_similarity(x, fitted(y.detach(), x.shape[2:]), dim=1).mean() for x, y in near]
            terms["features"] = self.features * (apart[0] + apart[1])
        if self.region and dense:
            terms["region"] = self.region * region_wise(parts["high"](high_a), high_b, better(a, b, hard, self.regions))
        if self.pixel:
            terms["pixel"] = self.pixel * pixel_wise(a, b, better(a, b, hard), self.tau)
        return terms
