"""Does a file compute what its model computes?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import VitreousError
from .named import Named

IMAGES = 16  # at least so many are compared, whatever the batch
BATCHES = (1, 3, 16)
RESHAPED = (1, 4)  # an OpenVINO file for any batch is also tried as programs deploy it, reshaped to a fixed one
NUDGE = 1e-5

Run = Callable[[Tensor], Tensor | Mapping[str, Tensor]]


@dataclass(frozen=True)
class Parity:
    """How far a file's outputs are from the model's, on the same images.

    An image's error is ‖a − b‖₂ / ‖b‖₂ over its output, of several outputs the largest; mean and worst are over the images.
    agreement: share of images with the same first class, or for one logit on the same side of 0; None for features.
    batches: the batch sizes tried. reshaped: those to which an OpenVINO file was reshaped; of all, the worst counts.
    outputs: the mean error of each output.
    """

    mean: float
    worst: float
    agreement: float | None
    batches: tuple[int, ...]
    reshaped: tuple[int, ...] = ()
    outputs: dict[str, float] = field(default_factory=dict)
    classes: int = 0

    def __str__(self) -> str:
        same = "" if self.agreement is None else f", same {'sign' if self.classes == 1 else 'top-1'} {self.agreement:.0%}"
        batches = ", ".join(map(str, self.batches))
        batches += f"; reshaped to {', '.join(map(str, self.reshaped))}" if self.reshaped else ""
        each = ", ".join(f"{name} {mean:.1e}" for name, mean in self.outputs.items())
        each = f" ({each})" if len(self.outputs) > 1 else ""
        return f"mean error {self.mean:.1e}{each}, worst {self.worst:.1e}{same} (batch {batches})"


class Yardstick:
    """What `model` answers to `images` `[N, C, H, W]`, asked in batches of `size`, to hold a file against."""

    def __init__(self, model: Named, images: Tensor, size: int) -> None:
        self.model, self.images, self.size = model, images, size
        self.wanted = self._answers(images)
        if bad := [name for name, t in self.wanted.items() if not t.isfinite().all()]:
            raise VitreousError(f"{type(model.model).__name__} itself returns NaN or infinity on the example images ('{bad[0]}')")

    def _answers(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            parts = [self.model(part) for part in images.split(self.size)]
        return {name: torch.cat([part[i] for part in parts]).float() for i, name in enumerate(self.model.names)}

    def every(self, run: Run, size: int) -> Parity:
        """All images, in batches of `size`."""
        return self._compare(run, [*range(0, len(self.images), size), len(self.images)])

    def first(self, run: Run, sizes: tuple[int, ...] = BATCHES) -> Parity:
        """The first images in batches of each of `sizes`."""
        return worst([self._compare(run, [0, size]) for size in sizes], sizes)

    def restlessness(self) -> float:
        """How far noise in its images that no one could see moves the answers of a model that rounds: its own `Parity.mean`."""
        generator = torch.Generator().manual_seed(0)
        moved = self._answers(self.images + NUDGE * torch.randn(self.images.shape, generator=generator))
        return self._compare(lambda _: moved, [0, len(self.images)]).mean

    def _compare(self, run: Run, edges: list[int]) -> Parity:
        got = [run(self.images[a:b]) for a, b in pairwise(edges)]
        off, names = {}, self.model.names
        answers: dict[str, Tensor] = {}
        for name in names:
            given = torch.cat([part if isinstance(part, Tensor) else part[name] for part in got]).float()
            wanted = self.wanted[name][edges[0] : edges[-1]]
            if given.shape != wanted.shape:
                raise VitreousError(f"the file's output '{name}' is {list(given.shape)}, the model's {list(wanted.shape)}")
            answers[name] = given
            off[name] = (given - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1).clamp_min(1e-12)
        largest = torch.stack(list(off.values())).amax(0)  # NaN stays NaN
        told, classes = names[self.model.answering], self.model.classes
        a, b = answers[told], self.wanted[told][edges[0] : edges[-1]]
        same = (a > 0) == (b > 0) if classes == 1 else a.argmax(1) == b.argmax(1) if classes else None
        return Parity(
            mean=largest.mean().item(),
            worst=largest.max().item(),
            agreement=None if same is None else same.float().mean().item(),
            batches=tuple(dict.fromkeys(b - a for a, b in pairwise(edges))),
            outputs={name: t.mean().item() for name, t in off.items()},
            classes=classes,
        )


def worst(parities: list[Parity], batches: tuple[int, ...], reshaped: tuple[int, ...] = ()) -> Parity:
    """The one with the largest mean error (NaN above all), said to be of all the sizes tried."""
    found = max(parities, key=lambda p: (p.mean != p.mean, p.mean))
    return replace(found, worst=max(p.worst for p in parities), batches=batches, reshaped=reshaped)
