"""Weights that several places of a model share, given to each of them."""

from __future__ import annotations

import copy

from torch import nn


def untie(model: nn.Module) -> list[str]:
    """Give each place in `model` parameters of its own, in place; names of those that had another's, in the model's order.

    A step that moves a factor from one layer into the next, or removes rows, may do so where both are this place's alone. Shared
    are modules held under several names, and parameters in several modules. Modules without parameters, and a module that the
    forward calls again and again under one name, stay as they are. (Parameters of one storage have their own in a deep copy.)
    """
    modules: set[int] = set()
    parameters: set[int] = set()
    names: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        modules.add(id(module))
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) in parameters:
                p = module._parameters[name] = nn.Parameter(p.detach().clone(), p.requires_grad)
                names.append(prefix + name)
            parameters.add(id(p))
        for name, child in module._modules.items():
            if child is None or next(child.parameters(), None) is None:
                continue
            if id(child) in modules:
                child = module._modules[name] = copy.deepcopy(child)
                names.append(prefix + name)
            visit(child, f"{prefix}{name}.")

    visit(model, "")
    return names
