"""ShiftAdd: linear layers whose weights are powers of two, so that shifts and additions do for multiplications."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from ..blocks import plain_blocks
from ..errors import VitreousError
from ..macs import CountMacs
from ..mixers.shiftadd import ShiftLinear
from ..steps import Step, step


@step("quant")
@dataclass(frozen=True)
class ShiftAdd(Step):
    """You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer" (NeurIPS 2023): the
    linear layers of `parts` become shifts by powers of two (`mixers.shiftadd.ShiftLinear`), without training or healed after it.

    The paper finds that attention stands it and MLPs lose by it, and gives these a choice for each token (`ShiftExperts`);
    attention of binary codes (`BinaryAttention`) has to be trained. `operations` counts what is left of the multiplications.

    Simulated: no runtime here has kernels of shifts, so it has no speed.
    """

    parts: tuple[Literal["attention", "mlp"], ...] = ("attention",)

    def __post_init__(self) -> None:
        if not self.parts:
            raise VitreousError('quant.ShiftAdd: parts must name "attention", "mlp" or both')

    def refuse_after(self, done: Sequence[Step]) -> str:
        return "the weights are on another grid already" if any(s.family == "quant" for s in done) else ""

    def refuse_before(self, following: Step) -> str:
        return "its grid would undo the powers of two" if following.family == "quant" else ""

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        found = 0
        for block in plain_blocks(model, self.name):
            for part in self.parts:
                inside = cast(nn.Module, block.attn if part == "attention" else block.mlp)
                for name, layer in list(inside.named_modules()):
                    if type(layer) is nn.Linear:
                        made = ShiftLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                        made.weight, made.bias = layer.weight, layer.bias
                        parent, _, last = name.rpartition(".")
                        setattr(inside.get_submodule(parent), last, made.train(layer.training))
                        found += 1
        if not found:
            raise VitreousError(f"{self.name}: no {' or '.join(self.parts)} of {type(model).__name__} has linear layers")
        model.simulated = "shifts by powers of two are computed as products in floats: no runtime executes them"  # type: ignore[assignment]


def operations(model: nn.Module, x: Tensor) -> dict[str, int]:
    """How many "multiplications" and "shifts" one pass over `x` `[B, C, H, W]` takes; additions are as many as both."""
    shifts = 0

    def count(layer: ShiftLinear, _: Any, out: Tensor) -> None:
        nonlocal shifts
        shifts += out.numel() * layer.in_features

    handles = [m.register_forward_hook(cast(Any, count)) for m in model.modules() if isinstance(m, ShiftLinear)]
    try:
        with CountMacs() as counter:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {"multiplications": counter.total - shifts, "shifts": shifts}
