"""Auto: the published ideas that help on this model, place by place, and the reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..blocks import PlainBlock
from ..outputs import answer
from ..steps import history_of, step
from ..work import tick
from .calibration import watch
from .gptq import patches, second_order_rounding
from .layers import FakeQuantizer, QuantConv2d, Quantizer, QuantLinear, quant_layers
from .linears import attention_blocks
from .posttraining import PostTraining, give_bias
from .reconstruction import Enough, chain, in_floats, record, unchanged

IMAGES = 64  # images whose activations are held at a time; of more, the first
AT_ONCE = 8  # images that run together
PLACES = 6  # of which the inputs are held at a time; a place is what some layers read together
ROWS = 2048  # tokens on which candidates are fitted, and as many on which they are compared
ALPHAS = (0.0, 0.5, 0.75, 1.0)
RIDGE = 1.0  # share of the mean diagonal that holds a corrected weight to the original

Layer = QuantLinear | QuantConv2d


class Balanced(Quantizer):
    """A uniform quantizer of x·factor + offset, `[..., C]` with one factor and offset `[C]` for each channel.

    For inputs of which no layer before can take the factors, as behind a GELU; the weights after it hold the inverse.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, bits: int, inputs: int) -> None:
        super().__init__(bits)
        self.register_buffer("factor", torch.ones(inputs))
        self.register_buffer("offset", torch.zeros(inputs))

    def quantized(self, x: Tensor) -> Tensor:
        return super().quantized((x * self.factor + self.offset).to(x))


@step("quant")
@dataclass(frozen=True)
class Auto(PostTraining):
    """Ours: every linear layer with the combination of published ideas that leaves its output closest to the float model's.

    - *Balance*: channels are centred and divided by the α-th power of their range, so that one scale fits all, and the
      inverse goes into the weights: α = 0 is min-max, 0.5 SmoothQuant with the bias term of MPTQ-ViT, 1 RepQ-ViT. Centre and
      divisor go into the LayerNorm before; before the projection of attention into the rows of the values, which is as exact,
      for the rows of a softmax sum to 1; behind an activation function they are a multiplication and addition of their own.
      Of each place the α is taken that leaves the least error of its output on images that its ranges do not know: what is
      balanced to the last is clipped in every channel there.
    - *Rounding* is GPTQ's, on the inputs that the layer has when all before it is quantized, after the weight moved to the
      least squares fit of the float outputs from these inputs; the bias makes up for what is left of the mean.

    The attention products stay in floats; `softmax=True` quantizes them. Layers outside of the blocks are fitted to their own
    float inputs, as all are where blocks drop or merge tokens or are not plain; without plain blocks α is 0.
    What was chosen for each layer is told by `vt.quant.why(model)`.

    With 8 and 8 bits all of it is deployable: uint8 inputs, int8 weights, static scales. Parameters as at `PostTraining`.
    """

    plans: ClassVar[dict[str, Any]] = {**PostTraining.plans, "why": dict[str, str]}

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        super().build(model, plan)
        for name, layer in quant_layers(model).items():
            give_bias(layer)
            if isinstance(layer, QuantLinear) and plan["layers"][name][0] == "act":
                layer.quant_x = Balanced(layer.quant_x.bits, layer.in_features).to(layer.weight.device)
        if not self.softmax:
            for block in attention_blocks(model):
                block.attn.operands = None

    def fit(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        assert calibration is not None
        images = calibration[:IMAGES].to(next(model.parameters()))
        why: dict[str, str] = {}
        with torch.no_grad():
            if self.softmax:
                fit_products(model, images)
            floats = in_floats(model)
            for module in model.modules():
                if isinstance(module, FakeQuantizer):
                    module.watcher = unchanged
            blocks = chain(floats, images[:1])
            inside = tuple(f"{name}." for name in blocks)
            outside = (
                [name for name in quant_layers(model) if not name.startswith(inside)] if blocks else list(quant_layers(model))
            )
            outside = groups({name: quant_layers(model)[name] for name in outside})
            for start in range(0, len(outside), PLACES):
                at_once(model, floats, outside[start : start + PLACES], images, why)
                tick(0.2 * start / len(outside))
            f = q = None
            for i, name in enumerate(blocks):
                if f is None or q is None:
                    f, q = (record(m, name, images)[0] for m in (floats, model))
                block = cast(PlainBlock, model.get_submodule(name))
                f, q = in_order(block, cast(PlainBlock, floats.get_submodule(name)), f, q, why)
                tick(0.2 + 0.8 * (i + 1) / len(blocks))
            for module in model.modules():
                if isinstance(module, FakeQuantizer):
                    module.watcher = None
        return {"why": why}


def why(model: nn.Module) -> dict[str, str]:
    """What `Auto` chose for each quantized layer of a slimmed model, and what that saved; empty for other models."""
    return {k: v for _, plan in history_of(model).done for k, v in plan.get("why", {}).items()}


# ---- in which order layers are fitted, and to what


def in_order(block: PlainBlock, floats: PlainBlock, f: Tensor, q: Tensor, why: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Fit the layers of a block one after the other, each on what it reads in the quantized model; what comes next `[N, T, C]`.

    f, q: what the block reads in the float and in the quantized model.
    """
    layers = quant_layers(block)
    wanted, after_f = inputs(floats, list(layers), f)
    with ExitStack() as until_then:
        for group in groups({name: layers[name] for name in wanted}):
            given = inputs(block, group[:1], q, whole=False)[0]
            together = [layers[name] for name in group]
            said = fit_layers(together, wanted[group[0]], given[group[0]], taker(block, group[0], together))
            why |= {f"{block.name}.{name}": said for name in group}
            # What is fitted runs once more; of attention all is when its projection is.
            fitted = ["attn"] if group == ["attn.proj"] else [name for name in group if not name.startswith("attn.")]
            for name in fitted:
                until_then.enter_context(replayed(block.get_submodule(name), -(-len(q) // AT_ONCE)))
        return after_f, inputs(block, [], q)[1]


@contextmanager
def replayed(module: nn.Module, batches: int) -> Iterator[None]:
    """`module` runs on the first so many batches, and then gives the same again for each round of them."""
    forward, kept, calls = module.forward, [], count()

    def replay(*given: Any, **named: Any) -> Any:
        i = next(calls) % batches
        if i == len(kept):
            kept.append(forward(*given, **named))
        return kept[i]

    module.forward = replay
    try:
        yield
    finally:
        del module.forward


def at_once(model: nn.Module, floats: nn.Module, places: list[list[str]], images: Tensor, why: dict[str, str]) -> None:
    """Fit layers to what they read in the float model; `places` are whole, for what is before one is changed once."""
    layers = quant_layers(model)
    given, _ = inputs(floats, [group[0] for group in places], images)
    blocks = [m for m in model.modules() if isinstance(m, PlainBlock)]
    for group in places:
        block = next((b for b in blocks if group[0].startswith(f"{b.name}.")), None)
        together = [layers[name] for name in group]
        take = taker(block, group[0].removeprefix(f"{block.name}."), together) if block else None
        why |= dict.fromkeys(group, fit_layers(together, given[group[0]], given[group[0]], take))


def groups(layers: dict[str, Layer]) -> list[list[str]]:
    """Layers that read the same LayerNorm together, in the order in which they run."""
    found: dict[str, list[str]] = {}
    for name, layer in layers.items():
        found.setdefault(getattr(layer, "after", "") or name, []).append(name)
    return list(found.values())


def inputs(module: nn.Module, names: list[str], x: Tensor, whole: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """What the layers read while `module` runs on `x`, `[rows, I]` in the order in which they run; and what it gives.

    Without `whole` the run ends at the first of the layers, and gives nothing.
    """
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name in names:
        layer = module.get_submodule(name)

        def see(layer: Any, given: tuple[Tensor, ...], name: str = name) -> None:
            rows = patches(layer, given[0]) if isinstance(layer, QuantConv2d) else given[0]
            seen.setdefault(name, []).append(rows.flatten(0, -2))
            if not whole:
                raise Enough

        hooks.append(layer.register_forward_pre_hook(see))
    try:
        out = []
        for batch in x.split(AT_ONCE):
            with suppress(Enough):
                out.append(answer(module(batch)))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}, torch.cat(out) if out else x[:0]


def fit_products(model: nn.Module, images: Tensor) -> None:
    """The grids of queries, keys, values and softmax, on their full ranges."""
    for name, seen in watch(model, images).items():
        quantizer = model.get_submodule(name)
        if ".operands." in name and isinstance(quantizer, Quantizer):
            softmax = name.endswith(".probs")  # which lies between 0 and 1
            quantizer.set(*(quantizer.grid(*seen.low.new_tensor([0.0, 1.0])) if softmax else quantizer.grid(seen.low, seen.high)))


# ---- one place


Take = Callable[[Tensor, Tensor], None]


def taker(block: PlainBlock, name: str, layers: list[Layer]) -> Take | None:
    """Who makes the input of `layers` come centred and divided, for `(divisor, centre)` `[I]`; None when nobody can."""
    first = layers[0]
    attn = cast(Any, block.attn)
    if isinstance(first, QuantLinear) and first.after:
        norm = block.get_submodule(first.after.removeprefix(f"{block.name}."))
        assert isinstance(norm, nn.LayerNorm)

        def by_norm(divisor: Tensor, centre: Tensor) -> None:
            norm.weight.div_(divisor)
            norm.bias.sub_(centre).div_(divisor)

        return by_norm
    if isinstance(first.quant_x, Balanced):
        balanced = first.quant_x

        def by_itself(divisor: Tensor, centre: Tensor) -> None:
            balanced.factor.copy_(1 / divisor)
            balanced.offset.copy_(-centre / divisor)

        return by_itself
    plain = isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity) and getattr(attn, "gate", None) is None
    source = attn.qkv if getattr(attn, "qkv", None) is not None else attn.v_proj
    biased = getattr(attn, "v_bias", None) is not None  # added behind the layer, and so not centred with it
    ahead = any(getattr(r, "place", "") == "ahead" for r in block.reducers)
    if name != "attn.proj" or not plain or not isinstance(source, QuantLinear) or biased or ahead:
        return None
    rows = slice(source.out_features - first.weight.shape[1], None)

    def by_values(divisor: Tensor, centre: Tensor) -> None:
        # Weights and scales of the rows together, so that weights on their grid stay there.
        source.weight[rows] /= divisor[:, None]
        source.quant_w.scale[rows] /= divisor
        source.bias[rows] = (source.bias[rows] - centre) / divisor

    return by_values


def fit_layers(layers: list[Layer], wanted: Tensor, given: Tensor, take: Take | None) -> str:
    """Set all that quantizes some layers that read the same, such that they give for `given` what they gave for `wanted`.

    wanted, given: `[rows, I]`, what they read in the float model and with all before them quantized. Returns what was chosen.
    """
    x = layers[0].quant_x
    assert isinstance(x, Quantizer)
    weights = [layer.weight.flatten(1).clone() for layer in layers]
    # Fitted on the first half of the images, compared on the second, which may leave the ranges of the first.
    generator = torch.Generator().manual_seed(0)
    first, second = given.chunk(2) if len(given) > 1 else (given, given)
    low, high = first.aminmax(dim=0)
    one, other = (half[torch.randperm(len(half), generator=generator)[:ROWS].to(half.device)] for half in (first, second))
    fits, truths = [one @ w.T for w in weights], [other @ w.T for w in weights]
    size = sum(float((truth - truth.mean(0)).square().sum()) for truth in truths)
    tried = {}
    for alpha in ALPHAS if take else ALPHAS[:1]:
        divisor, centre = balance(low, high, alpha)
        scale, zero = x.grid(((low - centre) / divisor).amin(), ((high - centre) / divisor).amax())
        seen, new = (on_grid((half - centre) / divisor, scale, zero, x.high) for half in (one, other))
        error = 0.0
        for w, layer, fit, truth in zip(weights, layers, fits, truths, strict=True):
            off = new @ solve(w * divisor, seen, fit, layer.quant_w).T - truth
            error += float((off - off.mean(0)).square().sum())
        tried[alpha] = (error / max(size, 1e-12)) ** 0.5
    alpha = min(tried, key=lambda a: tried[a])
    error = tried[alpha]
    low, high = given.aminmax(dim=0)
    divisor, centre = balance(low, high, alpha)
    scale, zero = x.grid(((low - centre) / divisor).amin(), ((high - centre) / divisor).amax())
    if take:
        take(divisor, centre)
    seen = on_grid((given - centre) / divisor, scale, zero, x.high)
    for w, layer in zip(weights, layers, strict=True):
        assert isinstance(layer.quant_x, Quantizer)
        layer.quant_x.set(scale, zero)
        target = wanted @ w.T
        rounded = solve(w * divisor, seen, target, layer.quant_w)
        layer.weight.copy_(rounded.reshape(layer.weight.shape))
        layer.bias.add_(target.mean(0) - rounded @ seen.mean(0))  # pyright: ignore[reportOptionalMemberAccess]
        layer.quant_x.watcher = layer.quant_w.watcher = None
    versus = f", {100 * tried[0.0]:.1f} % at α = 0" if alpha else ""
    return f"inputs balanced with α = {alpha:g}: its output is {100 * error:.1f} % off{versus}"


def balance(low: Tensor, high: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Divisor and centre `[C]` of each channel; a channel that hardly moves must not blow up its weights."""
    if alpha == 0:
        return torch.ones_like(low), torch.zeros_like(low)
    wide = high - low
    wide = wide.clamp_min(float(1e-4 * wide.mean()) or 1.0)
    return (wide / wide.mean()) ** alpha, (low + high) / 2


def on_grid(x: Tensor, scale: Tensor, zero: Tensor, high: int) -> Tensor:
    return (x / scale).round_().add_(zero).clamp_(0, high).sub_(zero).mul_(scale)


def solve(w: Tensor, seen: Tensor, target: Tensor, quantizer: Quantizer) -> Tensor:
    """The weight `[O, I]` on a grid that gives the `target` `[rows, O]` best, but for its mean, from `seen` `[rows, I]`.

    It starts from `w`, and sets the scales of `quantizer`.
    """
    x, y = seen - seen.mean(0), target - target.mean(0)
    gram = x.T @ x / len(x)
    held = gram + torch.diag((RIDGE * gram.diagonal().mean()).expand(len(gram)))
    if float(held.diagonal().amax()) > 0:
        w = w + torch.cholesky_solve((y.T @ x / len(x) - w @ gram).T, torch.linalg.cholesky(held)).T
    quantizer.set(*quantizer.grid(*w.aminmax(dim=1)))
    return second_order_rounding(w, gram, quantizer)
