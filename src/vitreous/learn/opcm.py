"""OPCM: merge models as they arrive, each projected off what the merged ones already use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import VitreousError
from .merging import Kitchen, MergingRule, State, rule


@rule
@dataclass(frozen=True)
class OPCM(MergingRule):
    """Tang et al., "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable
    Continual Model Merging" (2025).

    With τ = θ − θ₀: the next task's τ of each linear layer is written in the singular bases of the merged one's; the block of the
    leading directions (their singular values sum to the share `alpha`) is removed, and with `zero_diagonal` the diagonal (eq. 8;
    the paper's own code leaves it, by a copy). All else is added as it is. Then the whole is scaled so that ‖merged − θ₀‖ is the
    mean norm of the tasks so far (section 4.2). Models are merged in the order given. `alpha=1` projects nothing.
    `skip_roots` is the released code's slip: parameters of modules that have children (class token, positions) get no later task.
    """

    needs_base: ClassVar[bool] = True
    alpha: float = 0.5
    zero_diagonal: bool = True
    skip_roots: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise VitreousError(f"OPCM: alpha must lie in [0, 1], not {self.alpha}")

    def __call__(self, states: Sequence[State], kitchen: Kitchen) -> State:
        start = kitchen.base
        assert start is not None
        task = lambda state: {k: state[k] - start[k] for k in start}
        total, scale = task(states[0]), 1.0
        norms = [_norm(total)]
        for state in states[1:]:
            new = task(state)
            norms.append(_norm(new))
            for k, t in new.items():
                if self.skip_roots and k in kitchen.roots:
                    continue
                if k in kitchen.linear:
                    t = self._project(total[k], t)
                total[k] = scale * total[k] + t
            mean, now = sum(norms) / len(norms), _norm(total)
            scale = now / mean
            total = {k: t * (mean / now) for k, t in total.items()}
        kitchen.say(f"norm of what was merged {_norm(total):.3g}, of the tasks {', '.join(f'{n:.3g}' for n in norms)}")
        return {k: start[k] + total[k] for k in start}

    def _project(self, merged: Tensor, new: Tensor) -> Tensor:
        """`new [out, in]` without what lies in both leading bases of `merged`: thin factors are enough."""
        wide = torch.promote_types(new.dtype, torch.float32)
        u, s, vh = torch.linalg.svd(merged.to(wide), full_matrices=False)
        share = s.cumsum(0) / s.sum().clamp_min(torch.finfo(wide).tiny)
        r = int((share > self.alpha).float().argmax()) if bool((share > self.alpha).any()) else 0
        t = new.to(wide)
        inside = u.mT @ t @ vh.mT  # [k, k]
        away = torch.zeros_like(inside)
        away[:r, :r] = inside[:r, :r]
        if self.zero_diagonal:
            away[range(r, len(s)), range(r, len(s))] = inside.diagonal()[r:]
        return (t - u @ away @ vh).to(new.dtype)


def _norm(state: State) -> float:
    return float(torch.stack([t.double().norm() for t in state.values()]).norm())
