"""Answers of a shipped file to all pictures of a folder: streamed into Parquet, and taken up again where it was cut off."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.pictures import FORMATS, Unreadable, read_picture
from ..data.transform import preparation
from ..errors import VitreousError
from ..files import digest, write_whole
from ..files.rows import need_parquet
from .runtime import Runtime, files

PART = 1024  # pictures that are lost at most when the process is killed


@dataclass(frozen=True)
class Answered:
    """What was done: pictures in all, how many of them an earlier run had done, and which could not be read, with the reason."""

    path: Path
    pictures: int
    resumed: int
    skipped: list[tuple[str, str]]


def pictures_in(folder: Path) -> list[str]:
    """The picture files below `folder`, by their endings, sorted; as paths relative to it."""
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = [
        os.path.relpath(os.path.join(home, name), folder)
        for home, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in endings and not name.startswith(".")
    ]
    if not found:
        raise VitreousError(f"{folder} holds no pictures")
    return sorted(found)


def answer_folder(
    runtime: Runtime,
    folder: Path,
    out: Path,
    *,
    batch: int = 16,
    shard: tuple[int, int] = (1, 1),
    multi_label: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answered:
    """Write `out`, a row a picture: `path`, the outputs of the file as lists, `error` where a picture could not be read.

    Of a classifier also `answer`, the number of the first class, its `name` and its `confidence`; with `multi_label` lists of all
    classes whose sigmoid is above a half. `shard` (i, n) takes every nth
    picture from the ith on. Parts of `PART` pictures lie in `out` + `.parts` until all are there, so that a killed run
    goes on where it was; what belongs to another file, folder or shard is not mixed in, but refused.
    """
    arrow, parquet = need_parquet()
    names = pictures_in(folder)[shard[0] - 1 :: shard[1]]
    if not names:
        raise VitreousError(f"shard {shard[0]}/{shard[1]} has no pictures: there are fewer than shards")
    parts = out.with_name(out.name + ".parts")
    whose = [*map(digest, files(runtime.path)), *(["multi-label"] if multi_label else [])]
    key = hashlib.sha256(os.fsencode("\0".join([*whose, *names]))).hexdigest()
    try:
        if (parts / "key").exists() and (parts / "key").read_text() != key:
            raise VitreousError(f"{parts} is of another file or other pictures: remove it, or give another --out")
        parts.mkdir(exist_ok=True)
        write_whole(parts / "key", key)
        prepare, schema = _prepare(runtime), _schema(arrow, runtime, multi_label)
        groups = _chunks(names, PART)
        places = [parts / f"{i:06d}.parquet" for i in range(len(groups))]
        resumed = done = sum(len(group) for group, place in zip(groups, places, strict=True) if place.exists())
        progress(done, len(names))
        with ThreadPoolExecutor(max(2, runtime.threads)) as pool:
            for group, place in zip(groups, places, strict=True):
                if place.exists():
                    continue
                rows: list[dict[str, Any]] = []
                for some in _ahead(pool, lambda name: _read(folder / name, prepare), group, batch):
                    rows += _rows(runtime, some, batch, multi_label)
                    progress(done + len(rows), len(names))
                held = arrow.BufferOutputStream()
                parquet.write_table(arrow.Table.from_pylist(rows, schema), held)
                write_whole(place, held.getvalue().to_pybytes())
                done += len(group)
        skipped: list[tuple[str, str]] = []
        whole = parts / "whole.parquet"
        with parquet.ParquetWriter(whole, schema) as writer:
            for place in places:
                table = parquet.read_table(place)
                writer.write_table(table)
                skipped += [(p, e) for p, e in zip(*(table[c].to_pylist() for c in ("path", "error")), strict=True) if e]
        os.replace(whole, out)
        shutil.rmtree(parts, ignore_errors=True)
    except OSError as error:
        raise VitreousError(f"cannot write {out}: {error.strerror or error}") from error
    return Answered(out, len(names), resumed, skipped)


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _ahead(pool: ThreadPoolExecutor, read: Callable[[str], Any], names: list[str], batch: int) -> Iterator[list[Any]]:
    """Batches of `(name, read(name))`, of which the next is read while one is answered."""
    waiting: list[tuple[list[str], Any]] = []
    for some in _chunks(names, batch):
        waiting.append((some, [pool.submit(read, name) for name in some]))
        if len(waiting) > 1:
            ready, futures = waiting.pop(0)
            yield list(zip(ready, (f.result() for f in futures), strict=True))
    for ready, futures in waiting:
        yield list(zip(ready, (f.result() for f in futures), strict=True))


def _prepare(runtime: Runtime) -> Callable[[Image.Image], Tensor]:
    told = runtime.card.get("preprocess")
    if runtime.pictures:
        grey = runtime.shape[3] == 1
        return lambda image: torch.from_numpy(np.array(image.convert("L" if grey else "RGB"))).reshape(*image.size[::-1], -1)
    if told is None:
        raise VitreousError(f"{runtime.path.name} does not say how its pictures are prepared: ship it from a model that does")
    prepared = preparation(SimpleNamespace(pretrained_cfg=told))
    return lambda image: prepared.to_tensor(image.convert(prepared.mode))


def _read(path: Path, prepare: Callable[[Image.Image], Tensor]) -> Tensor | str:
    try:
        return prepare(read_picture(path))
    except Unreadable as reason:
        return str(reason)


def _rows(runtime: Runtime, some: list[tuple[str, Tensor | str]], batch: int, multi_label: bool) -> list[dict[str, Any]]:
    rows = {name: {"path": _text(name), "error": got if isinstance(got, str) else None} for name, got in some}
    good = [(name, got) for name, got in some if isinstance(got, Tensor)]
    for _, same in groupby(good, key=lambda item: item[1].shape):  # pictures that the file prepares have sizes of their own
        for few in _chunks(list(same), runtime.shape[0] or batch):
            x = torch.stack([got for _, got in few])
            short = (runtime.shape[0] or 0) - len(x)
            out = runtime(torch.cat([x, x[-1:].expand(short, *x.shape[1:])]) if short > 0 else x)
            found = {runtime.outputs[0]: out} if isinstance(out, Tensor) else out
            for i, (name, _) in enumerate(few):
                rows[name] |= {output: t[i].flatten().tolist() for output, t in found.items()}
                if "logits" in found:
                    rows[name] |= _answer(found["logits"][i], runtime.card.get("classes"), multi_label)
    return list(rows.values())


def _text(name: str) -> str:
    """A path as text, whatever bytes are in it."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _answer(logits: Tensor, classes: list[str] | None, multi_label: bool) -> dict[str, Any]:
    if logits.ndim != 1:
        return {}
    called = lambda k: classes[k] if classes and k < len(classes) else None
    if multi_label:
        p = logits.sigmoid()
        yes = (p > 0.5).nonzero()[:, 0].tolist()
        return {"answer": yes, "confidence": p[yes].tolist(), "name": [called(k) for k in yes]}
    if len(logits) == 1:  # one logit says yes or no
        p = logits.sigmoid().item()
        best, confidence = int(p > 0.5), max(p, 1 - p)
    else:
        best, confidence = int(logits.argmax()), logits.softmax(0).max().item()
    return {"answer": best, "confidence": confidence, "name": called(best)}


def _schema(arrow: Any, runtime: Runtime, multi_label: bool) -> Any:
    kind = arrow.list_ if multi_label else lambda of: of
    told = (
        [("answer", kind(arrow.int32())), ("name", kind(arrow.string())), ("confidence", kind(arrow.float32()))]
        if "logits" in runtime.outputs
        else []
    )
    outputs = [(name, arrow.list_(arrow.float32())) for name in runtime.outputs]
    return arrow.schema([("path", arrow.string()), *told, *outputs, ("error", arrow.string())])
