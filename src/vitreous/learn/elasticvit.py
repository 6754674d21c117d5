"""How ElasticViT trains its supernet: so that the networks of neighbouring steps pull the shared weights the same way."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError
from ..models.elasticvit import CONVS, LEAST, Choice, ElasticViT
from ..prune.elastic import between, bounds, choice, cost, row, supernet
from .objective import Batch, Now, Objective, Seen, objective, positive, same_classes, share

LEVELS = (100, 200, 300, 400, 500, 700, 900, 1200)  # million multiply-accumulates
LARGE = 500  # from which level on a memory holds a third
TRIED = 5  # networks at random of which the preferred one is taken
POOL = 200  # networks drawn for each level before the training
FLOORS = (  # up to which level, and the network below which none is drawn
    (200, LEAST),
    (400, (176, (16, 1, 3), ((24, 3, 3, 3), (32, 3, 3, 3), (48, 2, 2, 2), (96, 2, 3, 2), (176, 2, 2, 2), (224, 2, 2, 2)))),
    (800, (224, (16, 1, 3), ((24, 3, 3, 3), (32, 3, 3, 3), (64, 2, 2, 2), (96, 2, 2, 2), (192, 2, 2, 2), (256, 2, 2, 2)))),
)


def divergence(logits: Tensor, target: Tensor, alpha: float, clip: float) -> tuple[Tensor, Tensor]:
    """The α-divergence of `target` (shares `[B, K]`) from the softmax of `logits`, and what has its gradient, `[B]` each; powers
    of the ratio of the two are cut at `clip`, but for α = 1, the Kullback-Leibler divergence."""
    log = logits.log_softmax(1)
    q = log.detach().exp()
    ratio = target / q.clamp_min(torch.finfo(q.dtype).tiny)
    if alpha == 1:
        value, weight = torch.xlogy(ratio, ratio), ratio
    else:
        base, power = 1 / (alpha * (alpha - 1)), ratio.pow(alpha).clamp(0, clip)
        value, weight = base * (power - 1), power / alpha + base
    return (q * value).sum(1), -(q * weight * log).sum(1)


def alpha_divergence(logits: Tensor, target: Tensor, least: float = -1.0, most: float = 1.0, clip: float = 5.0) -> Tensor:
    """Wang et al., "AlphaNet: Improved Training of Supernets with Alpha-Divergence" (ICML 2021), section 4: for each image the
    larger of two α-divergences. Its gradient is the loss's; its value is not the divergence."""
    low, high = divergence(logits, target.detach(), least, clip), divergence(logits, target.detach(), most, clip)
    return torch.where(low[0] > high[0], low[1], high[1]).mean()


class Banks(nn.Module):
    """Where the training of a supernet stands: its level, of each level networks drawn before, those that were trained with minus
    their cross-entropy, and the least one; and the three of this step, each with whether it is remembered."""

    def __init__(self, model: ElasticViT, levels: tuple[float, ...], band: float) -> None:
        super().__init__()
        self.levels, self.level, self.quarter, self.steps, self.own = levels, 0, 0, 0, model.choice
        self.seed = int(torch.randint(2**31, ()))
        self.known: list[dict[Choice, float]] = [{} for _ in levels]
        self.floors: list[Choice] = []
        for level in levels:
            upper = [f for up, f in FLOORS if level <= up + band][:1] or [FLOORS[-1][1]]
            self.floors.append((bounds(model, upper) or [cast(Choice, model.least)])[0])
        self.pools = [
            between(model, level * 1e6, (level + band) * 1e6, POOL, floor)
            for level, floor in zip(levels, self.floors, strict=True)
        ]
        self.now: list[tuple[Choice, bool]] = []

    def move(self) -> None:
        """To a neighbouring level, or none: each way one of three, at the ends two of three to stay. By a generator of its own,
        so that all processes and pieces of a step are on one level."""
        self.steps += 1
        by = int(torch.randint(-1, 2, (), generator=torch.Generator().manual_seed(self.seed + self.steps)))
        self.level = min(max(self.level + by, 0), len(self.levels) - 1)

    def get_extra_state(self) -> dict[str, Any]:
        known = [[(row(net), score) for net, score in bank.items()] for bank in self.known]
        return dict(level=self.level, quarter=self.quarter, steps=self.steps, seed=self.seed, known=known)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.level, self.quarter, self.steps, self.seed = (state[k] for k in ("level", "quarter", "steps", "seed"))
        self.known = [{choice(net): score for net, score in bank} for bank in state["known"]]

    def size(self, bank: int) -> int:
        return bank if self.levels[self.level] < LARGE else max(1, bank // 3)

    def draw(self, model: ElasticViT, bank: int, rate: float) -> tuple[Choice, bool]:
        """A network of this level, and whether it was remembered (section 3.4)."""
        known, pool = self.known[self.level], self.pools[self.level]
        half = self.size(bank) // 2
        if len(known) > half and torch.rand(()) < rate:
            nets = list(known)
            return nets[int(torch.multinomial(torch.tensor([known[n] for n in nets]).softmax(0), 1))], True
        some = [pool[int(torch.randint(len(pool), ()))] for _ in range(TRIED if len(known) >= half else 1)]
        lowest = self.known[0]
        anchor = max(lowest, key=lambda n: lowest[n]) if self.level and lowest else cast(Choice, model.least)
        return (min(some, key=lambda n: depth_over_width(model, n, anchor)) if len(some) > 1 else some[0]), False

    def remember(self, net: Choice, score: float, bank: int) -> None:
        """A network and minus its cross-entropy; in a full memory in place of the worst, where it is better."""
        known = self.known[self.level]
        if net not in known and len(known) >= self.size(bank):
            worst = min(known, key=lambda n: known[n])
            if known[worst] >= score:
                return
            del known[worst]
        known[net] = score


def depth_over_width(model: ElasticViT, net: Choice, anchor: Choice) -> float:
    """Multiply-accumulates of `net` with the widths of `anchor`'s attention, less those with its depths: small where `net` owes
    its cost to width, which conflicts less."""
    attention = list(zip(net.stages, anchor.stages, strict=True))[CONVS:]
    narrow = net._replace(stages=(*net.stages[:CONVS], *((a[0], *n[1:]) for n, a in attention)))
    shallow = net._replace(stages=(*net.stages[:CONVS], *((n[0], a[1], *n[2:]) for n, a in attention)))
    return cost(model, narrow) - cost(model, shallow)


@objective
@dataclass(frozen=True)
class ConflictAware(Objective):
    """Tang et al., "ElasticViT: Conflict-aware Supernet Training for Deploying Fast Vision Transformer on Diverse Mobile Devices"
    (ICCV 2023), sections 3.3 and 3.4: networks of like size and of good ones, so that their gradients agree.

    Each step trains three networks of `levels[i]` to `levels[i]` + `band` million multiply-accumulates, i one more, one less or
    the same as before, and the least of the level. Each level remembers `bank` networks (from 500 million on a third) and their
    loss. With probability `rate`, 0.15 more after each sixth of the run, and more than half of a memory full, one is drawn from
    there by the softmax of minus the loss, else of five at random the one that owes its cost most to width. Losses are measured
    anew four times an epoch.

    The three learn from the teacher's softmax at `temperature` (published: the mean of two), or without one from the labels; the
    least from the mean of the three, by `alpha_divergence`. A memory takes the loss of the training step itself, where the
    released code runs the network once more. Levels of a supernet of your own must be within what it can be.
    """

    teacher: nn.Module | None = field(default=None, compare=False)
    levels: tuple[int | float, ...] = LEVELS
    band: float = 20
    bank: int = 150
    rate: float = 0.2
    temperature: float = 0.2

    wants: ClassVar[tuple[str, ...]] = ("logits",)

    def __post_init__(self) -> None:
        positive(self, "band", "temperature")
        share(self, "rate")
        if not self.levels or self.bank < 2:
            raise VitreousError("ConflictAware: give a level at least, and a bank of at least 2 networks")

    def parts(self, model: nn.Module) -> Banks:
        return Banks(supernet(model, "ConflictAware trains"), tuple(self.levels), self.band)

    def before_step(self, now: Now) -> None:
        cast(Banks, now.parts).move()

    def around(self, now: Now) -> AbstractContextManager[Any]:
        model, banks = cast(ElasticViT, now.model), cast(Banks, now.parts)
        rate = self.rate + 0.15 * min(int(6 * now.share), 5)
        banks.now = [banks.draw(model, self.bank, rate) for _ in range(3)]
        model.run(banks.now[0][0])
        return nullcontext()

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        model, banks = cast(ElasticViT, now.model), cast(Banks, now.parts)
        labels = batch.shares(seen.logits.shape[1])
        target = labels
        if self.teacher is not None:
            theirs = now.teach(self.teacher, batch.images).logits
            same_classes(seen.logits, theirs, "ConflictAware")
            target = (theirs / self.temperature).softmax(1)

        def answer(net: Choice) -> Tensor:
            model.run(net)
            return model(batch.images).float()

        try:
            self.refresh(banks, answer, labels, int(4 * now.epoch))
            answers = [seen.logits.float(), *(answer(net) for net, _ in banks.now[1:])]
            for (net, known), logits in zip(banks.now, answers, strict=True):
                if not known:
                    banks.remember(net, -float(F.cross_entropy(logits.detach(), labels)), self.bank)
            taught = torch.stack([a.detach().softmax(1) for a in answers]).mean(0)
            least = alpha_divergence(answer(banks.floors[banks.level]), taught)
        finally:
            model.run(banks.own)
        return {"drawn": torch.stack([F.cross_entropy(a, target) for a in answers]).sum(), "least": least}

    @torch.no_grad()
    def refresh(self, banks: Banks, answer: Any, labels: Tensor, quarter: int) -> None:
        """At the start of an epoch all losses anew, at each further quarter those of this level."""
        if quarter != banks.quarter:
            banks.quarter = quarter
            for known in banks.known if quarter % 4 == 0 else [banks.known[banks.level]]:
                known.update({net: -float(F.cross_entropy(answer(net), labels)) for net in known})
