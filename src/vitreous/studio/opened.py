"""The models that the studio has open, and the quick questions that a click asks of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import see
from ..anatomy import read
from ..cli.options import DataOptions, ModelOptions
from ..data import Data
from ..data.transform import preparation
from ..score import two
from ..see.look import Look, look
from ..store.expects import class_names
from .lane import Lane

HELD = 2**28  # bytes of attention that are kept of an image; of larger models one layer at a time
IMAGES = 256  # of the data, on which heads are removed
T = TypeVar("T")
QUICK = ("attention", "rollout")  # explanations that a click may wait for


@dataclass(frozen=True)
class Source:
    """What to open, in words, so that another process can open the same."""

    model: str | None = None
    opening: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)

    def net(self) -> nn.Module:
        return self.opening.open(self.model)

    def pictures(self, net: nn.Module, limit: int | None = None) -> Data:
        told = self.data.limit
        return replace(self.data, limit=min(told, limit) if told and limit else told or limit).open(net, labelled=False)

    @property
    def title(self) -> str:
        return Path(self.model).stem if self.model and self.model.endswith(".safetensors") else self.model or "bundled model"


@dataclass(frozen=True)
class Loss:
    """What a change did: by how much each picture's output moved, |f − f'| / |f| `[n]`; accuracy before and after; agreement."""

    moved: np.ndarray
    accuracy: tuple[float, float] | None = None
    same: float | None = None

    def __str__(self) -> str:
        said = f"outputs move by {100 * self.moved.mean():.1f} % on average over {len(self.moved)} pictures"
        if self.accuracy is None or self.same is None:
            return said
        before, after = (100 * share for share in self.accuracy)
        return f"accuracy {before:.1f} % → {after:.1f} %, {100 * (1 - self.same):.1f} % of the answers change, {said}"


class Opened:
    """One model with its pictures, and the questions to it.

    Looking into a model hangs hooks on it, so each copy serves one caller at a time, in its lane; slow questions have a copy
    of their own, and never keep a click waiting.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.title = source, source.title
        self.net = source.net()
        self.data = source.pictures(self.net)
        self.anatomy = read(self.net)
        self.prepare = preparation(self.net)
        self.known: dict[str, Any] = {}  # what long work found out about this model, for everyone
        self._copy = copy.deepcopy(self.net, {id(p): p for p in self.net.parameters()})  # with the same weights
        self._quick, self._slow = Lane(), Lane()

    @property
    def heads(self) -> list[int]:
        """How many heads each attention layer has."""
        return [a.heads or 1 for a in self.anatomy.attention]

    async def look(self, x: Tensor, layer: int) -> Look:
        """All layers where they fit into `HELD` bytes, else only `layer`."""
        h, w = self.anatomy.grid or (1, 1)
        size = 4 * sum(self.heads) * (self.anatomy.prefix + h * w) ** 2
        return await self._quick.run(look, self.net, x, None if size <= HELD else [layer], "the image view")

    async def explain(self, method: str, x: Tensor) -> tuple[np.ndarray, float]:
        """`[h, w]`, the heatmap of one explanation, and the seconds that it took once its turn had come."""
        lane, net = (self._quick, self.net) if method in QUICK else (self._slow, self._copy)
        return await lane.run(_explained, method, net, x)

    async def survival(self, x: Tensor) -> list[tuple[str, np.ndarray]]:
        return [(layer, groups[0]) for layer, groups in await self._quick.run(see.survival, self.net, x)]

    async def slowly(self, function: Callable[..., T], *arguments: object) -> T:
        """What `function(net, *arguments)` returns of the copy for slow questions."""
        return await self._slow.run(function, self._copy, *arguments)

    def prepared(self, picture: Image.Image) -> tuple[Image.Image, Tensor]:
        """A picture as people see it, cut as the model sees it; and as the model reads it, `[1, C, H, W]`."""
        picture = picture.convert(self.prepare.mode)
        return self.prepare.view(picture), self.prepare.to_tensor(picture)[None]

    def answer(self, logits: Tensor) -> str:
        """What the model says of a picture, `[K]` logits; empty for a model without classes."""
        if not getattr(self.net, "num_classes", 0):
            return ""
        marks = self.data.labels is not None and self.data.labels.ndim == 2  # each class is a yes or no of its own
        best = (logits.sigmoid() if marks or len(logits) == 1 else logits.softmax(0)).topk(min(3, len(logits)))
        known = (class_names(self.net), self.data.classes)  # what the model calls them comes first
        names = next((n for n in known if len(n) == len(logits)), [f"class {k}" for k in range(len(logits))])
        return "Answer: " + ", ".join(f"{names[int(k)]} {100 * float(p):.1f} %" for p, k in zip(*best, strict=True))

    @cached_property
    def _tested(self) -> tuple[Tensor, Tensor]:
        """The images on which heads are removed, and what the whole model answers."""
        x = self.data.tensor(range(min(IMAGES, len(self.data))))
        return x, self._answers(x, {})

    async def without(self, removed: dict[int, list[int]]) -> Loss:
        """What is lost when heads are removed, `{layer: heads}`, on the first `IMAGES` pictures."""
        return await self._slow.run(self._without, removed)

    def _without(self, removed: dict[int, list[int]]) -> Loss:
        x, before = self._tested
        after = self._answers(x, removed)
        moved = ((after - before).norm(dim=1) / before.norm(dim=1)).numpy()
        if not getattr(self.net, "num_classes", 0) or self.data.labels is None or self.data.labels.ndim > 1:
            return Loss(moved)
        labels = torch.as_tensor(self.data.labels[: len(x)])
        said = [two(logits).argmax(1) for logits in (before, after)]
        right = [float((answer == labels).float().mean()) for answer in said]
        return Loss(moved, (right[0], right[1]), float((said[0] == said[1]).float().mean()))

    def _answers(self, x: Tensor, removed: dict[int, list[int]]) -> Tensor:
        from ..glass import glass

        with torch.inference_mode(), glass(self._copy, record=()) as g:
            for layer, heads in removed.items():
                g.mask_heads(layer, heads)
            return torch.cat([self._copy(part) for part in x.split(32)])


def _explained(method: str, net: nn.Module, x: Tensor) -> tuple[np.ndarray, float]:
    began = time.perf_counter()
    return see.METHODS[method](net, x)[0].detach().cpu().numpy(), time.perf_counter() - began
