"""SlimFit: layers that change little stand still, and the activations that cannot be dropped are kept in few bits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from .compressed import Compressed
from .objective import Batch, Now, Objective, Seen, objective


def active(scores: Tensor, frozen: float) -> Tensor:
    """Places, in order, of all but the ⌊frozen · n⌋ smallest `scores [n]`."""
    return scores.sort(stable=True).indices[int(frozen * len(scores)) :].sort().values


def change(before: Tensor, after: Tensor) -> Tensor:
    """d = the mean of |ΔW / W| over a tensor; elements that were zero, where that is not defined, do not count."""
    there = before != 0
    ratio = ((after - before) / torch.where(there, before, 1.0)).abs()
    return (ratio * there).sum() / there.sum().clamp_min(1)


class Dynamics(nn.Module):
    """The units that are frozen in turn, and the last change of each: beside the student, so that a stopped run goes on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        anatomy = read(model)
        if not anatomy.blocks:
            raise VitreousError(f"SlimFit freezes layers of transformer blocks, and {anatomy.kind} has none")
        inside = tuple(f"{b.name}." for b in anatomy.blocks)
        head = f"{anatomy.classifier}." if anatomy.classifier else "."
        learns = [(n, p) for n, p in model.named_parameters() if p.requires_grad and not n.startswith(head)]
        self.units = [n for n, p in learns if p.ndim > 1 or (n.startswith(inside) and n.endswith("weight"))]
        if len(self.units) < 2:
            raise VitreousError("SlimFit chooses among layers that learn, and there are fewer than two")
        self.narrow = []
        for block in anatomy.blocks:
            mlp = model.get_submodule(f"{block.name}.{block.mlp}") if block.mlp else nn.Identity()
            linear = [n for n, m in mlp.named_modules() if isinstance(m, nn.Linear)]
            self.narrow += [f"{block.name}.{block.mlp}.{linear[-1]}.weight"] if len(linear) > 1 else []
        # So large that each unit is active once before any is chosen by its change.
        self.register_buffer("scores", torch.rand(len(self.units)) * 1e7)
        self.before: dict[int, Tensor] = {}


@objective
@dataclass(frozen=True)
class SlimFit(Objective):
    """Ardakani et al., "SlimFit: Memory-Efficient Fine-Tuning of Transformer-based Models Using Training Dynamics" (2023).

    In each step the share `frozen` of the weight matrices, norms of blocks, patch embedding and tokens stands still: those whose
    last step changed them least, by the mean of |ΔW / W|. Biases and the head always learn. A frozen linear layer keeps no input.
    With `compress`, the activations that have to be kept all the same are: 4 bits of GELU's input; 8 bits of queries, keys,
    values, probabilities and of the input of an MLP's second layer; of frozen layer norms a tenth. Forward passes stay exact. No
    loss of its own: add one. Published: frozen 0.9 (CIFAR-10) to 0.95 (ImageNet), AdamW at 5e-5 to 7.5e-5, linear decay.

    The paper's integers have fixed steps, so what lies beyond ±8 (±4 at GELU) is cut; `scaled` gives each tensor a step of its
    own. What is frozen does not move at all; in the official code, of an older PyTorch, AdamW's momentum moved it on. Attention
    dropout falls on the values, as there. Not with `compiled`, which would compile anew in each step.
    """

    wants = ()
    frozen: float = 0.9
    compress: bool = True
    scaled: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.frozen < 1:
            raise VitreousError(f"SlimFit: frozen must lie in [0, 1), not {self.frozen}")

    def parts(self, model: nn.Module) -> nn.Module:
        return Dynamics(model)

    def around(self, now: Now) -> AbstractContextManager[Any]:
        if not self.compress:
            return nullcontext()
        narrow = cast(Dynamics, now.parts).narrow
        return Compressed({id(now.model.get_parameter(n)) for n in narrow}, self.scaled)

    def before_step(self, now: Now) -> None:
        parts = cast(Dynamics, now.parts)
        moving = set(active(cast(Tensor, parts.scores), self.frozen).tolist())
        for i, name in enumerate(parts.units):
            weight = now.model.get_parameter(name)
            weight.requires_grad_(i in moving)
            if i in moving:
                parts.before[i] = weight.detach().clone()

    @torch.no_grad()
    def after_step(self, now: Now) -> None:
        parts = cast(Dynamics, now.parts)
        for i, before in parts.before.items():
            cast(Tensor, parts.scores)[i] = change(before, now.model.get_parameter(parts.units[i]))
        parts.before.clear()
        for name in parts.units:
            now.model.get_parameter(name).requires_grad_(True)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        return {}
