"""Reconstruction: part after part, a quantized model learns to give what the float model gives there.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (ICLR 2021), section 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..blocks import PlainBlock
from ..work import part, tick
from .calibration import BATCH
from .layers import FakeQuantizer, Quantizer, QuantLinear, quant_layers

IMAGES = 64  # the first of the calibration images: what a unit reads and gives is kept for all of them, so there is an end

Learn = Callable[[nn.Module, Tensor, Tensor], None]


def unchanged(x: Tensor) -> None:
    """As the `watcher` of a quantizer: lets floats pass."""


def in_floats(model: nn.Module) -> nn.Module:
    """A copy of a quantized model that computes in floats."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, FakeQuantizer):
            m.watcher = unchanged
    return model


def units(model: nn.Module, image: Tensor, blocks: bool = True) -> list[str]:
    """What is reconstructed at a time, in the order in which it runs: plain blocks, and the quantized layers outside of them.

    Layers only, without `blocks` and where a block gives up tokens: the quantized model may give up others than the float model
    does. A layer that runs in pieces is left out.
    """
    whole = blocks and not reduces(model)
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {n: m for n, m in modules.items() if whole and isinstance(m, PlainBlock)}
    inside = tuple(f"{name}." for name in found)
    found |= {n: m for n, m in quant_layers(model).items() if not n.startswith(inside)}
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, _: Any, out: Tensor) -> None:
            split = isinstance(module, QuantLinear) and out.shape[-1] != module.out_features
            if name not in order and not split:
                order.append(name)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in found.items()]
    try:
        with torch.no_grad():
            model(image.to(next(model.parameters())))
    finally:
        for handle in handles:
            handle.remove()
    return order


def reduces(model: nn.Module) -> bool:
    """Whether a block gives up tokens."""
    return any(len(m.reducers) > 0 for m in model.modules() if isinstance(m, PlainBlock))


@torch.no_grad()
def chain(model: nn.Module, image: Tensor) -> list[str]:
    """The names of the plain blocks when each reads just what the one before gives, and all keep every token; else none."""
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, PlainBlock)}
    if reduces(model):
        return []
    read: list[int] = []
    gave: list[Tensor] = []  # kept, so that each id stays its own

    def before(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        read.append(id(given[0]))

    def after(_: nn.Module, __: Any, out: Tensor) -> None:
        gave.append(out)

    hooks = [b.register_forward_pre_hook(before) for b in blocks.values()]
    hooks += [b.register_forward_hook(after) for b in blocks.values()]
    try:
        model(image.to(next(model.parameters())))
    finally:
        for hook in hooks:
            hook.remove()
    return list(blocks) if read[1:] == [id(out) for out in gave[:-1]] and len(read) == len(blocks) else []


@torch.no_grad()
def entering(model: nn.Module, chained: list[str], block: str, held: str, x: Tensor, images: Tensor) -> Tensor:
    """What `block` reads over `images`; `x` is what the block `held` read. Without a name, the images."""
    if not block:
        return images
    if held and chained.index(block) == chained.index(held) + 1:
        return torch.cat([model.get_submodule(held)(batch) for batch in x.split(BATCH)])
    return record(model, block, images)[0]


class Enough(Exception):
    """Raised in a hook: the model need run no further."""


@torch.no_grad()
def record(model: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the module `name` reads and gives over `images`; the model runs no further than there."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append((given[0], out))
        raise Enough

    parameter = next(model.parameters())
    handle = model.get_submodule(name).register_forward_hook(keep)
    try:
        for batch in images.split(BATCH):
            with suppress(Enough):
                model(batch.to(parameter))
    finally:
        handle.remove()
    return torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])


def walk(
    model: nn.Module,
    floats: nn.Module,
    images: Tensor,
    learn: Learn,
    stage: str,
    blocks: bool = True,
    own_inputs: bool = True,
    done: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Call `learn(unit, x, y)` for each of `units`, which shall make the unit give `y` when it reads `x`.

    Args:
        floats: the float model, from which `y` comes; see `in_floats`.
        images: `[N, C, H, W]`; the first `IMAGES` are used.
        stage: the name under which finished units are kept (`work.part`), so that a stopped walk goes on.
        own_inputs: `x` is what the quantized model, learned so far, gives to the unit. Without, and always where blocks give up
            tokens, it is what the float model gives.
        done: the shares of the step that are done before and after, for `work.tick`.
    """
    images = images[:IMAGES]
    names = units(model, images[:1], blocks)
    own_inputs = own_inputs and not reduces(model)

    def make(around: str, inside: str, f: Tensor, q: Tensor) -> dict[str, Tensor]:
        x, y = record(floats.get_submodule(around), inside, f)
        if own_inputs:
            x = record(model.get_submodule(around), inside, q)[0] if inside else q
        unit = model.get_submodule(around).get_submodule(inside)
        learn(unit, x, y)
        return unit.state_dict()

    chained, held, f, q = chain(floats, images[:1]), "", images, images
    for i, name in enumerate(names):
        # Recorded from the block around the unit, so that nothing before it runs again for each unit.
        block = next((b for b in chained if f"{name}.".startswith(f"{b}.")), "")
        if block != held:
            f = entering(floats, chained, block, held, f, images)
            q = entering(model, chained, block, held, q, images) if own_inputs else f
            held = block
        inside = name[len(block) :].removeprefix(".")
        kept = part(f"{stage}-{name}", partial(make, block, inside, f, q))
        model.get_submodule(name).load_state_dict(kept)
        tick(done[0] + (done[1] - done[0]) * (i + 1) / len(names))


@contextmanager
def learning(parameters: list[nn.Parameter]) -> Iterator[None]:
    """They take gradients inside, and are as they were after."""
    flags = [p.requires_grad for p in parameters]
    try:
        with torch.enable_grad():
            for p in parameters:
                p.requires_grad_(True)
            yield
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
            p.grad = None


class OnGrid(torch.autograd.Function):
    """`apply(x, scale, zero_point, low, high)`: torch's fake quantization, in a third of its time on a processor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        zero = zero_point.to(x.dtype)
        wide = (x * scale.reciprocal()).round_().add_(zero)
        q = wide.clamp(low, high)
        ctx.save_for_backward(q.eq(wide))
        return q.sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None, None]:
        return slopes[0] * ctx.saved_tensors[0], None, None, None, None


class Faster(TorchFunctionMode):
    """Inside, `OnGrid` fake-quantizes. Only to learn: exports and relevance know torch's own operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.fake_quantize_per_tensor_affine:
            return OnGrid.apply(*args)
        if func is torch.fake_quantize_per_channel_affine:
            x, scale, zero_point, axis, low, high = args
            across = [-1 if i == axis else 1 for i in range(x.ndim)]
            return OnGrid.apply(x, scale.reshape(across), zero_point.reshape(across), low, high)
        return func(*args, **(kwargs or {}))


def descend(
    unit: nn.Module, x: Tensor, y: Tensor, parameters: list[nn.Parameter], iterations: int, rate: float, batch: int
) -> None:
    """Adam on the squared error of `unit(x)` against `y`, its rate falling from `rate` to 0 along a cosine.

    Each iteration draws `batch` entries of the first dimension of `x` and `y` (images; for layers inside windows, windows), the
    same ones in every call. Weights on symmetric grids are kept within them. When the error over all of `x` did not fall, which
    few iterations at a high rate cannot promise, the parameters stay as they were.
    """
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(iterations, 1))
    generator = torch.Generator().manual_seed(0)
    layers = quant_layers(unit).values()
    start, before = [p.detach().clone() for p in parameters], mean_error(unit, x, y)
    with learning(parameters), Faster():
        for _ in range(iterations):
            rows = torch.randperm(len(x), generator=generator)[:batch].to(x.device)
            loss = F.mse_loss(unit(x[rows]), y[rows])
            for p, slope in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                p.grad = slope
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for layer in layers:
                    keep_within(layer.weight, layer.quant_w)
    with torch.no_grad():
        if not mean_error(unit, x, y) < before:
            for p, was in zip(parameters, start, strict=True):
                p.copy_(was)


@torch.no_grad()
def mean_error(unit: nn.Module, x: Tensor, y: Tensor) -> float:
    with Faster():
        return sum(float((unit(a) - b).square().sum()) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)) / y.numel()


def keep_within(weight: Tensor, quantizer: Quantizer) -> None:
    """Clip, in place, to a symmetric grid, whose limit may be less than its integers hold; others clip by themselves."""
    if quantizer.symmetric and quantizer.watcher is None:
        most = (quantizer.scale * quantizer.limit).reshape(-1, *[1] * (weight.ndim - 1))
        torch.minimum(torch.maximum(weight, -most), most, out=weight)


@torch.no_grad()
def bake(model: nn.Module) -> None:
    """Put the weights of the quantized layers on their grids, where the quantizers leave them."""
    for layer in quant_layers(model).values():
        layer.weight.copy_(layer.quant_w(layer.weight))
