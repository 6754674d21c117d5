"""What a published network costs, from shapes alone and each shape computed once: torch's meta kernels are written in Python."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitreous.macs import CountMacs
from vitreous.models.undrawn import Undrawn

Known = tuple[torch.Size, tuple[int, ...], torch.dtype]
known: dict[Any, Known | list[Known]] = {}


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_described, value))
    return type(value), value


def _like(found: Known) -> Tensor:
    return torch.empty_strided(found[0], found[1], dtype=found[2], device="meta")


class ShapesOnce(TorchDispatchMode):
    """An operator that was given the same shapes before gives new tensors of the same shapes, unless it writes or gives views."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable or any(r.alias_info for r in schema.returns):
            return func(*args, **kwargs)
        key = func, *map(_described, args), *((k, _described(v)) for k, v in kwargs.items())
        if (found := known.get(key)) is None:
            out = func(*args, **kwargs)
            outs = [out] if isinstance(out, Tensor) else out
            if isinstance(outs, (list, tuple)) and all(isinstance(t, Tensor) and t.is_meta for t in outs):
                shapes = [(t.shape, t.stride(), t.dtype) for t in outs]
                known[key] = shapes[0] if isinstance(out, Tensor) else shapes
            return out
        return [_like(each) for each in found] if isinstance(found, list) else _like(found)


def on_paper(name: str, **kwargs: Any) -> nn.Module:
    """The model that timm knows as `name`, without values."""
    with torch.device("meta"), Undrawn():
        return timm.create_model(name, **kwargs).eval()


def macs(model: Any, x: Tensor | None = None) -> int:
    """Multiply-accumulates of a model without values on one image of its own size, or on `x`."""
    x = torch.zeros(1, *model.pretrained_cfg["input_size"], device="meta") if x is None else x
    with torch.no_grad(), ShapesOnce(), CountMacs() as counter:
        model(x)
    return counter.total
