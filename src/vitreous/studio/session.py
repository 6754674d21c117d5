"""What one browser page shows, and what belongs to it alone: its view, its uploads, the models it made."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlencode

from PIL import Image
from torch import Tensor

from ..data.pictures import Unreadable, read_picture
from ..errors import VitreousError
from ..prove.drawing import data_uri
from ..see.look import Look
from . import folders
from .lane import Lane
from .opened import Opened

MAX_BYTES = 20 * 2**20  # of one upload
THUMBS = 200
MAX_UPLOADS = 32  # of one page; the first goes when one more comes

T = TypeVar("T")
Listener = Callable[[], Awaitable[None]]
_decoding = Lane()  # one picture at a time, whoever sends it: a decoded one takes hundreds of times the memory of its file


class Superseded(Exception):
    """A newer question took the place of this one before it was answered."""


@dataclass(frozen=True)
class State:
    """What a permalink restores. Layers, heads and patches count from 0, as in Python.

    `head` -1 is the mean of all, `patch` -1 the class token, `layer` -1 the last; `removed`: "layer.head,…".
    """

    view: str = "image"
    model: int = 0
    image: int = 0
    layer: int = -1
    head: int = -1
    patch: int = -1
    methods: str = "rollout,grad_cam,transformer_attribution"
    colour: str = "distance"
    removed: str = ""

    def query(self) -> str:
        """What differs from the beginning, as the end of an address."""
        start = State()
        return urlencode({f.name: v for f in fields(self) if (v := getattr(self, f.name)) != getattr(start, f.name)})

    @classmethod
    def of(cls, query: dict[str, str]) -> State:
        """From an address; what is unknown or no number is left out."""
        known: dict[str, Any] = {}
        for f in fields(cls):
            if f.name in query:
                try:
                    known[f.name] = type(f.default)(query[f.name])
                except ValueError:
                    continue
        return cls(**known)


@dataclass(frozen=True)
class Upload:
    name: str
    picture: Image.Image


class Session:
    """One page. `change` moves it; whoever listens draws again."""

    def __init__(self, models: list[Opened], state: State, runs: Path | None = None) -> None:
        self.models, self.runs = list(models), runs  # `runs`: a folder of training runs to show
        self.uploads: dict[int, Upload] = {}  # by numbers below 0: -1 is the first
        self.folder = tempfile.TemporaryDirectory(dir=folders.own())
        self.listeners: list[Listener] = []
        self.state = self._possible(state)
        self._pictured: dict[tuple[Opened, int], tuple[Image.Image, Tensor]] = {}
        self._looked: dict[tuple[int, int], Look] = {}
        self._thumbs: dict[tuple[Opened, int], str] = {}
        self._asked: dict[str, asyncio.Task[Any]] = {}
        self._count = 0

    async def change(self, **to: Any) -> None:
        """Move to another state; nothing happens when it is the same, as when a control is set to what it shows."""
        new = self._possible(replace(self.state, **to))
        if new != self.state:
            self.state = new
            await self.refresh()

    async def refresh(self) -> None:
        for listener in list(self.listeners):
            await listener()

    async def newest(self, kind: str, question: Coroutine[Any, Any, T]) -> T:
        """The answer; one of this kind that is still waiting is given up. Raises `Superseded` when that happens to this one."""
        if kind in self._asked:
            self._asked[kind].cancel()
        task = self._asked[kind] = asyncio.ensure_future(question)
        try:
            return await task
        except asyncio.CancelledError:
            if self._asked.get(kind) is task:
                raise
            raise Superseded from None

    def _possible(self, state: State) -> State:
        """The nearest state that there is: a link may come from another model or data set, or another's upload."""
        state = replace(state, model=state.model if 0 <= state.model < len(self.models) else 0)
        opened = self.models[state.model]
        layers = max(1, len(opened.heads))
        layer = state.layer if 0 <= state.layer < layers else layers - 1
        h, w = opened.anatomy.grid or (0, 0)
        there = state.image in self.uploads or 0 <= state.image < len(opened.data)
        heads = opened.heads[layer] if opened.heads else 0
        return replace(
            state,
            layer=layer,
            image=state.image if there else 0,
            head=state.head if -1 <= state.head < heads else -1,
            patch=state.patch if -1 <= state.patch < h * w else -1,
        )

    def removed(self) -> dict[int, list[int]]:
        """The heads to do without, by layer; what the model does not have is left out."""
        found: dict[int, list[int]] = {}
        for name in self.state.removed.split(","):
            layer, _, head = name.partition(".")
            if layer.isdigit() and head.isdigit():
                i, h = int(layer), int(head)
                if 0 <= i < len(self.opened.heads) and 0 <= h < self.opened.heads[i]:
                    found.setdefault(i, []).append(h)
        return found

    # ---- pictures

    @property
    def opened(self) -> Opened:
        return self.models[self.state.model]

    def named(self, image: int) -> str:
        if image in self.uploads:
            return self.uploads[image].name
        data = self.opened.data
        label = data.classes[data.labels[image]] if data.labels is not None and data.labels.ndim == 1 and data.classes else ""
        return f"image {image}" + (f", {label}" if label else "")

    def pictured(self, opened: Opened, image: int) -> tuple[Image.Image, Tensor]:
        """A picture as people see it, and as `opened` reads it, `[1, C, H, W]`; the last two are kept."""
        key = (opened, image)
        if (found := self._pictured.get(key)) is None:
            upload = self.uploads.get(image)
            found = opened.prepared(upload.picture) if upload else (opened.data.picture(image), opened.data.tensor([image]))
            self._pictured = dict([*self._pictured.items(), (key, found)][-2:])
        return found

    def thumb(self, image: int) -> str:
        """A small picture as a `data:` address; the last `THUMBS` are kept."""
        key = (self.opened, image)
        if key not in self._thumbs:
            picture = self.pictured(self.opened, image)[0].convert("RGB")
            picture.thumbnail((112, 112))
            self._thumbs = dict([*self._thumbs.items(), (key, data_uri(picture))][-THUMBS:])
        return self._thumbs[key]

    async def look(self, model: int, image: int, layer: int) -> Look:
        """The attention of a model on an image; that of the last two is kept."""
        found = self._looked.get((model, image))
        opened = self.models[model]
        if found is None or (len(found.layers) < len(opened.heads) and found.layers[0].name != _name(opened, layer)):
            _, x = await asyncio.to_thread(self.pictured, opened, image)
            found = await opened.look(x, layer)
            self._looked = dict([*self._looked.items(), ((model, image), found)][-2:])
        return found

    async def upload(self, name: str, content: BinaryIO) -> int:
        """Take in a picture; its number. Raises `VitreousError` when it is none, or too large."""
        picture = await _decoding.run(self._decoded, name, content)
        self._count += 1
        self.uploads[-self._count] = Upload(name, picture)
        for old in list(self.uploads)[:-MAX_UPLOADS]:
            del self.uploads[old]
        return -self._count

    def _decoded(self, name: str, content: BinaryIO) -> Image.Image:
        with tempfile.NamedTemporaryFile(dir=self.folder.name) as file:
            shutil.copyfileobj(content, file)
            file.flush()
            if (size := file.tell()) > MAX_BYTES:
                raise VitreousError(f"{name} has {size / 2**20:.0f} MB: at most {MAX_BYTES // 2**20} MB are taken")
            try:
                picture = read_picture(Path(file.name))
            except Unreadable as reason:
                raise VitreousError(f"{name} cannot be used: {reason}") from None
        picture.thumbnail((1024, 1024))
        return picture

    def close(self) -> None:
        for task in self._asked.values():
            task.cancel()
        self.folder.cleanup()


def _name(opened: Opened, layer: int) -> str:
    return opened.anatomy.attention[layer].name
