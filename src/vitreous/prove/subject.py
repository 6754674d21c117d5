"""What prove calls a model: an `nn.Module`, or any callable that takes images `[B, C, H, W]` and returns `[B, K]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import VitreousError

Model = nn.Module | Callable[[Tensor], Tensor]


def simulated(model: Model) -> str | None:
    """Why `model`'s speed means nothing, or None when what it computes is what would be deployed.

    A model says so by an attribute `vitreous_simulated` or `simulated` (the reason, or True), on itself or on any
    module inside it: wrapping a simulation must not turn it into something with a speed.
    """
    for part in model.modules() if isinstance(model, nn.Module) else (model,):
        for name in ("vitreous_simulated", "simulated"):
            reason = getattr(part, name, None)
            if isinstance(reason, str | bool) and reason:
                return reason if isinstance(reason, str) else "simulated"
    return None


def caller(name: str, model: Model) -> Callable[[Tensor], Tensor]:
    """`model` as a function from images to outputs `[B, K]` float32, both on the CPU, or both on meta.

    Bringing the answer home waits for a GPU to finish, so that timing the function times the model.
    Raises `VitreousError` naming the model when it fails or gives something else.
    """
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = first.device if first is not None else torch.device("cpu")

    def call(x: Tensor) -> Tensor:
        try:
            out = model(x.to(device))
        except VitreousError:
            raise
        except Exception as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise VitreousError(f"model {name!r} fails on images of shape {list(x.shape)}: {said}") from error
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x):
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise VitreousError(
                f"model {name!r} gives {got} for images of shape {list(x.shape)}; prove needs one tensor [B, K] "
                "of logits or features: wrap the model in a function that returns it"
            )
        out = out.detach().float()
        return out if out.is_meta else out.cpu()

    return call


@contextmanager
def at_rest(models: Mapping[str, Model], threads: int | None) -> Iterator[int]:
    """Every module in evaluation mode and torch on `threads` threads (None: as it is); all put back afterwards."""
    before = torch.get_num_threads()
    modules = [m for model in models.values() if isinstance(model, nn.Module) for m in model.modules()]
    modes = [m.training for m in modules]
    try:
        for m in modules:
            m.training = False
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
        for m, training in zip(modules, modes, strict=True):
            m.training = training
