"""A model as what is exported: float32 images in, its tensors out in a fixed order, each under the name of what it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..outputs import answer, embeds, tensors


class Named(nn.Module):
    """`model` as a function from images `[B, C, H, W]` to a tuple of tensors `[B, …]`, called `names` in that order.

    Half precision becomes float32 in a copy, weight for weight; compiled modules and replicas give way to what is inside.
    The answer is called `logits` or `features`; of dictionaries and objects every tensor keeps its own name.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.model = plain(model)
        self.called = type(self.model).__name__
        try:
            with torch.no_grad():
                out = self.model(images[:2])
        except Exception as error:  # of whatever kind: it is the model's own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise VitreousError(f"{self.called} fails on images of shape {list(images[:2].shape)}: {reason}") from error
        found, told = tensors(out), answer(out)
        self.keys = list(found)
        classes = not embeds(self.model, images[:1])
        self.answering = next(i for i, t in enumerate(found.values()) if t is told)
        self.classes = int(told.shape[1]) if classes and told.ndim == 2 else 0
        kind = "logits" if classes else "features"
        self.names = [kind if i == self.answering and _unnamed(k) else _name(k) for i, k in enumerate(self.keys)]
        for name, t in zip(self.names, found.values(), strict=True):
            if t.ndim == 0 or len(t) != min(len(images), 2):
                raise VitreousError(
                    f"{type(model).__name__} returns '{name}' of shape {list(t.shape)}, which has no row for each image: "
                    "wrap it in a module that leaves it out"
                )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = tensors(self.model(images))
        return tuple(found[k].float() if found[k].is_floating_point() else found[k] for k in self.keys)


def _unnamed(key: str) -> bool:
    return key == "output" or key.isdigit()


def _name(key: str) -> str:
    return f"output_{key}" if key.isdigit() else key.replace(".", "_")


def plain(model: nn.Module) -> nn.Module:
    """`model` without replicas, compiled modules, half precision and inference tensors, in a copy where it has any."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    memo: dict[int, Any] = {}
    compiled = [m for m in model.modules() if isinstance(m, torch._dynamo.OptimizedModule)]
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for i, t in held.items():
        if t.is_inference():  # which torch refuses to copy with its gradient, and to trace
            memo[i] = nn.Parameter(t.clone(), requires_grad=False) if isinstance(t, nn.Parameter) else t.clone()
    half = any(t.dtype in (torch.float16, torch.bfloat16) for t in held.values())
    if not compiled and not half and not memo and not any(m._compiled_call_impl for m in model.modules()):
        return model
    for m in compiled:
        memo[id(m)] = copy.deepcopy(m._orig_mod, memo)
    return copy.deepcopy(model, memo).float()
