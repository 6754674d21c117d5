"""Reliability balancing: predictions that are not sure are corrected by learned anchors of the classes, and by attention."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from ..steps import History, remember
from .objective import Batch, Now, Objective, Seen, objective

Over = Literal["anchors", "batch"]


def confidence(p: Tensor) -> Tensor:
    """1 − H(p) / log C of distributions `[B, C]`: `[B, 1]`, 0 for all alike and 1 for a single class."""
    return 1 + torch.xlogy(p, p).sum(1, keepdim=True) / math.log(p.shape[1])


class Balance(NamedTuple):
    """What `ReliabilityBalance` found: probabilities `[B, C]` of each part, confidences `[B, 1]`, distances `[B, C, K]`."""

    prob: Tensor
    confidence: Tensor
    distances: Tensor
    similarities: Tensor
    attention: Tensor
    correction: Tensor
    corrected: Tensor
    final: Tensor


class ReliabilityBalance(nn.Module):
    """Section 3.3 of ARBEx: from embeddings `[B, D]` and logits `[B, C]` to balanced probabilities.

    p = softmax(z / T) is mixed with a correction by its confidence, c p + (1 − c) correction. The correction is the mean of what
    K anchors of each class say (softmax of −distance / δ, summed by class) and of attention, each by its own confidence. Of this
    the share `trust`, which grows from 0 to 1 in training, becomes the answer.

    Attention: each embedding asks all C · K anchors, and what its heads find is summed by class (`over="anchors"`). In the
    released code the images of a batch attend to each other, so that a prediction depends on who is in the batch, and it then
    leaves attention out when it evaluates. `over="batch"` is that code, for comparison: do not predict with it.
    """

    trust: Tensor

    def __init__(
        self,
        width: int,
        classes: int,
        anchors: int = 10,
        heads: int = 1,
        over: Over = "anchors",
        temperature: float = 1.0,
        delta: float = 1.0,
    ) -> None:
        super().__init__()
        if width % heads and over == "anchors":
            raise VitreousError(f"ARBEx: {heads} heads do not divide a feature of {width} numbers")
        self.over, self.heads, self.temperature, self.delta = over, heads, temperature, delta
        self.anchors = nn.Parameter(torch.randn(classes, anchors, width))  # the release begins with zeros, which stay alike
        self.register_buffer("trust", torch.zeros(()))
        if over == "anchors":
            self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        else:
            self.Q, self.K, self.V = (nn.Linear(width, classes) for _ in range(3))
            self.attn_fn = nn.MultiheadAttention(classes, heads)

    def attend(self, e: Tensor) -> Tensor:
        """`[B, C]`, what attention says of embeddings `[B, D]`."""
        if self.over == "batch":
            return self.attn_fn(self.Q(e), self.K(e), self.V(e), need_weights=False)[0].softmax(1)
        classes, anchors, width = self.anchors.shape
        q = self.q(e).view(len(e), self.heads, -1)
        k = self.k(self.anchors).view(classes * anchors, self.heads, -1)
        weights = (torch.einsum("bhd,ahd->bha", q, k) / math.sqrt(width // self.heads)).softmax(2)
        return weights.mean(1).view(-1, classes, anchors).sum(2)

    def forward(self, e: Tensor, z: Tensor) -> Balance:
        p = (z / self.temperature).softmax(1)
        distances = torch.linalg.vector_norm(e[:, None, None] - self.anchors, dim=3)
        s = (-distances.flatten(1) / self.delta).softmax(1).view_as(distances).sum(2)
        a = self.attend(e)
        c, c_s, c_a = (confidence(x) for x in (p, s, a))
        correction = (c_s * s + c_a * a) / (c_s + c_a).clamp_min(1e-12)
        corrected = c * p + (1 - c) * correction
        final = (1 - self.trust) * p + self.trust * corrected
        return Balance(p, c, distances, s, a, correction, corrected, final)


def anchor_loss(anchors: Tensor) -> Tensor:
    """−Σ ‖A_c − A_c'‖² / (√D K²) over pairs of classes of anchors `[C, K, D]`: it pushes them apart, and has no lower bound."""
    _, k, width = anchors.shape
    flat = anchors.flatten(1)
    return -(flat[:, None] - flat).square().sum() / (math.sqrt(width) * k**2)


def centre_loss(distances: Tensor, labels: Tensor, sure: Tensor, width: int) -> Tensor:
    """Mean of c · min_k d / √D: each embedding is drawn to the nearest anchor of its class, by its confidence `[B, 1]`."""
    own = distances[torch.arange(len(labels), device=labels.device), labels]
    return (own.amin(1) * sure[:, 0]).mean() / math.sqrt(width)


class BalancedHead(nn.Module):
    """A classifier whose answer is the logarithm of the balanced probabilities, in training and in evaluation alike."""

    def __init__(self, classifier: nn.Module, balance: ReliabilityBalance) -> None:
        super().__init__()
        self.classifier, self.balance = classifier, balance

    def forward(self, e: Tensor) -> Tensor:
        return self.balance(e, self.classifier(e)).final.clamp_min(1e-12).log()


def _made(model: nn.Module, **given: Any) -> tuple[str, ReliabilityBalance]:
    name = read(model).classifier
    head = model.get_submodule(name) if name else None
    if name is None or not isinstance(head, nn.Linear):
        raise VitreousError(f"ARBEx balances what a linear classifier says of features, and {type(model).__name__} has none")
    if head.out_features < 2:
        raise VitreousError("ARBEx balances classes, and one logit says yes or no: give the model a head of two (--num-classes)")
    return name, ReliabilityBalance(head.in_features, head.out_features, **given)


def with_balance(model: nn.Module, anchors: int = 10, heads: int = 1, over: Over = "anchors") -> nn.Module:
    """A copy of `model` whose classifier balances what it says, then and ever after; train it with `ARBEx`. It is saved like any
    model, and loaded with `base=` such a copy. Raises `VitreousError` for a model without a linear classifier."""
    new = copy.deepcopy(model)
    name, balance = _made(new, anchors=anchors, heads=heads, over=over)
    holder, _, last = name.rpartition(".")
    setattr(new.get_submodule(holder), last, BalancedHead(new.get_submodule(name), balance).to(next(new.parameters())))
    read(new, classifier=f"{name}.classifier")
    return remember(new, History())


def _balanced(model: nn.Module) -> BalancedHead | None:
    return next((m for m in model.modules() if isinstance(m, BalancedHead)), None)


@objective
@dataclass(frozen=True)
class ARBEx(Objective):
    """Wasi et al., "ARBEx: Attentive Feature Extraction with Reliability Balancing for Robust Facial Expression Learning" (2023),
    its balancing; the face networks that it reads features with are not part of it.

    NLL of the balanced probabilities (weighted by `weights` of the classes) + t (λ_µ L_anchor + λ_c L_centre), t the share of the
    run. On a model `with_balance` the balance stays and answers; on any other it is trained beside the model and thrown away, as
    the released script evaluates by default. Labels are class numbers. Defaults of λ are ours: at the script's 1 the anchor loss,
    which has no lower bound, takes over. See `ReliabilityBalance` for where we leave the released code.
    """

    wants = ("logits", "pooled")
    anchors: int = 10
    heads: int = 1
    lambda_mu: float = 0.001
    lambda_center: float = 0.01
    weights: tuple[float, ...] | None = None

    def parts(self, model: nn.Module) -> nn.Module | None:
        return None if _balanced(model) else _made(model, anchors=self.anchors, heads=self.heads)[1]

    def _balance(self, now: Now) -> ReliabilityBalance:
        kept = _balanced(now.model)
        return kept.balance if kept else cast(ReliabilityBalance, now.parts)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        balance, head = self._balance(now), _balanced(now.model)
        balance.trust.fill_(now.share)
        assert seen.pooled is not None
        e = seen.pooled.float()
        # The head has answered with the logarithm of its balanced probabilities already; its logits are asked for once more.
        found: Balance = balance(e, (head.classifier(seen.pooled) if head else seen.logits).float())
        weights = None if self.weights is None else e.new_tensor(self.weights)
        width = balance.anchors.shape[2]
        return {
            "nll": F.nll_loss(found.final.clamp_min(1e-12).log(), batch.classes, weights),
            "anchor": now.share * self.lambda_mu * anchor_loss(balance.anchors),
            "centre": now.share * self.lambda_center * centre_loss(found.distances, batch.classes, found.confidence, width),
        }
