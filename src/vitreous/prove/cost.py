"""What a model costs whatever machine it runs on: parameters, multiply-accumulates, bytes, memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..macs import CountMacs, Uncounted
from ..steps import history_of
from .subject import Model, caller


@dataclass(frozen=True)
class Cost:
    """Costs of one model; None where they cannot be known (a shipped file that does not say)."""

    parameters: int | None
    macs: int | None
    """Multiply-accumulates for one image, counted from the operators that ran."""
    bytes: int | None
    """Size on disk: the bytes of all tensors of the state dict, or what a shipped file says of itself."""
    memory: int | None
    """Bytes needed to run the largest timed batch: weights, input, and the most activations alive at once."""
    uncounted: str | None = None
    """Why a module's MACs are not known: the operator that nothing is known of."""


def cost(name: str, model: Model, images: Tensor) -> Cost:
    """The costs of `model`: MACs on the first of `images` `[B, C, H, W]`, memory on all of them.

    A callable that is no `nn.Module` may carry `.parameters_count`, `.macs` and `.bytes`.
    """
    count = getattr(model, "parameters_count", None)
    if not isinstance(model, nn.Module):
        return Cost(count, getattr(model, "macs", None), getattr(model, "bytes", None), None)
    weights = {(t.data_ptr(), t.nbytes): t.nbytes for t in model.state_dict().values() if isinstance(t, Tensor)}
    try:
        counted, uncounted = macs(model, images[:1], name), None
    except Uncounted as reason:
        counted, uncounted = None, str(reason)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()) if count is None else count,
        macs=counted,
        bytes=sum(weights.values()),
        memory=sum(weights.values()) + images.nbytes + activation_peak(model, images, name),
        uncounted=uncounted,
    )


def coverage(model: Model) -> str | None:
    """How much of the multiplications is in few bits and what was left, as the steps that made `model` found; or None."""
    told = [plan["covers"] for _, plan in history_of(model).done if plan.get("covers")] if isinstance(model, nn.Module) else []
    return "; ".join(told) or None


def macs(model: nn.Module, x: Tensor, name: str = "model") -> int:
    """Multiply-accumulates of one forward of `model` on `x`, as `vitreous.macs.CountMacs` counts what really ran."""
    # Compiled code hides its operators, and flex_attention outside of a compiled function compiles itself.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), CountMacs() as count:
        caller(name, model)(x)
    return count.total


def activation_peak(model: nn.Module, x: Tensor, name: str = "model") -> int:
    """The most bytes of tensors made by one forward of `model` on `x` that were alive at the same time.

    It follows torch's operators, so workspaces inside a kernel are not seen.
    """
    with torch.no_grad(), _Alive([x, *model.parameters(), *model.buffers()]) as alive:
        caller(name, model)(x)
    return alive.most


class _Alive(TorchDispatchMode):
    """Adds up the storages of every operator's results until they are freed."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.storages = {t.untyped_storage()._cdata for t in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.storages:
                storage = t.untyped_storage()
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size
