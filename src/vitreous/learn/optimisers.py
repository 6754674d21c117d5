"""Optimisers by name, with the groups of parameters that vision transformers are trained in.

All but SGD-SaI are timm's; SAM goes round any of them (`sam.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from ..errors import VitreousError
from .sgd_sai import SGDSaIOptimizer


@dataclass(frozen=True)
class Optimiser:
    """`lr` is the peak of the schedule; `weight_decay` leaves biases and norms alone; `layer_decay` multiplies the rate once a
    block counted from the head (Bao et al., "BEiT", ICLR 2022), where timm knows the model's layers."""

    timm: ClassVar[str] = ""
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.weight_decay < 0:
            raise VitreousError(f"{type(self).__name__}: lr must be above 0 and weight_decay at least 0, not {self}")

    def options(self) -> dict[str, Any]:
        return {}

    def make(self, model: nn.Module, parts: nn.Module) -> torch.optim.Optimizer:
        """For the trainable parameters of `model`, and of `parts` without layer decay. Raises `VitreousError` where none are."""
        if self.layer_decay is None:
            groups: list[dict[str, Any]] = param_groups_weight_decay(model, self.weight_decay)
        else:
            whole: Any = getattr(model, "no_weight_decay", set)()  # positions and the class token, as the model says
            groups = param_groups_layer_decay(model, self.weight_decay, whole, layer_decay=self.layer_decay)
            # The final norm goes with the head, as in the papers' code; timm puts it with the last block.
            last = {id(p) for n, p in model.named_parameters() if n.split(".")[0] in ("norm", "fc_norm")}
            for group in list(groups):
                norms = [p for p in group["params"] if id(p) in last]
                if norms:
                    group["params"] = [p for p in group["params"] if id(p) not in last]
                    groups.append({**group, "params": norms, "lr_scale": 1.0})
        groups = [g for g in groups + param_groups_weight_decay(parts, self.weight_decay) if g["params"]]
        if not groups:
            raise VitreousError("nothing to train: no parameter of the model requires a gradient; set requires_grad on some")
        return self._make(groups)

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return create_optimizer_v2(groups, opt=self.timm, lr=self.lr, weight_decay=0.0, **self.options())


@dataclass(frozen=True)
class AdamW(Optimiser):
    """Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019); torch's, through timm."""

    timm: ClassVar[str] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)

    def options(self) -> dict[str, Any]:
        return {"betas": self.betas}


@dataclass(frozen=True)
class SGD(Optimiser):
    """Stochastic gradient descent with Nesterov's momentum; torch's, through timm."""

    timm: ClassVar[str] = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9

    def options(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "nesterov": self.momentum > 0}


@dataclass(frozen=True)
class Lion(Optimiser):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms" (NeurIPS 2023), program 1; timm's, which is the paper's.

    Every weight moves by `lr` a step, so the paper takes it 3 to 10 times smaller than AdamW's and the decay as much larger.
    """

    timm: ClassVar[str] = "lion"
    lr: float = 1e-4
    weight_decay: float = 0.5
    betas: tuple[float, float] = (0.9, 0.99)

    def options(self) -> dict[str, Any]:
        return {"betas": self.betas}


@dataclass(frozen=True)
class SGDSaI(Optimiser):
    """Xu et al., "No More Adam: Learning Rate Scaling at Initialization is All You Need" (2024); see `sgd_sai.py`."""

    lr: float = 1e-2
    weight_decay: float = 0.01
    momentum: float = 0.9

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return SGDSaIOptimizer([{"lr": self.lr, **g} for g in groups], self.lr, self.momentum)
