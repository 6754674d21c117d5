"""The model as an ensemble of paths: what each attention and each MLP says to the classifier, and what is lost without it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..anatomy import Anatomy, read
from ..anatomy.parts import branch
from ..copies.own import still
from ..errors import VitreousError
from ..outputs import embeds
from ..score import two
from .stream import Images, Means, batches, fitting, interval, tell
from .tail import Placed, Trunk, lay_out, trunk

MEASURES = (
    "contribution", "loss_without_direct", "accuracy_without_direct", "loss_without", "accuracy_without",
    "accuracy_up_to", "accuracy_beyond",
)  # fmt: skip


@dataclass(frozen=True)
class Paths:
    """The paths in order of length: 0 the embedding, 2i + 1 the attention and 2i + 2 the MLP of block i. Means over images."""

    images: int
    names: tuple[str, ...]
    accuracy: float
    values: np.ndarray
    """`[7, paths]`, in the order of `MEASURES`:

    - contribution: what the path adds to the logit of the image's class less the mean of all logits, the final norm's
      statistics held as they are. All of them and the constant of norm and classifier sum to the logit itself.
    - loss_without_direct, accuracy_without_direct: cross-entropy gained and accuracy lost when the classifier does not see the
      path, while the later ones still build on it. Negative where the path pulls the answer down.
    - loss_without, accuracy_without: the same when later paths do not see it either; NaN for the embedding.
    - accuracy_up_to, accuracy_beyond: accuracy when the classifier sees only the paths up to this length, and only longer ones.
    """
    low: np.ndarray
    high: np.ndarray

    def rows(self) -> list[dict[str, Any]]:
        """One row a path: length, name, and each measure with the ends of its interval."""
        rows = []
        for length, name in enumerate(self.names):
            row: dict[str, Any] = {"length": length, "name": name}
            for m, measure in enumerate(MEASURES):
                row[measure] = float(self.values[m, length])
                row[f"{measure}_low"] = float(self.low[m, length])
                row[f"{measure}_high"] = float(self.high[m, length])
            rows.append(row)
        return rows


def paths(model: nn.Module, images: Images, labels: Tensor | None = None, batch: int = 16, seed: int = 0) -> Paths:
    """What every path of a classifier contributes, and what is lost without it, over a data set.

    Chang, Wang, Luo, Wang & Shou, "Revisiting Vision Transformer from the View of Path Ensemble" (2023), of which we hold the
    abstract to: a pre-norm transformer is its embedding plus the outputs of all attentions and MLPs, parallel paths of different
    lengths that end at the classifier and also feed the longer ones; some of them pull the answer down. A path's length is the
    number of attentions and MLPs on the longest way through it. The paper's learned weights of paths (EnsembleScale) and its
    self-distillation need training and are not here; `without_paths` prunes paths.

    Args:
        images: `[N, C, H, W]`, or a data set of `vt.data`, whose labels are used; `labels` `[N]` go with a tensor. Without
            labels, the model's own answers are taken for right.

    Raises `VitreousError` for a model without classes, or whose blocks are not plain, drop tokens, or are not one chain.
    """
    anatomy = read(model)
    means, right = Means(seed), 0
    with torch.no_grad(), still(model) as own:
        blocks = _chain(own, model, anatomy, "see.paths")
        for x, y in batches(images, labels, batch, model):
            if not means.n and embeds(model, x):
                raise VitreousError(
                    f"see.paths needs a classifier, and this {anatomy.kind} gives features: open it with num_classes="
                )
            with _opened(own, x, anatomy, blocks) as one:
                found = replace(one, out=two(one.out), tail=lambda last, one=one: two(one.tail(last)))
                y = found.out.argmax(1) if y is None else fitting(y, found.out)
                if y.ndim != 1:
                    raise VitreousError("see.paths needs one class an image, and these labels mark several: leave them out")
                right += int((found.out.argmax(1) == y).sum())
                means.add(_measure(blocks, found, y))
            tell(means.n, images)
    names = ("embedding", *(f"{b.name}.{part}" for b in anatomy.blocks for part in ("attn", "mlp")))
    return Paths(means.n, names, right / means.n, means.mean(), *interval(means.resamples()))


def without_paths(model: nn.Module, x: Tensor, lengths: Iterable[int]) -> Tensor:
    """Outputs `[B, K]` for images `x` when the classifier does not see the paths of these lengths: the paper's path pruning.

    Raises `VitreousError` as `paths` does, and for a length that no path has.
    """
    anatomy = read(model)
    with torch.no_grad(), still(model) as own:
        blocks = _chain(own, model, anatomy, "see.without_paths")
        with _opened(own, x, anatomy, blocks) as found:
            said = _said(found)
            if wrong := [n for n in lengths if not 0 <= n < len(said)]:
                raise VitreousError(f"see.without_paths: paths have lengths 0 to {len(said) - 1}, there is none of {wrong[0]}")
            last = found.stream[-1][:, : found.reads]
            return found.tail(last - sum((said[n] for n in set(lengths)), torch.zeros_like(last)))


def _chain(own: nn.Module, model: nn.Module, anatomy: Anatomy, purpose: str) -> list[Placed]:
    if reason := lay_out(own, model, anatomy):
        raise VitreousError(f"{purpose} needs plain blocks that keep all tokens: {reason}")
    return [Placed(own.get_submodule(b.name)) for b in anatomy.blocks]


@contextmanager
def _opened(own: nn.Module, x: Tensor, anatomy: Anatomy, blocks: list[Placed]) -> Iterator[Trunk]:
    with trunk(own, x, blocks, anatomy.prefix) as found:
        if found is None:
            raise VitreousError(f"{anatomy.kind} does something of its own between its blocks: they are not one sum of paths")
        yield found


def _said(found: Trunk) -> list[Tensor]:
    """What each path adds to the stream, at the tokens `[B, reads, C]` that the classifier reads."""
    before, middle = ([t[:, : found.reads] for t in ts] for ts in (found.stream, found.middle))
    said = [before[0]]
    for i, m in enumerate(middle):
        said += [m - before[i], before[i + 1] - m]
    return said


def _measure(blocks: list[Placed], found: Trunk, y: Tensor) -> Tensor:
    """`[B, 7, paths]`."""
    said, last = _said(found), found.stream[-1][:, : found.reads]
    base = F.cross_entropy(found.out, y, reduction="none"), (found.out.argmax(1) == y).float()

    def lost(out: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(out, y, reduction="none") - base[0], base[1] - (out.argmax(1) == y).float()

    slope = _slope(found, last, y)
    up_to, columns = torch.zeros_like(last), []
    for length, own in enumerate(said):
        up_to = up_to + own
        direct, whole = lost(found.tail(last - own)), (torch.full_like(base[0], torch.nan),) * 2
        if length:
            whole = lost(found.tail(_skip(blocks, found, *divmod(length - 1, 2))))
        sums = [(found.tail(s).argmax(1) == y).float() for s in (up_to, last - up_to)]
        columns.append(torch.stack([(own * slope).sum((1, 2)), *direct, *whole, *sums], 1))
    return torch.stack(columns, 2)


def _skip(blocks: list[Placed], found: Trunk, number: int, part: int) -> Tensor:
    """The last stream when the attention (`part` 0) or the MLP (1) of a block adds nothing."""
    if part:
        x = found.middle[number]
    else:
        x, block = found.stream[number], cast(Any, blocks[number].block)
        x = x + branch(block, 2, block.mlp(block.norm2(x)))
    for later in blocks[number + 1 :]:
        x = later(x)
    return x[:, : found.reads]


def _slope(found: Trunk, last: Tensor, y: Tensor) -> Tensor:
    """The gradient `[B, reads, C]`, at the last stream, of each image's class logit less the mean of its logits."""
    with torch.inference_mode(False), torch.enable_grad(), _HeldNorm():
        at = last.clone().requires_grad_()
        out = found.tail(at)
        return torch.autograd.grad((out.gather(1, y[:, None])[:, 0] - out.mean(1)).sum(), at)[0]


class _HeldNorm(TorchFunctionMode):
    """Norms divide by a constant: with the statistics of the point held, the way to the logits is linear."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (F.layer_norm, F.rms_norm):
            return _held_norm(func is F.layer_norm, *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        return out.detach() if func.__name__ in ("rsqrt", "sqrt") else out  # of a norm that is written out


def _held_norm(
    centred: bool, input: Tensor, normalized_shape: list[int], weight: Any = None, bias: Any = None, eps: float | None = 1e-5
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    x = input - input.mean(axes, keepdim=True) if centred else input
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x / (x.detach().square().mean(axes, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
