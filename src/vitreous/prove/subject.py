"""What prove calls a model: an `nn.Module`, or any callable that takes images `[B, C, H, W]`; and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..outputs import answer, tensors

Model = nn.Module | Callable[[Tensor], Any]


class Outputs(NamedTuple):
    """`answer` `[B, …]`, and all other tensors of a batch's first axis by name; float32 on the CPU, or on meta."""

    answer: Tensor
    others: dict[str, Tensor]


def named(models: Mapping[str, Model] | Sequence[Model] | nn.Module) -> dict[str, Model]:
    """Models by name, the reference first. Raises `VitreousError` for what is no model."""
    if isinstance(models, Mapping):
        found = {str(name): model for name, model in models.items()}
    elif callable(models):
        found = {"model": models}
    elif isinstance(models, Sequence) and not isinstance(models, str):
        found = {f"{i + 1}. {type(m).__name__}": m for i, m in enumerate(models)}
    else:
        raise VitreousError(f"models is {type(models).__name__}: give a mapping from names to models, the reference first")
    if not found:
        raise VitreousError("there is nothing to prove: give at least one model, the reference first")
    for name, model in found.items():
        if not callable(model):
            raise VitreousError(f"model {name!r} is {type(model).__name__}, which cannot be called: open it first (vt.open)")
    return found


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


def caller(name: str, model: Model) -> Callable[[Tensor], Outputs]:
    """`model` as a function from images to `Outputs`; images go to its device and, for a module, its floating type.

    Bringing the answer home waits for a GPU to finish, so that timing the function times the model.
    Raises `VitreousError` naming the model when it fails or gives nothing of the kind.
    """
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    first = next((p for p in parameters if p.is_floating_point()), None)

    def call(x: Tensor) -> Outputs:
        try:
            out = model(x if first is None else x.to(first.device, first.dtype))
        except VitreousError:
            raise
        except Exception as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise VitreousError(f"model {name!r} fails on images of shape {list(x.shape)}: {said}") from error
        found = {n: t for n, t in tensors(out).items() if t.ndim and len(t) == len(x) and not t.is_complex()}
        if not found or not any(t is answer(out) for t in found.values()):
            got = ", ".join(f"{n} {list(t.shape)}" for n, t in tensors(out).items()) or type(out).__name__
            raise VitreousError(
                f"model {name!r} gives {got} for images of shape {list(x.shape)}; prove needs a tensor [B, …] with one answer "
                "for each image: wrap the model in a function that returns it"
            )
        answered = answer(out)
        return Outputs(_home(answered), {n: _home(t) for n, t in found.items() if t is not answered})

    return call


def _home(t: Tensor) -> Tensor:
    t = t.detach().float()
    return t if t.is_meta else t.cpu()


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
