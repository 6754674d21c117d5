"""A copy of a model that a step can work on: without what compiles or spreads it, and in float32 while grids are fitted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo import OptimizedModule

OTHER = (torch.float16, torch.bfloat16, torch.float64)


def bare(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode, without `torch.compile`, `DataParallel` and DDP, as a step changes what they had compiled."""
    new = copy.deepcopy(_inner(model)).eval()
    for parent in list(new.modules()):
        for name, child in parent.named_children():
            if _inner(child) is not child:
                setattr(parent, name, _inner(child))
    return new


def _inner(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Weights in half or double precision are float32 inside, and again what they were after, as are biases new to their layers.

    What is new and no parameter, as the scales of a grid, stays float32. No autocast of a caller's reaches inside.
    """
    held = {n: t.dtype for n, t in model.state_dict().items() if t.dtype in OTHER}
    if held:
        model.float()
    with torch.autocast(next((p.device.type for p in model.parameters()), "cpu"), enabled=False), torch.inference_mode(False):
        yield
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        like = held.get(f"{prefix}weight")
        for key, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            dtype = held.get(prefix + key) or (like if key == "bias" else None)
            if dtype is not None and t.dtype == torch.float32:
                t.data = t.data.to(dtype)
