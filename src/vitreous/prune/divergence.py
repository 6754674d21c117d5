"""Channels, heads and hidden units whose removal changes the model's probabilities least, on the images that are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import Tokens, merged, plain_blocks, shared_copy
from ..errors import VitreousError
from ..outputs import answer, embeds
from ..steps import Step, step
from .cut import cut_by, layers_of, units_stand_alone
from .units import around

BATCH, DRAWS = 32, 4


@step("prune")
@dataclass(frozen=True)
class Divergence(Step):
    """Class-wise pruning of Liu, Song, Li, Sun, Lan, Liu, Jiang & Li, "ED-ViT: Splitting Vision Transformer for Distributed
    Inference on Edge Devices" (2024), by the criterion of Yu & Wu, "A Unified Pruning Framework for Vision Transformers" (UP-ViT,
    2021): what matters least is what changes the output least when it goes, in the mean of KL(softmax(full) ‖ softmax(without))
    over the calibration images. Given images of some classes alone, it makes a model for these.

    Of the residual channels (one set for all blocks), of each block's heads and of its hidden units the share `keep` stays,
    equally many in every block. `channels`: whether residual channels go too.

    UP-ViT removes each unit in turn and runs the model. Here the divergence of all units comes from a few backward passes: to
    second order it is ½ E[(∂ log p(y)/∂ξ)²], y drawn from the model's own answers and ξ = 1 the unit's share. It needs classes.
    """

    keep: float = 0.5
    channels: bool = True

    needs_calibration: ClassVar[bool] = True
    plans: ClassVar[dict[str, Any]] = {
        "embedding": list[int] | None,
        "around": dict[str, int] | None,
        "heads": dict[str, list[int]] | None,
        "mlp": dict[str, list[int]] | None,
    }

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise VitreousError(f"{self.name}: keep must lie in (0, 1], not {self.keep}")

    def refuse_after(self, done: Sequence[Step]) -> str:
        quantized = any(s.family == "quant" for s in done)
        return "the scales were calibrated with all units: prune first" if quantized else ""

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        assert calibration is not None
        if not len(calibration):
            raise VitreousError(f"{self.name} was given no calibration images: give some of the classes to keep")
        if embeds(model, calibration[:1]):
            raise VitreousError(f"{self.name} compares answers, and this model gives features: give it classes (num_classes)")
        work = shared_copy(merged(model))
        scores = divergences(work, calibration, self.name)
        plan: dict[str, Any] = {}
        for kind in ("heads", "mlp"):
            if kind in scores:
                plan[kind] = {str(i): self._best(s) for i, s in scores[kind].items()}
        outside = (
            around(work, plain_blocks(work, self.name), calibration[:1].to(next(work.parameters()))) if self.channels else {}
        )
        if outside:
            plan |= {"embedding": self._best(scores["embedding"][0]), "around": outside}
        channels = len(plan.get("embedding") or scores["embedding"][0])
        return plan | {"covers": f"left: {self.keep:.0%} of heads and hidden units in every block, {channels} channels"}

    def _best(self, scores: Tensor) -> list[int]:
        return scores.topk(max(1, round(self.keep * len(scores)))).indices.sort().values.tolist()

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        cut_by(model, plan, self.name)


def divergences(model: nn.Module, images: Tensor, name: str) -> dict[str, dict[int, Tensor]]:
    """For each kind ("embedding", whose only entry is 0; "heads" and "mlp" by block) `[units]`: by how much the answers diverge
    without the unit, to second order, the mean over `images`. `model` is rearranged into plain blocks."""
    blocks = plain_blocks(model, name)
    masks: dict[tuple[str, int], Tensor] = {}
    handles: list[Any] = []

    def share(kind: str, i: int, x: Tensor, units: int) -> Tensor:
        """`x` `[B, N, units · d]` times the units' shares, which are 1."""
        if (kind, i) not in masks:
            masks[kind, i] = x.new_ones(len(x), 1, units, 1).requires_grad_()
        return (x.unflatten(-1, (units, -1)) * masks[kind, i]).flatten(-2)

    def hook(kind: str, i: int, units: int) -> Any:
        return lambda _, args: (share(kind, i, args[0], units), *args[1:])

    def stream(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = Tokens.of(args[0])
        x = share("embedding", 0, tokens.x, tokens.x.shape[-1])
        return (x if isinstance(args[0], Tensor) else tokens._replace(x=x), *args[1:])

    for i, block in enumerate(blocks):
        attn, mlp = cast(Any, block.attn), cast(nn.Module, block.mlp)
        layers = layers_of(mlp)
        if isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
            handles.append(attn.proj.register_forward_pre_hook(hook("heads", i, attn.num_heads)))
        if layers is not None and units_stand_alone(mlp):
            handles.append(layers[1].register_forward_pre_hook(hook("mlp", i, layers[1].in_features)))
        handles.append(block.register_forward_pre_hook(stream))
    found: dict[str, dict[int, Tensor]] = {}
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for x in images.split(BATCH):
                masks.clear()
                log = F.log_softmax(answer(model(x.clone().to(next(model.parameters())))).float(), 1)
                for _ in range(DRAWS):
                    y = torch.multinomial(log.detach().exp().cpu(), 1, generator=draw).to(log.device)
                    slopes = torch.autograd.grad(log.gather(1, y).sum(), list(masks.values()), retain_graph=True)
                    for (kind, i), g in zip(masks, slopes, strict=True):
                        total = 0.5 * g.flatten(1).double().square().sum(0).cpu() / (DRAWS * len(images))
                        kinds = found.setdefault(kind, {})
                        kinds[i] = kinds[i] + total if i in kinds else total
    finally:
        for handle in handles:
            handle.remove()
    if not all(torch.isfinite(s).all() for kinds in found.values() for s in kinds.values()):
        raise VitreousError(f"{name}: gradients hold NaN or infinity, by which nothing can be chosen; try it in float32")
    return found
