"""What was set to zero stays zero while the rest learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from .objective import Batch, Now, Objective, Seen, objective


class Masks(nn.Module):
    """Which entries of a model's weights are not zero, of bool; held beside the model, so that a stopped run goes on by them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        held = [(n, p.detach() != 0) for n, p in model.named_parameters() if n.endswith("weight")]
        self.names = [n for n, mask in held if not mask.all()]
        for i, mask in enumerate(mask for _, mask in held if not mask.all()):
            self.register_buffer(str(i), mask)

    @torch.no_grad()
    def hold(self, model: nn.Module) -> None:
        """Set to zero in `model` what was."""
        for i, name in enumerate(self.names):
            model.get_parameter(name).mul_(self.get_buffer(str(i)))


@objective
@dataclass(frozen=True)
class KeepZeros(Objective):
    """After each step of the optimiser the weights that were zero at the beginning are zero again, as published for every
    masking step (`prune.TwoFour`, `LPViT`). No loss of its own: add one. `vt.heal` adds this by itself."""

    wants = ()

    def parts(self, model: nn.Module) -> nn.Module:
        masks = Masks(model)
        if not masks.names:
            raise VitreousError("KeepZeros: no weight of this model is zero: apply prune.TwoFour, LPViT or SparseThenPrune first")
        return masks

    def after_step(self, now: Now) -> None:
        assert isinstance(now.parts, Masks)
        now.parts.hold(now.model)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        return {}
