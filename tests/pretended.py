"""A GPU that is not there: tensors that say they lie on "cuda" and hold their numbers on the processor.

Whoever mixes them with tensors of the processor, asks them for numpy, or draws them by a generator of the processor is refused as
a GPU would refuse. So mistakes of place are found on any machine; kernels, precisions and speeds are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten: Any = torch.ops.aten
FAR, WITHIN = torch.device("cuda", 0), torch.device("meta")  # what is said to who asks, and to torch, which would ask a driver
MAY_MIX = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Far(Tensor):
    """A tensor on the GPU that is not there."""

    held: Tensor
    device = property(lambda self: FAR)
    is_cuda, is_cpu, is_meta = (property(lambda self, said=said: said) for said in (True, False, False))
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Far:
        make: Any = getattr(Tensor, "_make_wrapper_subclass")  # noqa: B009  torch's stubs do not tell of it
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        return make(cls, held.shape, **layout, device=WITHIN)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return there(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file of it opens on the processor
        return self.detach().held.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.held!r})"


def there(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, done on the processor, if a GPU would do it."""
    name = func._schema.name
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    far = any(isinstance(t, Far) for t in tensors)
    if far and any(t.device == WITHIN and not isinstance(t, Far) for t in tensors):
        raise RuntimeError(f"{name} of a tensor that torch made behind the pretence: its numbers are nowhere")
    wanted = kwargs.get("device")
    if far and any(not isinstance(t, Far) and t.ndim for t in tensors):
        first = next(t for t in tensors if t.ndim or isinstance(t, Far))
        if name not in MAY_MIX or (name != "aten::copy_" and not isinstance(first, Far)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {name}")
    if far and func is aten._fused_sdp_choice.default:
        return 0  # by plain products
    goes = far if wanted is None else torch.device(wanted).type in ("cuda", WITHIN.type)
    if (g := kwargs.get("generator")) is not None and goes and g.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{g.device.type}' in {name}")
    if name in ("aten::copy_", "aten::index_put_", "aten::_index_put_impl_"):
        goes = isinstance(args[0], Far)
    own = {id(t.held): t for t in tensors if isinstance(t, Far)}
    args, kwargs = tree_map(lambda t: t.held if isinstance(t, Far) else t, (args, kwargs))
    if wanted is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    out = func(*args, **kwargs)
    put = lambda t: own.get(id(t)) if id(t) in own else Far(t) if goes and isinstance(t, Tensor) else t
    return tree_map(put, out)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        made.said = FAR if torch.device(device).type == "cuda" else torch.device("cpu")
        return made

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__("said" if name == "device" else name)


class _Makes(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return there(func, args, kwargs or {})


class _Places(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tuple(map(_place, args)), {k: _place(v) for k, v in (kwargs or {}).items()}
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Far):  # torch makes tensors of what is none
            whole = lambda i: torch.tensor(list(i)) if isinstance(i, list | range) else i
            at, rest = args[1], args[2:]
            if rest and not isinstance(rest[0], Tensor):
                rest = (torch.tensor(rest[0], dtype=args[0].dtype).to(WITHIN),)
            args = (args[0], tuple(map(whole, at)) if isinstance(at, tuple) else whole(at), *rest)
        if func is Tensor.new_tensor and isinstance(args[0], Far):
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": WITHIN, **kwargs}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == WITHIN:  # no operations
            return func(*args, **kwargs | {"device": "cpu"}).to(WITHIN)
        return func(*args, **kwargs)


def _place(x: Any) -> Any:
    return WITHIN if isinstance(x, str | torch.device) and str(x).startswith("cuda") else x


def _enter(self: Any) -> None:
    self.before = torch.is_grad_enabled()
    torch.set_grad_enabled(self.before and not self.mode)


def _exit(self: Any, *_: Any) -> None:
    torch.set_grad_enabled(self.before)


_apply = nn.Module._apply


def _moved(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """What goes nowhere stays itself: an optimiser may hold it already."""
    with torch.no_grad():
        stays = all(fn(t) is t for t in itertools.chain(self.parameters(recurse), self.buffers(recurse)))
    return self if stays else _apply(self, fn, recurse)


@contextmanager
def pretended() -> Iterator[None]:
    """While it is open, "cuda" is a device."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    made = dict(_lazy_init=lambda: None, is_available=lambda: True, device_count=lambda: 1, synchronize=lambda *_: None)
    made |= dict(current_device=lambda: 0, set_device=lambda *_: None, manual_seed_all=lambda *_: None)
    made |= dict(get_device_capability=lambda *_: (8, 0), get_device_name=lambda *_: "no GPU", empty_cache=lambda: None)
    asked = {f"_{which}_graph_capture_health_check": lambda self: None for which in ("accelerator", "cuda")}
    try:
        with (
            patch.multiple(torch.optim.Optimizer, create=True, **asked),
            patch.multiple(torch.inference_mode, __enter__=_enter, __exit__=_exit),  # a view of ours has no place in it
            patch.multiple(torch.cuda, **made),
            patch.object(torch, "Generator", _Generator),
            patch.object(nn.Module, "_apply", _moved),
            torch.autograd.set_multithreading_enabled(False),
            _Places(),
            _Makes(),
        ):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
