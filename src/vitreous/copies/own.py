"""A model of one's own: the same weights, in modules that nobody else runs.

Whoever looks into a model needs it in evaluation mode, hooks its modules, and sometimes runs a part of it. On a copy of the
modules that shares the weights, what other threads compute with the model meanwhile stays what it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import CellType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import VitreousError

CHECKPOINTING = re.compile(r"checkpoint(ing)?$")


@contextmanager
def still(model: nn.Module) -> Iterator[nn.Module]:
    """`with still(model) as own:` the model in evaluation mode, to be hooked and run at will; the model itself is not touched.

    Weights are shared, those in half precision or made in inference mode are held in float32 where autograd takes them. Autocast
    is off meanwhile, activations are kept and not recomputed (no gradient checkpointing), compiled parts run as they are written,
    and parallel ones in one piece. A model that cannot be copied is used itself, and its modules' modes restored.
    """
    own = _copied(model)
    training = [m for m in own.modules() if m.training] if own is model else []
    own.eval()
    device = next((p.device.type for p in model.parameters()), "cpu")
    grad = torch.is_grad_enabled()
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.autocast(device, enabled=False):
            yield own
    finally:
        for m in training:
            m.training = True


def run(own: nn.Module, x: Tensor) -> Any:
    """What a model gives for images `x`, taken to the type of its weights; `VitreousError` when it does not run on them."""
    dtype = next((p.dtype for p in own.parameters() if p.is_floating_point()), x.dtype)
    try:
        return own(x.to(dtype))
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VitreousError(f"{type(own).__name__} does not run on images {list(x.shape)}: {reason}") from error


P = ParamSpec("P")
R = TypeVar("R")


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """The function with autocast off, so that what is summed in it keeps its digits."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return inner


class Through(nn.Module):
    """Calls the one module in it, under the name by which a wrapper holds it."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self._name = name
        self._modules[name] = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[self._name](*args, **kwargs)  # pyright: ignore[reportOptionalCall]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules[self.__dict__["_name"]], name)


def _copied(model: nn.Module) -> nn.Module:
    modules = list(model.modules())
    if any(_holds_a_module(v) for m in modules if not _compiled(m) for n, v in vars(m).items() if n != "_compiled_call_impl"):
        return model
    with torch.inference_mode(False), torch.no_grad():
        held = (t for m in modules for t in (*m._parameters.values(), *m._buffers.values(), *vars(m).values()))
        memo: dict[int, Any] = {id(t): _usable(t) for t in held if isinstance(t, Tensor)}
    try:
        for m in reversed(modules):  # what is inside first
            if isinstance(m, (nn.DataParallel, DistributedDataParallel)):
                memo[id(m)] = Through("module", copy.deepcopy(m.module, memo))
            elif _compiled(m):
                memo[id(m)] = Through("_orig_mod", copy.deepcopy(m.get_submodule("_orig_mod"), memo))
        own = copy.deepcopy(model, memo)
    except Exception:  # a stranger's module may refuse in any way
        return model
    for m in own.modules():
        m._compiled_call_impl = None
        for name, value in vars(m).items():
            if value is True and CHECKPOINTING.search(name):
                setattr(m, name, False)
    return own


def _compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def _holds_a_module(value: Any) -> bool:
    """Whether a function was set on a module that remembers one: its copy would run the modules of the original."""
    inside = [c.cell_contents for c in getattr(value, "__closure__", None) or () if c != CellType()]
    if isinstance(value, partial):
        inside += [value.func, *value.args, *value.keywords.values()]
    return any(isinstance(getattr(v, "__self__", v), nn.Module) for v in inside)


def _usable(t: Tensor) -> Tensor:
    """`t`, or where autograd or exact sums would suffer a tensor of the same values that serves."""
    if type(t) not in (Tensor, nn.Parameter):
        return t
    new = t.detach()
    if t.dtype in (torch.float16, torch.bfloat16):
        new = new.float()
    elif t.is_inference():
        new = new.clone()
    else:
        return t
    return nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new
