"""Training batches that depend on seed, epoch and place alone: not on workers, processes, or where a run was stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import Data
from ..data.shards import in_windows
from ..errors import VitreousError
from .objective import Batch


def seed_everything(*numbers: int) -> None:
    """Seed torch, numpy and random from a row of numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Order:
    """Which images make up micro-batch `k` of step `s`: `steps` a run, `pieces` micro-batches a step, of `size` images each."""

    images: int
    steps_an_epoch: int
    steps: int
    pieces: int
    size: int
    seed: int
    shards: np.ndarray | None = None
    drawn: dict[int, np.ndarray] = field(default_factory=dict)  # the order of the epoch that is read

    def indices(self, step: int, piece: int) -> tuple[int, list[int]]:
        """The epoch, and the places in the data; of shards, pictures of one are near each other."""
        epoch, inside = divmod(step, self.steps_an_epoch)
        if epoch not in self.drawn:
            draw = np.random.default_rng((self.seed, epoch))
            self.drawn.clear()
            self.drawn[epoch] = draw.permutation(self.images) if self.shards is None else in_windows(self.shards, draw)
        order = self.drawn[epoch]
        first = (inside * self.pieces + piece) * self.size
        return epoch, order[first : first + self.size].tolist()


class _Mine:
    """A batch sampler: the micro-batches of one process, from step `first` on."""

    def __init__(self, order: Order, first: int, mine: range) -> None:
        self.order, self.first, self.mine = order, first, mine

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.order.steps):
            for piece in self.mine:
                epoch, places = self.order.indices(step, piece)
                yield [(epoch, i) for i in places]

    def __len__(self) -> int:
        return (self.order.steps - self.first) * len(self.mine)


@runtime_checkable
class Labelling(Protocol):
    """A transform that brings the label of what it makes."""

    def labelled(self, picture: Any, place: int) -> tuple[Tensor, Tensor]: ...


class _Augmented(Dataset):
    """Pictures of `data`, changed by `transform` as drawn by seed, epoch and place."""

    def __init__(self, data: Data, transform: Callable[[Any], Tensor] | Labelling, seed: int) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, i = key
        seed_everything(self.seed, epoch, i)
        if isinstance(self.transform, Labelling):
            return *self.transform.labelled(self.data._whole(i), i), i
        label = -1 if self.data.labels is None else self.data.labels[i]
        return self.transform(self.data._whole(i)), torch.as_tensor(label), i


Pair = tuple[Tensor, Tensor | None]


def in_turn(data: Data | Pair, size: int = 64) -> Iterator[Pair]:
    """Images and labels, `size` at a time, in their own order and unchanged."""
    if isinstance(data, Data):
        yield from data.batches(size)
        return
    images, labels = data
    for i in range(0, len(images), size):
        yield images[i : i + size], None if labels is None else labels[i : i + size]


class Batches:
    """The batches of one process: an iterator over steps, each a list of (`piece`, `Batch`).

    `data` is a `Data`, or a pair of tensors `(images, labels or None)` that may lie on the device already.
    """

    def __init__(
        self,
        data: Data | Pair,
        transform: Callable[[Any], Tensor] | Labelling | None,
        order: Order,
        first: int,
        mine: range,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        mix_until: float,
        workers: int,
        device: torch.device,
    ) -> None:
        self.data, self.transform, self.order, self.first, self.mine = data, transform, order, first, mine
        self.mix, self.workers, self.device = mix, workers, device
        self.mixed_steps = mix_until * order.steps
        if isinstance(transform, Labelling) and isinstance(mix, Mixup):
            raise VitreousError("mixup and cutmix mix class numbers, and these pictures bring shares of classes: leave them out")

    def __iter__(self) -> Iterator[list[tuple[int, Batch]]]:
        pieces = self._loaded() if isinstance(self.data, Data) else self._held()
        for step in range(self.first, self.order.steps):
            yield [(piece, self._mixed(next(pieces), step, piece)) for piece in self.mine]

    def _loaded(self) -> Iterator[Batch]:
        assert isinstance(self.data, Data) and self.transform is not None
        loader = DataLoader(
            _Augmented(self.data, self.transform, self.order.seed),
            batch_sampler=_Mine(self.order, self.first, self.mine),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels, index in loader:
            labels = None if self.data.labels is None else labels.to(self.device, non_blocking=True)
            yield Batch(images.to(self.device, non_blocking=True), labels, index)

    def _held(self) -> Iterator[Batch]:
        held: Any = self.data
        images, labels = held
        for places in _Mine(self.order, self.first, self.mine):
            index = torch.tensor([i for _, i in places])
            where = index.to(images.device)
            x, y = images[where].to(self.device), None if labels is None else labels[where].to(self.device)
            if self.transform is not None:
                seed_everything(self.order.seed, places[0][0], places[0][1])
            if isinstance(self.transform, Labelling):
                made = [self.transform.labelled(one, i) for one, i in zip(x, index.tolist(), strict=True)]
                x, y = (torch.stack(t).to(self.device) for t in zip(*made, strict=True))
            elif self.transform is not None:
                x = self.transform(x)
            yield Batch(x, y, index)

    def _mixed(self, batch: Batch, step: int, piece: int) -> Batch:
        if self.mix is None or step >= self.mixed_steps:
            return batch
        seed_everything(self.order.seed, step, piece, 1)
        images, labels = self.mix(batch.images, batch.need_labels())
        return Batch(images, labels, batch.index)


def planned(
    images: int, batch: int, micro: int | None, world: int, epochs: float, seed: int, shards: np.ndarray | None = None
) -> Order:
    """How the images are cut. Raises `VitreousError` where they cannot: fewer than a batch, a batch that does not divide."""
    if batch < 1 or not 0 < epochs < float("inf"):
        raise VitreousError(f"cannot train for {epochs} epochs with {batch} images a batch: both must be above 0, and finite")
    if images < batch:
        raise VitreousError(f"the data has {images} images, fewer than a batch of {batch}: give a batch of at most {images}")
    size = micro or max(batch // world, 1)
    if batch % (size * world):
        raise VitreousError(
            f"a batch of {batch} cannot be cut into pieces of {size} on {world} processes: "
            f"give a batch that is a multiple of {size * world}"
        )
    an_epoch = images // batch
    return Order(images, an_epoch, max(1, round(epochs * an_epoch)), batch // size, size, seed, shards)
