"""What share of a model's multiplications is done in few bits, and which layers were left out, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import PlainAttention
from ..calibrate import example
from ..errors import VitreousError
from ..macs import CountMacs
from .layers import FakeQuantizer

NAMED = 3  # layers that are named; of the others only how many there are is told


@dataclass(frozen=True)
class Left:
    """A module whose own multiplications (without those of the modules inside) stay in floats: their share, and why."""

    name: str
    share: float
    why: str


@dataclass(frozen=True)
class Coverage:
    """Shares of a model's multiply-accumulates by the bits of weights and activations, as "W8A8"; "floats" for the rest.

    Integers that a runtime executes and bits that are only simulated are both counted. "W4" has weights in few bits, which are
    multiplied in floats. `left`, the largest share first; `unknown` says why nothing could be counted, else it is empty.
    """

    shares: dict[str, float]
    left: tuple[Left, ...] = ()
    unknown: str = ""

    @property
    def quantized(self) -> float:
        """The share of multiplications whose weights or activations are in few bits."""
        return sum(share for bits, share in self.shares.items() if bits != "floats")

    def __str__(self) -> str:
        if self.unknown:
            return f"coverage unknown: {self.unknown}"
        bits = [f"{_percent(share)} in {bits}" for bits, share in self.shares.items() if bits != "floats"]
        said = f"{', '.join(bits) or 'none'} of the multiplications"
        if not self.left:
            return f"{said}, nothing left in floats"
        reasons: dict[str, list[Left]] = {}
        for one in self.left:
            reasons.setdefault(one.why, []).append(one)
        rest = []
        for why, those in reasons.items():
            more = f" and {len(those) - NAMED} more" if len(those) > NAMED else ""
            rest.append(f"{_percent(sum(t.share for t in those))} {', '.join(t.name for t in those[:NAMED])}{more} ({why})")
        return f"{said}; left in floats: {'; '.join(rest)}"


def coverage(model: nn.Module, images: Tensor | None = None) -> Coverage:
    """Count the multiply-accumulates of `model` on one image by the bits that they are done in.

    images: `[N, C, H, W]`, of which the first is taken; noise of the model's own size when None. Nothing is counted in a model
    that tells of no size, or that does what no counter knows: `unknown` says so.
    """
    own: dict[str, int] = {}
    running: list[list[int]] = []  # of each module at work: where the count stood, and how much was its children's
    try:
        with CountMacs() as count:
            handles = _watch(model, count, running, own)
            training = [m for m in model.modules() if m.training]
            model.eval()
            try:
                x = example(model) if images is None else images[:1]
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    model(x.to(next(model.parameters(), x)))
            finally:
                for handle in handles:
                    handle.remove()
                for m in training:
                    m.training = True
    except VitreousError as reason:
        return Coverage({}, unknown=str(reason))
    total = max(sum(own.values()), 1)
    plain = {b.attention.name: b.why_not for b in read(model).blocks}
    shares: dict[str, float] = {}
    left = []
    for name, macs in own.items():
        for bits, part in bits_of(model.get_submodule(name)).items():
            shares[bits] = shares.get(bits, 0.0) + macs * part / total
            if bits == "floats":
                left.append(
                    Left(name or "the model itself", macs * part / total, _why(model.get_submodule(name), plain.get(name)))
                )
    return Coverage(dict(sorted(shares.items(), key=lambda item: -item[1])), tuple(sorted(left, key=lambda one: -one.share)))


def bits_of(module: nn.Module) -> dict[str, float]:
    """The shares of a module's own multiplications by bits; layers of few bits tell theirs as `low_bits`."""
    if bits := getattr(module, "low_bits", ""):
        return {bits: 1.0}
    if isinstance(module, PlainAttention) and module.operands is not None:
        found: dict[str, float] = {}
        for a, b in (("q", "k"), ("probs", "v")):  # two products of the same size
            pair = module.operands[a], module.operands[b]
            low = all(isinstance(q, FakeQuantizer) for q in pair)
            bits = f"A{pair[0].bits}A{pair[1].bits}" if low else "floats"
            found[bits] = found.get(bits, 0.0) + 0.5
        return found
    return {"floats": 1.0}


def _watch(model: nn.Module, count: CountMacs, running: list[list[int]], own: dict[str, int]) -> list[Any]:
    """Hooks by which `own` gets what each module multiplies itself, by its name."""

    def before(*_: Any) -> None:
        running.append([count.total, 0])

    def after(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            start, inside = running.pop()
            all_of_it = count.total - start
            if running:
                running[-1][1] += all_of_it
            if all_of_it > inside:
                own[name] = own.get(name, 0) + all_of_it - inside

        return hook

    handles = []
    for name, m in model.named_modules():
        if not isinstance(m, torch.jit.ScriptModule):
            handles += [m.register_forward_pre_hook(before), m.register_forward_hook(after(name))]
    return handles


def _why(module: nn.Module, not_plain: str | None) -> str:
    if isinstance(module, PlainAttention):
        return "softmax times values" if module.operands is not None else "products of attention"
    if not_plain is not None:
        return f"attention of a block that is not plain: {not_plain}" if not_plain else "products of attention"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.groups > 1:
            return "convolution in groups"
        if set(module.kernel_size) == {1}:
            return "convolution of single pixels"
        return "patch embedding" if module.kernel_size == module.stride else "convolution over neighbours"
    return type(module).__name__


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
