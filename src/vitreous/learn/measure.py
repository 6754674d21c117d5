"""How well a model does: while it learns, and on images that it does not learn from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import VitreousError
from ..outputs import answer, embeds
from ..score import two
from .batches import Pair, in_turn
from .objective import Batch, Seen, pooled, several
from .retrieval import retrieval

LATE = 16


class Meter:
    """Running means of the loss and its terms, and of accuracy where labels are class numbers or shares and the model judges.

    A GPU is asked for its numbers every `LATE` pieces of a batch, for it would stand still meanwhile. Raises `VitreousError` for
    a loss that is not finite, which names the step and the images.
    """

    def __init__(self, judges: bool) -> None:
        self.judges = judges
        self.images, self.loss, self.right, self.judged = 0, 0.0, 0.0, 0
        self.terms: dict[str, float] = {}
        self.late: list[tuple[int, int, Tensor, Tensor, dict[str, Tensor], Tensor | None]] = []

    @torch.no_grad()
    def add(self, loss: Tensor, terms: dict[str, Tensor], seen: Seen, batch: Batch, step: int = 0) -> None:
        right = None
        if self.judges and batch.labels is not None and seen.logits.ndim == 2 and len(seen.logits) == len(batch.images):
            right = marks(seen.logits, batch.labels)
        self.late.append((step, len(batch.images), batch.index, loss.detach(), {k: t.detach() for k, t in terms.items()}, right))
        if len(self.late) >= (LATE if loss.is_cuda else 1):
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Count what was added."""
        late, self.late = self.late, []
        numbers = [
            t.double() for *_, loss, terms, right in late for t in (loss, *terms.values(), loss if right is None else right)
        ]
        values = iter(torch.stack(numbers).tolist() if numbers else ())
        for step, n, index, _, terms, right in late:
            loss, told = next(values), {name: next(values) for name in terms}
            counted = next(values)
            if not math.isfinite(loss):
                bad = [name for name, value in told.items() if not math.isfinite(value)]
                raise VitreousError(
                    f"the loss is not finite at step {step} (term {', '.join(bad) or 'sum'}; images {index[:8].tolist()} …): "
                    "try a lower learning rate, a longer warm-up or a smaller clip=; with fp16 try bf16"
                )
            self.images += n
            self.loss += loss * n
            for name, value in told.items():
                self.terms[name] = self.terms.get(name, 0.0) + value * n
            if right is not None:
                self.right += counted
                self.judged += n

    @property
    def accuracy(self) -> float | None:
        return self.right / self.judged if self.judged else None


def marks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of the answers `[B, K]` are right, one logit taken for two classes; where labels mark several classes, the share
    of right marks of each, summed."""
    if several(labels):
        return ((logits > 0) == (labels > 0.5)).float().mean(1).sum()
    return (two(logits).argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))).sum()


def accuracy_on(model: nn.Module, data: Data | Pair, size: int = 64) -> float | None:
    """Share of the labelled images of `data` that `model` gets right, as `marks` counts; of a model that gives features,
    recall@1 among them. None without labels, and where no class has two images to find each other."""
    right = n = 0
    features: list[tuple[Tensor, Tensor]] = []
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.inference_mode():
        for x, y in in_turn(data, size):
            if y is None:
                return None
            logits = answer(model(x.to(device)))
            if embeds(model, x.to(device)):
                features.append((logits.cpu(), y.cpu()))
                continue
            right += float(marks(logits, y.to(device)))
            n += len(x)
    model.train(training)
    if features:
        found, labels = (torch.cat(t) for t in zip(*features, strict=True))
        once = found.ndim != 2 or labels.ndim != 1 or len(labels.unique()) == len(labels)
        return None if once else retrieval(found, labels, (1,))["recall@1"]
    return right / n


def features(model: nn.Module, data: Data | Pair, size: int = 64) -> Tensor:
    """`[N, D]`, float32: what the classifier of `model` reads of each image of `data`, or the answer where there is none."""
    device, training = next(model.parameters()).device, model.training
    with torch.inference_mode():
        found = [pooled(model.eval(), x.to(device)) for x, _ in in_turn(data, size)]
    model.train(training)
    return torch.cat([f.float().cpu().flatten(1) for f in found]).clone()
