"""Feature recalibration distillation: how a model with token slimming modules learns from the whole model it was made of."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import PlainBlock, Tokens
from ..errors import VitreousError
from ..score import two
from ..tokens.slimming import ReverseSlimming, TokenSlimmingModule


def reverse_modules(student: nn.Module, seed: int = 0) -> nn.ModuleList:
    """One reverse module a block: `student.rtsm` where the model has its own (SiT), else new ones.

    A block before the first slimming gets the identity. They are trained with the student and then thrown away. Raises
    `VitreousError` when the student has no token slimming module.
    """
    own = getattr(student, "rtsm", None)
    if isinstance(own, nn.ModuleList):
        return own
    anatomy = read(student)
    blocks = [student.get_submodule(b.name) for b in anatomy.blocks]
    slims = [[r for r in b.reducers if isinstance(r, TokenSlimmingModule)] if isinstance(b, PlainBlock) else [] for b in blocks]
    if not any(slims) or anatomy.grid is None or anatomy.width is None:
        raise VitreousError(f"{anatomy.kind} has no token slimming module: apply tokens.TokenSlimming first")
    patches = keep = anatomy.grid[0] * anatomy.grid[1]
    reference, reverse = next(student.parameters()), nn.ModuleList()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for slim in slims:
            keep = slim[-1].keep if slim else keep
            reverse.append(ReverseSlimming(anatomy.width, keep, patches) if keep < patches else nn.Identity())
    return reverse.to(reference.device, reference.dtype)


def frd(
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    reverse: nn.ModuleList,
    *,
    tokens: float = 2.0,
    logits: float = 2.0,
    tau: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The student's logits `[B, K]`, and the distillation loss (a scalar) to add to the loss of the labels.

    Zong et al., "Self-slimmed Vision Transformer" (ECCV 2022), section 3.3, with the official weights: `tokens` times the mean
    over all blocks of the squared error between the teacher's patches and the student's, brought back by `reverse` to as
    many; plus `logits` times τ² KL(teacher ‖ student) at temperature `tau`.

    Args:
        student: a SiT, or a model with `tokens.TokenSlimming`, as published started from the teacher's weights.
        teacher: the model before slimming, in eval mode; it gets no gradient.
        x: images `[B, C, H, W]`.
        reverse: from `reverse_modules(student)`; give the optimizer `{*student.parameters(), *reverse.parameters()}`.

    Raises `VitreousError` when teacher and student differ in depth, width or patches.
    """
    with torch.no_grad():
        target, theirs = patches_of_blocks(teacher, x)
    out, ours = patches_of_blocks(student, x)
    error, divergence = recalibration(out, ours, target, theirs, reverse, tau)
    return out, tokens * error + logits * divergence


def recalibration(
    out: Tensor, ours: list[Tensor], target: Tensor, theirs: list[Tensor], reverse: nn.ModuleList, tau: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The two terms of `frd`, not weighted: of the patches `[B, N, C]` of every block, and of the logits `[B, K]`."""
    if not len(ours) == len(theirs) == len(reverse):
        raise VitreousError(
            f"the student has {len(ours)} blocks and {len(reverse)} reverse modules, the teacher {len(theirs)} blocks"
        )
    error = out.new_zeros(())
    for i, (module, slimmed, whole) in enumerate(zip(reverse, ours, theirs, strict=True)):
        guess = module(slimmed)
        if guess.shape != whole.shape:
            raise VitreousError(
                f"after block {i} the student gives patches {list(guess.shape[1:])} and the teacher {list(whole.shape[1:])}: "
                "the teacher must be the model that was slimmed"
            )
        error = error + F.mse_loss(guess, whole) / len(ours)
    log_ours, log_theirs = (F.log_softmax(two(y) / tau, 1) for y in (out, target))
    return error, F.kl_div(log_ours, log_theirs, reduction="batchmean", log_target=True) * tau**2


def patches_of_blocks(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the model answers, and the patches `[B, N, C]` that leave each of its blocks."""
    anatomy, seen = read(model), cast(list[Tensor], [])
    hooks = [
        model.get_submodule(b.name).register_forward_hook(lambda _, __, out: seen.append(Tokens.of(out).x[:, anatomy.prefix :]))
        for b in anatomy.blocks
    ]
    try:
        return model(x), seen
    finally:
        for hook in hooks:
            hook.remove()
