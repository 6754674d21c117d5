"""Stop a multi-exit model at the first confident exit, with thresholds that keep a budget.

The procedure is that of Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018,
section 4, as Dynamic Perceiver uses it: a share of images is planned for each exit, geometric in the exit's number, and an
exit's threshold is the confidence of the last image of its share, among held-out images that no earlier exit took. Dynamic
Perceiver's official code then holds back some exits (`HELD`), and hands what they give up to those behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import VitreousError
from ..macs import CountMacs
from .dyn_perceiver import DynPerceiver

HELD = (0.85, 1.0, 0.5, 1.0)  # factors on the planned shares of the four exits: early, attention, convolution, merged


@dataclass(frozen=True)
class Calibration:
    """What the thresholds do on the images that they were calibrated on.

    shares: of the images that stop at each exit. macs: multiply-accumulates of one image up to each exit.
    expected: mean MACs of an image.
    """

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    macs: tuple[int, ...]
    expected: float


@dataclass(frozen=True)
class Decision:
    """One image, classified dynamically: logits [1, K] of the exit (0 to 3) that was confident, and the MACs up to it."""

    logits: Tensor
    exit: int
    confidence: float
    macs: int


def exit_macs(model: DynPerceiver, shape: Sequence[int]) -> tuple[int, ...]:
    """Multiply-accumulates of one image of `shape` (C, H, W) up to each exit, counted from the operators that run."""
    x = model.latent.detach().new_zeros(1, *shape)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), CountMacs() as count:
            return tuple(count.total for _ in model.exits(x))
    finally:
        model.train(training)


def calibrate_exits(
    model: DynPerceiver,
    images: Tensor | Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    budget: float | None = None,
    shares: Sequence[float] | None = None,
) -> Calibration:
    """Set `model.thresholds` for a mean of `budget` MACs an image, or for given `shares` of images at each exit.

    Args:
        images: held-out images [N, C, H, W] of one size, or batches of them, with or without labels (which are not used);
            not the ones that accuracy is then measured on.
        budget: the largest mean MACs; of the planned distributions the costliest within it is taken. One that is too small for
            any of them, as `HELD` sends images past the first exit, is planned without `HELD`.
        shares: four, not negative, that sum to 1.

    Raises VitreousError when neither or both are given, and for a budget below the first exit's own MACs.
    """
    if (budget is None) == (shares is None):
        raise VitreousError("calibrate_exits needs either a budget in MACs or the shares of the exits")
    confidence, macs = _confidence(model, images)
    costs = torch.tensor(macs, dtype=torch.float64)
    if shares is not None:
        plan = torch.tensor([float(s) for s in shares], dtype=torch.float64)
        if len(plan) != len(costs) or (plan < 0).any() or abs(plan.sum() - 1) > 1e-6:
            raise VitreousError(
                f"shares {list(shares)} are no distribution over {len(costs)} exits: give that many that sum to 1"
            )
        thresholds, stopped = _thresholds(confidence, plan)
    else:
        assert budget is not None
        if budget < macs[0]:
            raise VitreousError(f"a budget of {budget:g} MACs is below the first exit's {macs[0]}: choose a smaller model")
        low, high = -40.0, 40.0  # of the logarithm of the ratio between two exits' shares; low stops all images at once
        held = HELD
        thresholds, stopped = _thresholds(confidence, _planned(low, held))
        if stopped @ costs > budget:
            held = (1.0,) * len(costs)
            thresholds, stopped = _thresholds(confidence, _planned(low, held))
        for _ in range(30):
            middle = (low + high) / 2
            tried = _thresholds(confidence, _planned(middle, held))
            if tried[1] @ costs <= budget:
                low, (thresholds, stopped) = middle, tried
            else:
                high = middle
    model.thresholds.copy_(thresholds)
    return Calibration(tuple(thresholds.tolist()), tuple(stopped.tolist()), macs, (stopped @ costs).item())


@torch.no_grad()
def dynamic(model: DynPerceiver, x: Tensor) -> Decision:
    """Classify one image [1, C, H, W], stopping at the first exit as confident as its threshold; what lies behind it is not
    computed. Raises VitreousError for more than one image, since a batch would wait for its slowest, and in training mode."""
    if x.ndim != 4 or len(x) != 1:
        raise VitreousError(f"dynamic takes one image [1, C, H, W], not {list(x.shape)}: call it for each")
    if model.training:
        raise VitreousError("the model is in training mode: call model.eval() first")
    thresholds = model.thresholds.tolist()
    shape = tuple(x.shape[1:])
    if shape not in model.counted:
        model.counted[shape] = exit_macs(model, shape)
    for i, logits in enumerate(model.exits(x)):
        sure = _sureness(logits.float(), model.multi_label).item()
        if sure >= thresholds[i] or i == len(thresholds) - 1:
            return Decision(logits, i, sure, model.counted[shape][i])
    raise AssertionError("the last exit takes every image")


@torch.no_grad()
def _confidence(model: DynPerceiver, images: Tensor | Iterable[Tensor | tuple[Tensor, Tensor]]) -> tuple[Tensor, tuple[int, ...]]:
    """How sure each exit is of each image, [exits, N], and the MACs up to each."""
    batches = images.split(64) if isinstance(images, Tensor) else images
    found: list[Tensor] = []
    shape: tuple[int, ...] | None = None
    training = model.training
    model.eval()
    try:
        for batch in batches:
            x = (batch if isinstance(batch, Tensor) else batch[0]).to(model.latent)
            if shape not in (None, tuple(x.shape[1:])):
                raise VitreousError(f"images of {shape} and of {tuple(x.shape[1:])} cost differently: give one size")
            shape = tuple(x.shape[1:])
            found.append(torch.stack([_sureness(logits.double(), model.multi_label) for logits in model.exits(x)]).cpu())
    finally:
        model.train(training)
    if shape is None or not sum(f.shape[1] for f in found):
        raise VitreousError("there are no images to calibrate on")
    return torch.cat(found, dim=1), exit_macs(model, shape)


def _sureness(logits: Tensor, multi_label: bool) -> Tensor:
    """[N], the probability of what [N, K] logits answer: of the likeliest class; where each class is a question of its own, and
    with one logit, whose softmax is always 1, of the least certain yes or no."""
    if multi_label or logits.shape[1] == 1:
        return logits.abs().sigmoid().amin(1)
    return logits.softmax(1).amax(1)


def _planned(log_ratio: float, held: Sequence[float]) -> Tensor:
    """Shares in which every exit takes exp(log_ratio) times what the one before it does, each then multiplied by its factor.

    What an exit gives up goes to those behind it, in proportion to their shares.
    """
    shares = (log_ratio * torch.arange(len(held), dtype=torch.float64)).softmax(0)
    for i, factor in enumerate(held[:-1]):
        given_up = (1 - factor) * shares[i]
        shares[i] -= given_up
        behind = shares[i + 1 :]
        # Behind a steep fall nothing may be left to be in proportion to: then the next exit takes all.
        behind += given_up * (behind / behind.sum() if behind.sum() > 0 else torch.eye(len(behind), dtype=torch.float64)[0])
    return shares


def _thresholds(confidence: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds [exits] by which about the planned `shares` stop at each exit, and the shares that do.

    They are rounded to float32, as the model keeps them, so downwards that they let the same images pass.
    """
    exits, count = confidence.shape
    left = torch.ones(count, dtype=torch.bool)
    thresholds = torch.full((exits,), torch.inf)
    thresholds[-1] = -torch.inf
    stopped = torch.zeros(exits, dtype=torch.float64)
    for k in range(exits):
        take = min(int(shares[k] * count + 1e-9), int(left.sum()))
        if k < exits - 1 and take:
            at = confidence[k][left].sort(descending=True).values[take - 1]
            single = at.float()
            thresholds[k] = torch.nextafter(single, torch.tensor(-torch.inf)) if single > at else single
        out = left & (confidence[k] >= thresholds[k])
        stopped[k] = out.sum() / count
        left &= ~out
    return thresholds, stopped
