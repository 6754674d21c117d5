"""Blocks that are no modules of their own: pairs of attention and MLP which their owner joins with residuals (vit-pytorch)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .parts import run
from .roles import NotPlain


class Chain(nn.Module):
    """Blocks one after another, and the norm behind them, under the names of the module that it stands for."""

    def __init__(self, owner: nn.Module, layers: str, after: str) -> None:
        super().__init__()
        for name, child in owner.named_children():
            self.add_module(name, child)
        self.layers_name, self.after = layers, after

    def forward(self, x: Any) -> Tensor:
        for block in cast(nn.ModuleList, self.get_submodule(self.layers_name)):
            x = run(block, x, {}) if isinstance(block, nn.ModuleList) else block(x)
        return self.get_submodule(self.after)(x) if self.after else x


def chain(owner: nn.Module, layers: str, width: int) -> Chain:
    """What `owner`, whose list `layers` holds pairs of attention and MLP, computes; proven by running.

    Raises `NotPlain` when it does something else with them.
    """
    x = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0)).to(next(owner.parameters()))
    training = [m for m in owner.modules() if m.training]
    owner.eval()
    try:
        with torch.no_grad():
            out = owner(x)
            for after in ("", *(n for n, _ in owner.named_children() if n != layers)):
                made = Chain(owner, layers, after)
                if torch.allclose(made(x), out, rtol=1e-3, atol=1e-4):
                    return made
    except Exception as error:  # whatever a stranger's module does
        raise NotPlain(f"the module that joins its attention and MLP does not run alone ({type(error).__name__})") from error
    finally:
        for m in training:
            m.training = True
    raise NotPlain("the module that holds its attention and MLP joins them otherwise than with residuals")
