"""Remove the attention heads that matter least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import merged, plain_blocks, shared_copy
from ..errors import VitreousError
from ..outputs import answer, embeds
from ..steps import Step, step
from .cut import cut_heads

BATCH = 16


def importance(model: nn.Module, images: Tensor) -> list[Tensor]:
    """For each block `[heads]`: the mean over `images` of |∂L/∂ξ| at ξ = 1, where ξ scales what the head gives.

    Michel et al. (2019), section 4.1, before normalisation.

    L is the cross-entropy against the model's own prediction. A model without classes has no such loss, and where it is constant
    (one logit; probabilities of exactly 1) it says nothing: there L is the output's component along a random direction, another
    for each image, so that |∂L/∂ξ| measures how far the output moves. (Its norm would not do: a last layer norm keeps that
    nearly constant.)

    Raises `VitreousError` where a block is not plain, and where nothing distinguishes heads: no images, NaN, or no head that
    changes any answer.
    """
    if not len(images):
        raise VitreousError("prune.Heads was given no calibration images: give at least one, 32 are usual")
    scores, classes = None, not embeds(model, images[:1])
    blocks = plain_blocks(model := shared_copy(model), "prune.Heads")
    heads = {b.name: cast(int, b.attn.num_heads) for b in blocks}
    projections = {b.name: f"{b.name}.attn.proj" for b in blocks}
    if classes:
        scores = _slopes(model, images, heads, projections, cross_entropy)
    if scores is None or not any(s.any() for s in scores):
        scores = _slopes(model, images, heads, projections, random_component)
    if not all(torch.isfinite(s).all() for s in scores):
        raise VitreousError("prune.Heads: gradients hold NaN or infinity, by which no head can be chosen; try it in float32")
    if not any(s.any() for s in scores):
        raise VitreousError("prune.Heads: no head changes any answer on these images, so none can be said to matter less")
    return scores


Loss = Callable[[Tensor], Tensor]


def _slopes(model: nn.Module, images: Tensor, heads: dict[str, int], projections: dict[str, str], loss: Loss) -> list[Tensor]:
    masks: dict[str, list[Tensor]] = {name: [] for name in heads}

    def mask(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            (given,) = args  # [B, N, heads·d], the heads side by side as the output projection takes them
            if not masks[name]:  # a block that runs again has the same heads
                masks[name].append(given.new_ones(len(given), 1, heads[name], 1).requires_grad_())
            return ((given.unflatten(-1, (heads[name], -1)) * masks[name][0]).flatten(-2),)

        return hook

    handles = [model.get_submodule(proj).register_forward_pre_hook(mask(name)) for name, proj in projections.items()]
    totals = [torch.zeros(h) for h in heads.values()]
    parameter = next(model.parameters())
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for x in images.split(BATCH):
                for kept in masks.values():
                    kept.clear()
                out = answer(model(x.clone().to(parameter)))
                gradients = torch.autograd.grad(loss(out.float()), [m for kept in masks.values() for m in kept])
                for total, gradient in zip(totals, gradients, strict=True):
                    total += gradient.float().abs().flatten(1).sum(0).cpu()
    finally:
        for handle in handles:
            handle.remove()
    return [t / len(images) for t in totals]


# The sum over images: each mask belongs to one image, so their gradients do not mix.
def cross_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, out.argmax(1), reduction="sum")


def random_component(out: Tensor) -> Tensor:
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return (F.normalize(direction.flatten(1), dim=1).view_as(out) * out).sum()


def least(scores: Sequence[Tensor], share: float) -> list[list[int]]:
    """For each block the heads to remove: the `share` of all heads with the lowest scores, a block's last one spared.

    Scores are divided by their l2 norm in each block first (section 4.1, after Molchanov et al., 2017).
    """
    ranked = sorted((float(v), i, h) for i, s in enumerate(scores) for h, v in enumerate(s / s.norm().clamp_min(1e-12)))
    removed: list[list[int]] = [[] for _ in scores]
    budget = int(share * len(ranked) + 1e-9)
    for _, i, h in ranked:
        if budget and len(removed[i]) < len(scores[i]) - 1:
            removed[i].append(h)
            budget -= 1
    return [sorted(r) for r in removed]


@step("prune")
@dataclass(frozen=True)
class Heads(Step):
    """Michel, Levy & Neubig, "Are Sixteen Heads Really Better than One?" (NeurIPS 2019).

    Removes the `share` of all attention heads whose removal changes the loss least by its first-order expansion
    (section 4.1), at least one head a block staying. Their rows and columns of the projections go too: the model is
    smaller and faster wherever it runs. Needs calibration images, no labels and no training. `share=0` is the
    identity.

    Comes before quantization, whose scales hold for the heads that were there.
    """

    share: float = 0.25

    needs_calibration: ClassVar[bool] = True
    plans: ClassVar[dict[str, Any]] = {"heads": list[list[int]]}

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise VitreousError(f"prune.Heads: share must lie in [0, 1), not {self.share}")

    def refuse_after(self, done: Sequence[Step]) -> str:
        quantized = any(s.family == "quant" for s in done)
        return "the scales were calibrated with all heads: prune first" if quantized else ""

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        """`heads`: for each block the numbers of the heads to remove. `covers`: how many that is."""
        assert calibration is not None
        scores = importance(model, calibration)
        heads = least(scores, self.share)
        return {"heads": heads, "covers": f"{sum(map(len, heads))} of {sum(map(len, scores))} heads removed"}

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        blocks = plain_blocks(merged(model), self.name)
        if len(plan["heads"]) != len(blocks):
            raise VitreousError(f"{self.name}: the plan has {len(plan['heads'])} blocks, the model has {len(blocks)}")
        for block, removed in zip(blocks, plan["heads"], strict=True):
            heads = range(cast(int, block.attn.num_heads))
            if not set(removed) < set(heads):  # a block keeps one at least
                raise VitreousError(
                    f"{self.name}: the plan removes heads {removed} of block '{block.name}', which has {len(heads)}"
                )
            cut_heads(block.attn, [h for h in heads if h not in removed], self.name, block.name)
