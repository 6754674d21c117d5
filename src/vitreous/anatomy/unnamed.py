"""Attention whose class is not called so: what makes a map of all tokens by all is found by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .parts import resting, run

TOKENS = 5


class _Maps(TorchFunctionMode):
    """Whether a softmax over a map of `TOKENS` by `TOKENS` was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen |= args[0].shape[-2] == args[1].shape[-2] == TOKENS
        elif func in (F.softmax, torch.softmax, Tensor.softmax):
            self.seen |= args[0].ndim > 2 and args[0].shape[-2:] == (TOKENS, TOKENS)
        return func(*args, **kwargs or {})


def unnamed(model: nn.Module) -> list[str]:
    """Dotted names of the innermost modules with linear layers of their own that attend, tried once for each class and size."""
    tried: dict[Any, bool] = {}
    found: list[str] = []
    for name, module in reversed(list(model.named_modules())):  # what a module holds comes before it
        if not name or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            continue
        layers = [m for m in module.children() if isinstance(m, nn.Linear)]
        # A layer that is watched notes what it is given.
        odd = (m for m in module.modules() if isinstance(m, nn.Conv2d) or hasattr(m, "watcher"))
        if not layers or next(odd, None) is not None or any(n.startswith(f"{name}.") for n in found):
            continue
        kind = type(module), tuple(p.shape for p in module.parameters())
        if kind not in tried:
            tried[kind] = _attends(module, layers[0])
        if tried[kind]:
            found.append(name)
    return found[::-1]


def _attends(module: nn.Module, layer: nn.Linear) -> bool:
    x = torch.randn(1, TOKENS, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight)
    with resting(module), torch.no_grad(), _Maps() as maps:
        try:
            out = run(module, x, {})
        except Exception:  # a stranger's module may fail in any way on a plain sequence: then it is none that we know
            return False
    return maps.seen and isinstance(out, Tensor) and out.ndim == 3 and out.shape[1] == TOKENS
