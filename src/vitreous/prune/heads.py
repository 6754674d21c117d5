"""Remove the attention heads that matter least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import plain_blocks
from ..errors import VitreousError
from ..steps import Step, step

BATCH = 16


def importance(model: nn.Module, images: Tensor) -> list[Tensor]:
    """For each block `[heads]`: the mean over `images` of |∂L/∂ξ| at ξ = 1, where ξ scales what the head gives.

    Michel et al. (2019), section 4.1, before normalisation.

    L is the cross-entropy against the model's own prediction. A model without classes has no such loss: there L is the
    feature's component along a random direction, another for each image, so that |∂L/∂ξ| measures how far the feature
    moves. (Its norm would not do: a last layer norm keeps that nearly constant.)

    Raises `VitreousError` where a block is not plain.
    """
    anatomy = read(model)
    anatomy.require_plain("prune.Heads")
    masks: list[Tensor] = []

    def mask(heads: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            (given,) = args  # [B, N, heads·d], the heads side by side as the output projection takes them
            scale = torch.ones(len(given), 1, heads, 1, dtype=given.dtype, device=given.device, requires_grad=True)
            masks.append(scale)
            return ((given.unflatten(-1, (heads, -1)) * scale).flatten(-2),)

        return hook

    handles = []
    for b in anatomy.blocks:
        proj = model.get_submodule(f"{b.attention.name}.{b.attention.proj}")
        handles.append(proj.register_forward_pre_hook(mask(cast(int, b.attention.heads))))
    totals = [torch.zeros(cast(int, b.attention.heads)) for b in anatomy.blocks]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for x in images.split(BATCH):
                masks.clear()
                loss = _loss(model(x.clone()), anatomy.classifier is not None)
                for total, gradient in zip(totals, torch.autograd.grad(loss, masks), strict=True):
                    total += gradient.float().abs().flatten(1).sum(0).cpu()
    finally:
        for handle in handles:
            handle.remove()
    return [t / len(images) for t in totals]


def _loss(out: Tensor, classes: bool) -> Tensor:
    """The sum over images: each mask belongs to one image, so their gradients do not mix."""
    if classes:
        return F.cross_entropy(out, out.argmax(1), reduction="sum")
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
        blocks = plain_blocks(model, self.name)
        if len(plan["heads"]) != len(blocks):
            raise VitreousError(f"{self.name}: the plan has {len(plan['heads'])} blocks, the model has {len(blocks)}")
        for block, removed in zip(blocks, plan["heads"], strict=True):
            if removed:
                self._shrink(cast(Any, block.attn), removed, block.name)

    def _shrink(self, attn: Any, removed: list[int], where: str) -> None:
        if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
            raise VitreousError(
                f"{self.name}: block '{where}' normalises all heads together: none can go without changing the rest"
            )
        heads = attn.num_heads
        if not set(removed) < set(range(heads)):
            raise VitreousError(f"{self.name}: the plan removes heads {removed} of block '{where}', which has {heads}")
        d = attn.proj.in_features // heads
        kept = torch.tensor([h for h in range(heads) if h not in removed])
        rows = (kept[:, None] * d + torch.arange(d)).flatten()  # of one of q, k, v
        for name in ("q_proj", "k_proj", "v_proj", "gate"):
            if getattr(attn, name, None) is not None:
                _keep(getattr(attn, name), rows, 0)
        if getattr(attn, "qkv", None) is not None:
            _keep(attn.qkv, torch.cat([rows + i * heads * d for i in range(3)]), 0)
        for name in ("q_bias", "k_bias", "v_bias"):
            if (old := getattr(attn, name, None)) is not None:
                new = old.detach()[rows.to(old.device)]
                setattr(attn, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        _keep(attn.proj, rows, 1)
        attn.num_heads, attn.attn_dim = len(kept), len(rows)


def _keep(linear: nn.Linear, index: Tensor, axis: int) -> None:
    """Keep these outputs (`axis` 0) or inputs (1) of a linear layer."""
    index = index.to(linear.weight.device)
    weight, bias = linear.weight, linear.bias
    linear.weight = nn.Parameter(weight.detach().index_select(axis, index), weight.requires_grad)
    if axis == 0 and bias is not None:
        linear.bias = nn.Parameter(bias.detach()[index], bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape
