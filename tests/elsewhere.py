"""A device that is not there: tensors of the processor that say "cuda", and refuse to be mixed with others as a GPU's do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
# a GPU takes these from the processor: what is copied, and places to index by
TAKES = (aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)


class There(Tensor):
    """Holds `inside`, a tensor of the processor."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> There:
        make: Any = Tensor._make_wrapper_subclass
        made = make(cls, inside.shape, strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype)
        made.inside = inside
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return CUDA

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        here = [t for t in flat if not isinstance(t, There) and t.ndim]
        if here and not (func in TAKES and (func not in TAKES[2:] or isinstance(args[0], There))):
            raise RuntimeError(f"{func}: tensors lie on cuda:0 and on cpu {[tuple(t.shape) for t in here]}")
        out = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if func._schema.name.endswith("_") and args and isinstance(args[0], There):
            return args[0]
        return tree_map(lambda t: There(t) if isinstance(t, Tensor) else t, out)


def _inside(t: Any) -> Any:
    return t.inside if isinstance(t, There) else t


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return There(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _inside(grads[0])


def sent(x: Tensor) -> Tensor:
    return x if isinstance(x, There) else _Sent.apply(x) if x.requires_grad and torch.is_grad_enabled() else There(x.detach())


class _Brought(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _inside(x).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return There(grads[0])


class Device(TorchFunctionMode):
    """While open, `.to("cuda")`, `device="cuda"` and the like give such tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled():  # which tensors that hold others do not know
            with torch.inference_mode(False), torch.no_grad(), self:
                return func(*args, **kwargs)
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if func is Tensor.to and x is not None:
            return self.moved(x, args[1:], kwargs)
        if func is Tensor.cuda and x is not None:
            return sent(x)
        if func is Tensor.cpu and x is not None:
            return _Brought.apply(x) if isinstance(x, There) else x
        if func in (Tensor.tolist, Tensor.__repr__) and isinstance(x, There):
            return func(x.inside)
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(x, There):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        device = kwargs.pop("device", None)
        there = device is not None and torch.device(device).type == "cuda"
        if device is not None and not there:
            kwargs["device"] = device
        there = there or (func in (Tensor.new_tensor,) and isinstance(x, There) and device is None)
        if func is Tensor.new_tensor and isinstance(x, There):
            args = (x.inside, *args[1:])
        out = func(*args, **kwargs)
        return sent(out) if there and isinstance(out, Tensor) else out

    def moved(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        wanted, rest = kwargs.pop("device", None), []
        for a in args:
            if isinstance(a, Tensor):
                wanted = a.device
                rest.append(a.dtype)
            elif isinstance(a, (str, torch.device)):
                wanted = a
            elif isinstance(a, torch.dtype):
                rest.append(a)
        kwargs = {k: v for k, v in kwargs.items() if k == "dtype"}
        x = x.to(*rest, **kwargs) if rest or kwargs else x
        if wanted is None:
            return x
        if torch.device(wanted).type == "cuda":
            return sent(x)
        return _Brought.apply(x) if isinstance(x, There) else x


@contextmanager
def another_device() -> Iterator[None]:
    future: Any = torch.__future__
    was = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)  # a module's parameters are made anew, not given new data
    try:
        with Device():
            yield
    finally:
        future.set_overwrite_module_params_on_conversion(was)
