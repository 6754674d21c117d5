"""Images and labels in whatever form people hold them, as checked batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ..errors import VitreousError

if TYPE_CHECKING:
    from ..data import Data

BATCH = 64
IMAGES = ("pixel_values", "images", "image", "x")  # of batches that are mappings
LABELS = ("labels", "label", "targets", "target", "y")


def batches(data: Any) -> Iterator[tuple[Tensor, np.ndarray | None]]:
    """Batches `(x [B, C, H, W] float, y)`; `y` is None, class numbers `[B]` int64, or marks `[B, K]` of 0 and 1.

    `data`: a `vitreous.data.Data`; images alone; a pair of images and labels; or an iterable of pairs or of mappings.
    Raises `VitreousError` that names the batch for images or labels of another form.
    """
    first = 0
    for b, (x, y) in enumerate(_pairs(data)):
        x = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
            what = f"{list(x.shape)} {x.dtype}".replace("torch.", "") if isinstance(x, Tensor) else type(x).__name__
            raise VitreousError(f"batch {b} of the data: images must be one tensor [B, C, H, W] of floats, not {what}")
        yield x, None if y is None else _labels(y, len(x), b)
        first += len(x)


def count(data: Any) -> int:
    """How many images there are, or 0 where that is not known before."""
    if is_data(data):
        return len(data)
    return len(data[0]) if _is_pair(data) else len(data) if _is_images(data) else 0


def is_data(data: Any) -> TypeGuard[Data]:
    return hasattr(data, "batches")


def _is_images(data: Any) -> bool:
    return isinstance(data, Tensor | np.ndarray)


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and _is_images(data[0])


def _pairs(data: Any) -> Iterator[tuple[Any, Any]]:
    if is_data(data):
        yield from data.batches(BATCH)
    elif _is_pair(data) or _is_images(data):
        x, y = data if _is_pair(data) else (data, None)
        y = None if y is None else y if isinstance(y, Tensor) else np.asarray(y)
        if y is not None and len(y) != len(x):
            raise VitreousError(f"the data has {len(x)} images and {len(y)} labels: give one label for each image, or None")
        for i in range(0, len(x), BATCH):
            yield x[i : i + BATCH], None if y is None else y[i : i + BATCH]
    elif isinstance(data, Mapping | str) or not hasattr(data, "__iter__"):
        raise VitreousError(
            f"the data is {type(data).__name__}: give a vitreous.data set (open_data opens a folder), a pair (images, labels), "
            "or an iterable of such pairs"
        )
    else:
        for b, batch in enumerate(data):
            if isinstance(batch, Mapping):
                found = next((k for k in IMAGES if k in batch), None)
                if found is None:
                    raise VitreousError(f"batch {b} of the data has no images under {', '.join(IMAGES)}")
                yield batch[found], next((batch[k] for k in LABELS if k in batch), None)
            elif isinstance(batch, tuple | list) and len(batch) == 2:
                yield batch[0], batch[1]
            else:
                raise VitreousError(f"batch {b} of the data: give (images, labels), or (images, None) without labels")


def _labels(y: Any, images: int, batch: int) -> np.ndarray:
    try:
        found = y.detach().cpu().float().numpy() if isinstance(y, Tensor) and y.is_floating_point() else np.asarray(y)
    except (ValueError, TypeError):
        found = np.array("")
    if found.dtype.kind not in "biuf" or found.ndim not in (1, 2) or len(found) != images:
        raise VitreousError(
            f"batch {batch} of the data: labels must be one class number for each of its {images} images, or marks [B, K] of "
            "0 and 1; images without labels: give None"
        )
    if found.dtype.kind == "f" and not np.array_equal(found, found.round()):
        odd = found[found != found.round()].flat[0]
        raise VitreousError(
            f"batch {batch} of the data has the label {odd:g}: labels are whole class numbers; "
            "for a model that answers with a quantity, give None and its outputs are compared"
        )
    if found.shape[1:] == (1,):
        found = found[:, 0]
    if found.size and (found.min() < 0 or (found.ndim == 2 and found.max() > 1)):
        odd = found.min() if found.min() < 0 else found.max()
        where = "marks of several classes are 0 or 1" if found.ndim == 2 else "leave such images out, or number classes from 0"
        raise VitreousError(f"batch {batch} of the data has the label {odd:g}: {where}")
    return found.astype(np.int64)
