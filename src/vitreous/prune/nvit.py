"""NViT: channels, heads, dimensions of queries, keys and values, and hidden units, ranked all together and removed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..blocks import PlainBlock, Tokens, merged, plain_blocks
from ..errors import VitreousError
from ..outputs import answer, embeds
from ..steps import Step, step
from ..work import tick
from .cut import cut_by, separate
from .heads import BATCH, cross_entropy, random_component
from .saliency import GROUPS, Latency, adjusted, after_removal, criterion
from .units import KINDS, Structure, around, parts_of, structures


@step("prune")
@dataclass(frozen=True)
class NViT(Step):
    """Yang, Yin, Shen, Molchanov, Li & Kautz, "Global Vision Transformer Pruning with Hessian-Aware Saliency" (CVPR 2023).

    Units of five kinds are ranked together by c̃ = (κ · Σ w·g)² − λ · gain, the second-order change of the loss by the empirical
    Fisher matrix less what time the unit costs, and removed in groups until `keep` of the blocks' time is left: residual channels
    ("embedding", of the whole model), heads, dimensions of queries and keys ("qk") and of values ("v"), hidden units ("mlp").
    They are gone from the weights; the scale of attention stays that of the original heads.

    keep: share of the blocks' time that is left. structures: kinds that may go. latency: λ, 0 for the loss alone; in units of the
        mean criterion over the mean gain, for the published 5e-4 belongs to seconds of one machine and the loss of one training.
    costs: what time is made of: a multiply-accumulate of projections, of MLP, of products of attention, a number of the attention
        map, a number of the tokens. By default multiply-accumulates count alike.
    rounds: criterion and ranking are done anew after each share of what goes.

    The paper prunes while it trains, with labels, distillation and momentum; this is done on finished weights, without labels:
    the loss is that of `prune.Heads`. Its fine-tuning is `vt.heal`. Kinds that a model does not have apart (queries that are
    normalised or turned, channels of a model that gives features) are left as they are.
    """

    keep: float = 0.54
    structures: tuple[str, ...] = KINDS
    latency: float = 0.01
    costs: tuple[float, ...] = (1.0, 1.0, 1.0, 0.0, 0.0)
    rounds: int = 8

    needs_calibration: ClassVar[bool] = True
    plans: ClassVar[dict[str, Any]] = {
        "embedding": list[int] | None,
        "around": dict[str, int] | None,
        **{kind: dict[str, list[int]] | None for kind in KINDS[1:]},
    }

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise VitreousError(f"prune.NViT: keep must lie in (0, 1], not {self.keep}")
        if not self.structures or not set(self.structures) <= set(KINDS):
            raise VitreousError(f"prune.NViT: structures must be some of {', '.join(KINDS)}, not {self.structures}")
        if self.latency < 0 or self.rounds < 1:
            raise VitreousError("prune.NViT: latency must be at least 0, and rounds at least 1")
        if len(self.costs) != 5 or min(self.costs) < 0 or not sum(self.costs[:3]):
            raise VitreousError("prune.NViT: costs must be five numbers of at least 0, one of the first three above")

    def refuse_after(self, done: Sequence[Step]) -> str:
        quantized = any(s.family == "quant" for s in done)
        return "the scales were calibrated with all units: prune first" if quantized else ""

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        """For each kind the units that stay, by block; "around": where residual channels lie outside of the blocks."""
        assert calibration is not None
        if not len(calibration):
            raise VitreousError("prune.NViT was given no calibration images: give at least one, 32 are usual")
        if self.keep == 1:
            return {}
        work = copy.deepcopy(model).requires_grad_()
        blocks = plain_blocks(merged(work), self.name)
        for block in blocks:
            separate(block.attn)
        images = calibration.to(next(work.parameters()))
        free = "embedding" in self.structures and not embeds(work, images[:1])
        outside = around(work, blocks, images[:1]) if free else {}
        units = structures(blocks, self.structures, parts_of(work, outside))
        if not units:
            raise VitreousError(f"{self.name}: this model has no {' and no '.join(self.structures)} that could go by themselves")
        alive = self._removed(work, images, blocks, units)
        plan: dict[str, Any] = {}
        for unit, left in zip(units, alive, strict=True):
            kept = left.nonzero().flatten().tolist()
            if unit.block is None:
                plan |= {"embedding": kept, "around": outside}
            else:
                plan.setdefault(unit.kind, {})[str(unit.block)] = kept
        count = lambda kind: "{} of {} {}".format(
            *(int(sum(f(a) for u, a in zip(units, alive, strict=True) if u.kind == kind)) for f in (torch.sum, len)), SAID[kind]
        )
        return plan | {"covers": "left: " + ", ".join(count(kind) for kind in KINDS if kind in plan)}

    def _removed(self, work: nn.Module, images: Tensor, blocks: list[PlainBlock], units: list[Structure]) -> list[Tensor]:
        """Which units of each structure are left, `[units]` of bool."""
        depth, groups = len(blocks), [_group(u) for u in units]
        latency = Latency(self.costs, _tokens(work, blocks, images[:1]), {u.kind: g for u, g in zip(units, groups, strict=True)})
        alive = [torch.ones(u.size, dtype=torch.bool) for u in units]
        fixed = [_dims(block) for block in blocks]
        dims = lambda gates: [_with(fixed[i], i, units, gates) for i in range(depth)]
        whole = latency.total(dims(alive))
        loss = random_component if embeds(work, images[:1]) else cross_entropy
        for turn in range(self.rounds):
            scores = _scores(work, images, units, depth, loss)
            if not any(s.any() for s in scores):
                scores = _scores(work, images, units, depth, loss := random_component)
            if not all(torch.isfinite(s).all() for s in scores):
                raise VitreousError(f"{self.name}: gradients hold NaN or infinity, by which nothing can be chosen; try float32")
            gains = [latency.gain(u.kind, u.block, dims(alive)) for u in units]
            left = sum(int(a.sum()) for a in alive)
            mean = sum(float(s[a].sum()) for s, a in zip(scores, alive, strict=True)) / left
            typical = sum(g * int(a.sum()) for g, a in zip(gains, alive, strict=True)) / left
            values = adjusted(scores, [a.double() for a in alive], gains, self.latency * mean / max(typical, 1e-30))
            # What is gone stays gone: below all that is alive.
            values = [torch.where(a, v, v.min() - 1e6 * mean - 1.0) for v, a in zip(values, alive, strict=True)]
            target = (1 - (1 - self.keep) * (turn + 1) / self.rounds) * whole
            chosen = functools.partial(after_removal, values, groups)
            low, high = 0, sum(-(-u.size // g) for u, g in zip(units, groups, strict=True))
            if latency.total(dims(chosen(high)[0])) > target:
                share = latency.total(dims(chosen(high)[0])) / whole
                raise VitreousError(
                    f"{self.name}: without all of its {', '.join(self.structures)} but one group each, {share:.2f} of the "
                    f"blocks' time is left: keep={self.keep} cannot be reached"
                )
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if latency.total(dims(chosen(middle)[0])) <= target else (middle + 1, high)
            alive = chosen(low)[0]
            for unit, gate in zip(units, alive, strict=True):
                unit.zero(~gate)
            tick((turn + 1) / self.rounds)
        return alive

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        cut_by(model, plan, self.name)


SAID = {
    "embedding": "channels",
    "heads": "heads",
    "qk": "dimensions of queries and keys",
    "v": "dimensions of values",
    "mlp": "hidden units",
}


def _scores(
    work: nn.Module, images: Tensor, units: list[Structure], depth: int, loss: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """The criterion of each structure, its mean over batches."""
    totals = [torch.zeros(u.size, dtype=torch.float64) for u in units]
    batches = images.split(BATCH)
    for x in batches:
        work.zero_grad(set_to_none=True)
        with torch.inference_mode(False), torch.enable_grad():
            (loss(answer(work(x.clone())).float()) / len(x)).backward()
        for total, unit in zip(totals, units, strict=True):
            total += criterion(unit, depth)
    work.zero_grad(set_to_none=True)
    return [t / len(batches) for t in totals]


def _group(unit: Structure) -> int:
    """The published size of a group, or less where a structure is too small for four of them."""
    return max(1, min(GROUPS[unit.kind], unit.size // 4))


def _tokens(work: nn.Module, blocks: list[PlainBlock], x: Tensor) -> list[int]:
    found: list[int] = []
    handles = [b.register_forward_pre_hook(lambda _, args: found.append(Tokens.of(args[0]).x.shape[1])) for b in blocks]
    try:
        with torch.no_grad():
            work(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _dims(block: PlainBlock) -> dict[str, int]:
    attn, linears = cast(Any, block.attn), [m for m in cast(nn.Module, block.mlp).modules() if isinstance(m, nn.Linear)]
    h = attn.num_heads
    hidden = linears[-1].in_features if linears else 0
    wide = attn.proj.out_features
    return {"embedding": wide, "heads": h, "qk": attn.q_proj.out_features // h, "v": attn.v_proj.out_features // h, "mlp": hidden}


def _with(fixed: dict[str, int], block: int, units: list[Structure], alive: Sequence[Tensor]) -> dict[str, int]:
    now = {u.kind: int(a.sum()) for u, a in zip(units, alive, strict=True) if u.block in (None, block)}
    return fixed | now
