"""Models whose parameters are not drawn, for those who overwrite them all, or look at shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

# Of `torch.nn.init`, of tensors, and what a cut normal distribution is made of. What asks for none of these is computed.
DRAWING = ("kaiming_uniform_", "uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")


class Undrawn(TorchFunctionMode):
    """While it is active, a new `nn.Parameter` keeps what its memory held: drawing one takes longer than all else of a model."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = args[0] if args else kwargs.get("tensor")
        if isinstance(given, nn.Parameter) and getattr(func, "__name__", "") in DRAWING:
            return given
        return func(*args, **kwargs)
