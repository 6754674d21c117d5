"""Registers for a model that was trained without any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import PlainBlock, Tokens, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step
from .frozen import after_integers, learn_only


@step("adapt")
@dataclass(frozen=True)
class Registers(Step):
    """Chen et al., "Vision Transformers with Self-Distilled Registers" (PH-Reg, NeurIPS 2025): `count` learned tokens behind the
    class token, from the first block to the last, for a pretrained model that has none.

    They are drawn from N(0, 1/C), have no position, and take part in everything; nobody reads what they become. They, the
    positions, the patch embedding and the whole last block go on learning (the final norm does not, as in the official code), by
    `learn.PHReg` from the model as it was. The official code puts them before the class token, which attention does not notice.

    Comes before steps that shorten the sequence, which then keep them, and before quantization; deployable.
    """

    count: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 1000:
            raise VitreousError(f"adapt.Registers: count must lie in 1 to 1000, not {self.count}")

    def refuse_after(self, done: Sequence[Step]) -> str:
        if any(s.name in ("adapt.Registers", "adapt.HST") for s in done):
            return "tokens were added already that do not expect more"
        if any(s.family == "tokens" for s in done):
            return "it would take registers for patches: registers first"
        return after_integers(done)

    def refuse_before(self, following: Step) -> str:
        return "its predictors know tokens by their places" if following.name == "tokens.Sparsifiner" else ""

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        anatomy = read(model)
        blocks = plain_blocks(model, self.name)
        vit: Any = next((m for m in model.modules() if isinstance(getattr(m, "num_prefix_tokens", None), int)), None)
        if vit is None and not anatomy.class_token:
            raise VitreousError(f"{self.name}: {anatomy.kind} has no class token, so its head would read the registers too")
        if getattr(vit, "dynamic_img_size", False):
            raise VitreousError(f"{self.name}: open {anatomy.kind} for one image size, with dynamic_img_size=False")
        for block in blocks:
            position = cast(Any, block.attn).position
            if position is not None and position.kind == "relative":
                raise VitreousError(f"{self.name}: '{block.name}' has a bias for each pair of places, and registers have none")
            if position is not None:
                cast(Any, block.attn).position = replace(position, prefix=position.prefix + self.count)
        first, width = blocks[0], cast(int, anatomy.width)
        first.registers = nn.Parameter((torch.randn(self.count, width) * width**-0.5).to(next(first.parameters())))
        first.register_forward_pre_hook(_Join(anatomy.prefix))
        if vit is not None:
            vit.num_prefix_tokens += self.count
        read(model, grid=anatomy.grid, prefix=anatomy.prefix + self.count)
        learn_only(model, [first.registers, *_stem(model, blocks), *blocks[-1].parameters()])


class _Join:
    """Before the first block: the registers behind the prefix tokens. A class, so that its block's copies have their own."""

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = Tokens.of(args[0])
        x = tokens.x
        registers = cast(Tensor, block.registers).expand(x.shape[0], -1, -1)
        x = torch.cat([x[:, : self.prefix], registers, x[:, self.prefix :]], 1)
        return (x if isinstance(args[0], Tensor) else tokens._replace(x=x), *args[1:])


def _stem(model: nn.Module, blocks: Sequence[PlainBlock]) -> list[nn.Parameter]:
    """Positions and patch embedding: what lies outside of the blocks with a place in its name, and the first convolution."""
    inside = {id(p) for b in blocks for p in b.parameters()}
    places = [p for n, p in model.named_parameters() if id(p) not in inside and "pos" in n.rsplit(".", 2)[-1].lower()]
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return [*places, *(conv.parameters() if conv is not None else ())]
