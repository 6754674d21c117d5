"""GPUSQ-ViT: a 2:4 sparse model learns from the dense one, then in few bits from the sparse one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..anatomy import read
from ..data import Data
from ..errors import VitreousError
from ..prune import TwoFour
from .batches import Pair
from .engine import train
from .objective import Batch, Now, Objective, Seen, look, need_teacher, objective, positive, same_classes
from .zeros import Masks

IMAGES = 64  # on which stage one's feature losses are measured


def rounded(x: Tensor, scale: Tensor, most: int) -> Tensor:
    """Symmetric integers of at most `most`, times `scale`; the gradient passes as if nothing were rounded (inside the range)."""
    whole = x + ((x / scale).round() * scale - x).detach()
    return whole.clamp(-most * scale, most * scale)


class InBits(TorchFunctionMode):
    """Inside it linear layers and convolutions compute as in `bits`: weights by output channel, inputs by tensor, symmetric."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.most = 2 ** (bits - 1) - 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.conv2d):
            x, w, *rest = args
            scale = lambda t: (t.detach() / self.most).clamp_min(1e-12)
            w = rounded(w, scale(w.abs().flatten(1).amax(1)).view(-1, *[1] * (w.ndim - 1)), self.most)
            args = rounded(x, scale(x.abs().amax()), self.most), w, *rest
        return func(*args, **(kwargs or {}))


@objective
@dataclass(frozen=True)
class GPUSQ(Objective):
    """Yu et al., "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization" (CVPR 2023): for a model that went
    through `prune.TwoFour`, `hard` · cross-entropy + `soft` · KL(teacher ‖ student) + `features` · the mean squared error of
    what leaves each block. Zeros stay zero.

    teacher: in the first stage the dense model, in the second the sparse one. bits: 8 or 4, in the second: layers compute in
    them while it learns; quantize what comes out of it, as by `quant.MinMax`. weights: one for each block's features.

    Without labels there is no hard term, as in the paper's unsupervised form. No code was released: the weights of the terms are
    as we understand the paper, and temperature 1 is our choice.
    """

    teacher: nn.Module | None = field(default=None, compare=False)
    hard: float = 1.0
    soft: float = 10.0
    features: float = 5.0
    temperature: float = 1.0
    bits: int | None = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        positive(self, "temperature")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise VitreousError(f"GPUSQ: bits must be 2 to 8, or left out, not {self.bits}")

    def blocks(self, model: nn.Module) -> Sequence[int]:
        depth = len(read(model).blocks) if self.features else 0
        if self.weights is not None and len(self.weights) != depth:
            raise VitreousError(f"GPUSQ: {len(self.weights)} weights for {depth} blocks: give one for each")
        return range(depth)

    def parts(self, model: nn.Module) -> nn.Module:
        return Masks(model)

    def around(self, now: Now) -> AbstractContextManager[Any]:
        return nullcontext() if self.bits is None else InBits(self.bits)

    def after_step(self, now: Now) -> None:
        assert isinstance(now.parts, Masks)
        now.parts.hold(now.model)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        blocks = tuple(self.blocks(now.model))
        theirs = now.teach(need_teacher(self.teacher, "GPUSQ"), batch.images, ("logits",), blocks)
        same_classes(seen.logits, theirs.logits, "GPUSQ")
        t = self.temperature
        ours, taught = (F.log_softmax(z.float() / t, 1) for z in (seen.logits, theirs.logits))
        terms = {"soft": self.soft * t * t * F.kl_div(ours, taught, reduction="batchmean", log_target=True)}
        if blocks:
            errors = block_errors(seen, theirs)
            weights = errors.new_tensor(self.weights or [1.0] * len(blocks))
            terms["features"] = self.features * (weights * errors).mean()
        if batch.labels is not None and self.hard:
            labels = batch.labels if batch.labels.ndim == 1 else batch.labels.float()
            terms["hard"] = self.hard * F.cross_entropy(seen.logits.float(), labels)
        return terms


def block_errors(ours: Seen, theirs: Seen) -> Tensor:
    """`[blocks]`: the mean squared error of what leaves each. Raises `VitreousError` where tokens differ in number or width."""
    if wrong := [i for i, t in ours.blocks.items() if t.shape != theirs.blocks[i].shape]:
        shapes = [list(s.blocks[wrong[0]].shape[1:]) for s in (ours, theirs)]
        raise VitreousError(f"GPUSQ: block {wrong[0]} gives {shapes[0]}, the teacher's {shapes[1]}: give the dense model itself")
    return torch.stack([F.mse_loss(t.float(), theirs.blocks[i].float()) for i, t in ours.blocks.items()])


@torch.no_grad()
def layer_weights(model: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[float, ...]:
    """The paper's sparse-distillation-aware weights: of each block its feature loss at the end of stage one over their mean, so
    that stage two minds most what sparsity has disturbed. (The paper's exact function is not known to us.)"""
    blocks = range(len(read(model).blocks))
    errors = block_errors(look(model, images, blocks=blocks), look(teacher, images, blocks=blocks))
    return tuple((errors / errors.mean().clamp_min(1e-12)).tolist())


def gpusq(model: nn.Module, data: Data | Pair, *, bits: int = 8, epochs: float = 1, **settings: Any) -> nn.Module:
    """Both stages, each of `epochs`: a 2:4 sparse model that has learnt to compute in `bits`, in floats and in eval mode.

    data, settings: those of `train`. Quantize the result by `quant.MinMax` to ship it, or store it by `prune.write_packed`.
    """
    sparse = train(TwoFour().apply(model), data, GPUSQ(model), epochs=epochs, **settings)
    images = data.tensor(range(min(IMAGES, len(data)))) if isinstance(data, Data) else data[0][:IMAGES]
    aware = layer_weights(sparse, model, images.to(next(sparse.parameters())))
    return train(sparse, data, GPUSQ(sparse, bits=bits, weights=aware), epochs=epochs, **settings)
