"""Layer-wise relevance propagation: the rules of the paper, and the pass that follows them.

Chefer, Gur & Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), section 3.1. The model runs
once, under a `TorchFunctionMode` that lets the backward pass of what it calls go, as wanted, through the operation, which
gives gradients, or around it by the rule of relevance. So tokens are cut, joined and moved as their gradients would be,
and no forward is copied. A call for which there is no rule is an error, never a wrong map.

Relevance is told in shares of the explained score: 1 enters at the output. The rules, where c are the contributions that
sum to y = Σc, and R is the relevance of y:

- linear layers (eq. 5): those with c > 0 share R by their size; biases get none.
- sums and products of two activations (eq. 7 to 10): contributions of the sign of y share R by their size; of a product,
  each factor takes half. The paper lets all contributions share by c / y, negative ones too, and brings the two sums
  back to their total after. Where contributions cancel, that divides by almost nothing: in float32 its maps are
  rounding noise. Without cancelling there is no difference.
- what reads the image, a convolution or a linear layer (the z^B rule of Montavon et al., "Explaining Nonlinear Classification
  Decisions with Deep Taylor Decomposition", 2017): as linear layers, counted from each image's own least and greatest value.
- all that works on one value or norms a token passes R on; means, variances and norms of a token get none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, read
from ..blocks import plain_blocks
from ..copies.own import still
from ..errors import VitreousError
from ..outputs import answer
from ..score import Target, criterion
from .tape import ELSEWHERE, Tape

LOST = 0.5  # of the relevance: so much has never come through biases alone


@dataclass(frozen=True)
class Relevance:
    """Relevances of a batch, in shares of the explained `score`: times it, they are parts of it."""

    score: Tensor  # [B]: the logit of the target, or what `vitreous.score` makes of features
    pixels: Tensor  # [B, C, H, W]
    entering: Tensor  # [B, N]: of each token, prefix tokens first, as it enters the first block; sums to 1
    leaving: Tensor  # [B, N]: as it leaves the last block
    layers: dict[str, Tensor]  # [B]: what passes each linear layer, and the products "….attn.qk" and "….attn.av"
    attention: dict[str, Tensor]  # [B, heads, N, N] of each attention's probabilities; sums to half of its product's
    gradients: dict[str, Tensor]  # of the score, for the same probabilities; empty when not asked for


def relevance(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    gradients: bool = False,
    anatomy: Anatomy | None = None,
    published: bool = False,
) -> Relevance:
    """Where the score of `target` came from.

    Costs the multiplications of some four forward passes, with gradients five. Some hundred megabytes are kept of an image
    in a ViT-S: take a few at a time. Parameters receive no gradients; models in half precision run in float32.

    Args:
        x: images `[B, C, H, W]`, each explained as if it were alone.
        target: class index for all images, or `[B]`; the predicted class by default. Features are explained as
            `vitreous.score` tells, feature by feature its square, unless an index is given.
        gradients: also the gradients of the score for the attention probabilities.
        anatomy: what `anatomy.read` says of the model, where it has been read already.
        published: sums and products of two activations by the paper's own rules, in float64, without which they are noise.

    Raises `VitreousError` for models whose blocks are not plain, for unknown targets, and naming the function for which
    there is no rule.
    """
    anatomy = anatomy or read(model)
    anatomy.require_plain("layer-wise relevance propagation")
    explain = criterion(model, x)
    ends: list[Tensor] = []  # the tokens before the first and after the last block

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ends.append(next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)))

    def after(_: nn.Module, __: Any, out: Any) -> None:
        ends.append(out[0] if isinstance(out, tuple) else out)

    with still(model) as own, torch.enable_grad():
        _lay_out(own, model, anatomy)
        dtype = torch.float64 if published else next((p.dtype for p in own.parameters() if p.is_floating_point()), torch.float32)
        held = (*own.named_parameters(), *own.named_buffers())
        state = {n: t.detach().to(dtype) if t.is_floating_point() else t for n, t in held}
        weights = {id(t): n.rpartition(".")[0] for n, t in state.items()}
        image = x.detach().to(dtype).clone().requires_grad_()
        tape = Tape(anatomy.kind, image, [a.name for a in anatomy.attention], weights, published)
        first, last = (own.get_submodule(anatomy.blocks[i].name) for i in (0, -1))
        handles = [first.register_forward_pre_hook(before, with_kwargs=True), last.register_forward_hook(after)]
        try:
            with tape:
                out = answer(torch.func.functional_call(own, state, (image,)))
            score, start = explain(out, target)
            probs = list(tape.probs.values())
            slopes = torch.autograd.grad(score.sum(), probs, retain_graph=True) if gradients else ()
            tape.way.relevance = True
            pixels, entering, leaving, *maps = torch.autograd.grad(out, [image, *ends, *probs], start)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # a stranger's forward may do anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise VitreousError(f"relevance cannot follow what {anatomy.kind} computes ({reason}): {ELSEWHERE}") from error
        finally:
            for handle in handles:
                handle.remove()
    if bool(((entering.flatten(1).sum(1) - 1).abs() > LOST).any()):
        raise VitreousError(
            f"relevance of {anatomy.kind} is lost on its way: {float(entering.flatten(1).sum(1).min()):.2f} of 1 is left at the "
            f"first block, so something is computed for which the rules do not hold: {ELSEWHERE}"
        )
    return Relevance(
        score.detach(),
        pixels,
        entering.sum(2),
        leaving.sum(2),
        tape.way.layers,
        dict(zip(tape.probs, maps, strict=True)),
        dict(zip(tape.probs, slopes, strict=False)),
    )


def _lay_out(own: nn.Module, model: nn.Module, anatomy: Anatomy) -> None:
    """Blocks that are no modules which run (pairs in a list, as in vit-pytorch) are put together in `own`."""
    for block in anatomy.blocks:
        if len(getattr(own.get_submodule(block.name), "reducers", ())):
            raise VitreousError(f"relevance needs all tokens to the end, and '{block.name}' drops or merges some: {ELSEWHERE}")
    if any(isinstance(own.get_submodule(b.name), nn.ModuleList) for b in anatomy.blocks):
        if own is model:
            raise VitreousError(f"relevance needs a copy of {anatomy.kind}'s modules, which refuses to be copied: {ELSEWHERE}")
        plain_blocks(own, "layer-wise relevance propagation")
