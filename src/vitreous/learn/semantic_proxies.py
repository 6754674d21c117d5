"""Semantic proxies: what prompts of a class see in its pictures becomes part of what stands for the class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..adapt.embed import EmbeddingHead
from ..adapt.vpt import new_prompts
from ..blocks import PlainBlock
from ..errors import VitreousError
from .objective import Batch, Now, Objective, Seen, objective


def proxy_loss(
    features: Tensor, proxies: Tensor, labels: Tensor, alpha: float = 32.0, delta: float = 0.1, by_image: bool = False
) -> Tensor:
    """The criterion on features `[B, D]` and a proxy a class `[C, D]`, brought to unit norm.

    With s the cosines: the mean over all classes of log(1 + Σ e^(−α(s − δ))) over the class's images, and of
    log(1 + Σ e^(α(s + δ))) over the others. Proxy-Anchor divides the first by the classes that are present; here both are divided
    by all, as in the official code. `by_image` (ProxyNCA) sums over proxies and takes means over images.
    """
    s = F.normalize(features, dim=1) @ F.normalize(proxies, dim=1).mT
    own = F.one_hot(labels, len(proxies)).bool()
    axis = 1 if by_image else 0

    def softened(scores: Tensor, mask: Tensor) -> Tensor:
        zero = torch.zeros_like(scores.narrow(axis, 0, 1))
        return torch.cat([scores.masked_fill(~mask, -torch.inf), zero], axis).logsumexp(axis).mean()

    return softened(-alpha * (s - delta), own) + softened(alpha * (s + delta), ~own)


class SmallGRU(nn.Module):
    """A gated recurrent cell whose candidate is a ReLU; state and input `[B, D]`."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        for gate in ("r", "z", "n"):
            for reads in ("i", "h"):
                self.register_parameter(f"W_{reads}{gate}", nn.Parameter(nn.init.xavier_uniform_(torch.empty(dims, dims))))
            self.register_parameter(f"b_i{gate}", nn.Parameter(torch.zeros(dims)))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        p = cast(Any, self)
        reset = torch.sigmoid(x @ p.W_ir + h @ p.W_hr + p.b_ir)
        update = torch.sigmoid(x @ p.W_iz + h @ p.W_hz + p.b_iz)
        new = F.relu(x @ p.W_in + reset * (h @ p.W_hn) + p.b_in)
        return (1 - update) * new + update * h


def accumulate(cell: SmallGRU, container: Tensor, samples: Tensor, labels: Tensor) -> Tensor:
    """Containers `[C, D]` after those of the batch's classes have read their samples `[B, D]` in order; all of unit norm."""
    rank = (labels[:, None] == labels).tril(-1).sum(1)  # how many of the same class came before
    for i in range(int(rank.max()) + 1):
        now = rank == i
        container = container.index_copy(0, labels[now], cell(samples[now], container[labels[now]]))
    return F.normalize(container, dim=1)


class Proxies(nn.Module):
    """What is trained beside the student and thrown away: free proxies, prompts of each class, a head, the recurrent cell."""

    def __init__(self, model: nn.Module, classes: int, prompts: int, semantic: bool) -> None:
        super().__init__()
        head = head_of(model)
        dims, width = head.fc.out_features, head.fc.in_features
        self.free = nn.Parameter(nn.init.kaiming_normal_(torch.empty(classes, dims), mode="fan_out"))
        if not semantic:
            return
        self.names = [f"{n}.prompts" for n, m in model.named_modules() if isinstance(m, PlainBlock) and m.prompts is not None]
        if not self.names:
            raise VitreousError("SemanticProxies needs prompts in the model: apply adapt.VPT to it, or give semantic=0")
        drawn: list[Tensor] = [new_prompts(model, classes * prompts, self.free) for _ in self.names]
        self.prompts = nn.Parameter(torch.stack(drawn, 1).unflatten(0, (classes, prompts)).transpose(1, 2))  # [C, L, P, width]
        self.head, self.cell = EmbeddingHead(width, dims), SmallGRU(dims)
        drawn_at = nn.init.xavier_uniform_(torch.empty(classes, dims))
        self.register_buffer("container", F.normalize(drawn_at, dim=1))

    def samples(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """What the prompts of each image's class see in it, `[B, D]` of unit norm."""
        prompts = self.prompts[labels]  # [B, L, P, width]
        read: list[Tensor] = []
        handle = head_of(model).register_forward_pre_hook(lambda _, given: read.append(given[0]))
        try:
            functional_call(model, {name: prompts[:, i] for i, name in enumerate(self.names)}, (images,))
        finally:
            handle.remove()
        return self.head(read[-1])


def head_of(model: nn.Module) -> EmbeddingHead:
    found = next((m for m in model.modules() if isinstance(m, EmbeddingHead)), None)
    if found is None:
        raise VitreousError("SemanticProxies teaches features: apply adapt.Embed to the model")
    return found


@objective
@dataclass(frozen=True)
class SemanticProxies(Objective):
    """Ren et al., "Learning Semantic Proxies from Visual Prompts for Parameter-Efficient Fine-Tuning in Deep Metric Learning"
    (ICLR 2024), VPTSP-G: for a model with `adapt.VPT` and `adapt.Embed`, and training labels 0 to `classes` − 1.

    A second pass through the frozen backbone, with `prompts` of each image's own class in every block and a head of its own,
    gives a sample; a container of each class reads the samples of a batch through a small recurrent cell. A class's proxy is
    `semantic` · its container + (1 − `semantic`) · a free one; `proxy_loss` draws features to the proxies. `semantic=0` is
    proxies alone, without the second pass. All of it is thrown away but the student.

    The official code wants k pictures of a class side by side; here a batch is any, and each class reads those that it has. It
    gives the free proxies an optimiser and a rate (0.1) of their own; here all share the run's.
    """

    wants = ("pooled",)
    whole_batch = True
    classes: int = 0
    prompts: int = 3
    semantic: float = 0.5
    alpha: float = 32.0
    delta: float = 0.1

    def __post_init__(self) -> None:
        if self.prompts < 1 or not 0 <= self.semantic <= 1 or self.classes * self.prompts > 2**20:
            raise VitreousError(f"SemanticProxies: prompts must be at least 1 and semantic lie in [0, 1], not {self}")

    def parts(self, model: nn.Module) -> nn.Module:
        if self.classes < 2:
            raise VitreousError("SemanticProxies has a proxy a class: give classes=, how many there are to train on, at least 2")
        return Proxies(model, self.classes, self.prompts, self.semantic > 0)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        parts, labels = cast(Proxies, now.parts), batch.classes
        if int(labels.max()) >= self.classes or int(labels.min()) < 0:
            raise VitreousError(f"SemanticProxies has proxies of the classes 0 to {self.classes - 1}, and an image is of another")
        features, proxies = now.gather(seen.logits.float()), parts.free
        if self.semantic:
            samples = now.gather(parts.samples(now.model, batch.images, labels).float())
            labels = now.gather(labels)
            container = accumulate(parts.cell, cast(Tensor, parts.container), samples, labels)
            with torch.no_grad():
                cast(Tensor, parts.container).copy_(container)
            proxies = (1 - self.semantic) * parts.free + self.semantic * container
        else:
            labels = now.gather(labels)
        return {"proxies": proxy_loss(features, proxies, labels, self.alpha, self.delta)}
