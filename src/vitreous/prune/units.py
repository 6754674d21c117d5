"""What can be removed from a plain vision transformer so that a dense, smaller one is left, and what each unit is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..blocks import PlainBlock
from .cut import layers_of, units_stand_alone

KINDS = ("embedding", "heads", "qk", "v", "mlp")

# A parameter, and the view of it (or of anything of its shape) whose first axis is the units.
Part = tuple[Tensor, Callable[[Tensor], Tensor]]


@dataclass
class Structure:
    """Units of one kind: "embedding" of the whole model (`block` None), the others of one block.

    scored: what belongs to a unit and says how much it matters. zeroed: what goes with it beside that.
    """

    kind: str
    block: int | None
    size: int
    scored: list[Part]
    zeroed: list[Part] = field(default_factory=list)

    def first_order(self) -> Tensor:
        """`[size]`, in float64: Σ w·g over what belongs to each unit, from the gradients that the parameters hold."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for p, view in self.scored:
            if p.grad is not None:
                product = view(p.detach().double() * p.grad.double())
                total += product.reshape(self.size, -1).sum(1).cpu()
        return total

    @torch.no_grad()
    def zero(self, gone: Tensor) -> None:
        """Set all of the units `gone` `[size]` to zero."""
        for p, view in (*self.scored, *self.zeroed):
            view(p.data)[gone.to(p.device)] = 0


def structures(blocks: Sequence[PlainBlock], kinds: Sequence[str], around: Sequence[Part] = ()) -> list[Structure]:
    """All structures of the given kinds, in the order embedding, then heads, QK, V and MLP of each block.

    Queries, keys and values are made by layers of their own (`cut.separate`). `around`: what belongs to a residual channel
    outside of the blocks, the layer that embeds patches first. What cannot go without changing the rest is left out: heads that
    are normalised together, dimensions that are normalised or turned, hidden units that are.
    """
    found: list[Structure] = []
    if "embedding" in kinds and around:
        found.append(_embedding(blocks, around))
    for i, block in enumerate(blocks):
        attn = cast(Any, block.attn)
        h, plain = attn.num_heads, lambda name, attn=attn: isinstance(getattr(attn, name, nn.Identity()), nn.Identity)
        q, k, v = attn.q_proj, attn.k_proj, attn.v_proj
        gates = _rows(attn.gate) if getattr(attn, "gate", None) is not None else []
        if "heads" in kinds and plain("norm") and h > 1:
            of = lambda t, h=h: t.unflatten(0, (h, -1))
            columns = [(attn.proj.weight, lambda t, h=h: t.T.unflatten(0, (h, -1)))]
            found.append(Structure("heads", i, h, _viewed([q, k, v], of), [*_view(gates, of), *columns]))
        turns = attn.position is not None and attn.position.argument != ""
        if "qk" in kinds and plain("q_norm") and plain("k_norm") and not turns:
            of = lambda t, h=h: t.unflatten(0, (h, -1)).transpose(0, 1)
            found.append(Structure("qk", i, q.out_features // h, _viewed([q], of), _viewed([k], of)))
        if "v" in kinds and plain("norm"):
            of = lambda t, h=h: t.unflatten(0, (h, -1)).transpose(0, 1)
            columns = [(attn.proj.weight, lambda t, h=h: t.T.unflatten(0, (h, -1)).transpose(0, 1))]
            found.append(Structure("v", i, v.out_features // h, _viewed([v], of), [*_view(gates, of), *columns]))
        layers = layers_of(cast(nn.Module, block.mlp))
        if "mlp" in kinds and layers is not None and units_stand_alone(cast(nn.Module, block.mlp)):
            first, last = layers
            size = last.in_features
            # A layer of twice as many outputs has each unit's gate in its second half.
            of = lambda t, size=size: t.unflatten(0, (-1, size)).transpose(0, 1)
            found.append(Structure("mlp", i, size, _viewed(first, of), [(last.weight, lambda t: t.T)]))
    return found


def _embedding(blocks: Sequence[PlainBlock], around: Sequence[Part]) -> Structure:
    """A residual channel: the patches' layer, what each block reads of it and adds to it; norms, scales and tokens along."""
    same, columns = lambda t: t, lambda t: t.T
    matrix = next(i for i, (p, _) in enumerate(around) if p.ndim > 1)
    scored = [around[matrix], *(a for a in around[matrix + 1 : matrix + 2] if a[0].ndim == 1)]
    zeroed = [a for a in around if not any(a is s for s in scored)]
    for block in blocks:
        attn, mlp = cast(Any, block.attn), layers_of(cast(nn.Module, block.mlp))
        assert mlp is not None
        for writes in (attn.proj, mlp[1]):
            scored += _view(_rows(writes), same)
        for reads in (attn.q_proj, attn.k_proj, attn.v_proj, *mlp[0]):
            scored.append((reads.weight, columns))
        zeroed += _view(block_vectors(block), same)
    return Structure("embedding", None, around[matrix][0].shape[0], scored, zeroed)


def block_vectors(block: PlainBlock) -> list[nn.Parameter]:
    """What a block holds for each residual channel beside its layers: norms and layer scales."""
    held = [getattr(block, name, None) for name in ("norm1", "norm2", "ls1", "ls2")]
    found = [p for m in held if isinstance(m, nn.Module) for p in m.parameters()]
    return found + [p for p in block.parameters(recurse=False)]


def around(model: nn.Module, blocks: Sequence[PlainBlock], x: Tensor) -> dict[str, int]:
    """What belongs to the residual channels outside of the blocks: modules and parameters by name, and the axis of each.

    The last layer that embeds patches comes first. Found by who runs before and after the blocks on an image `x` `[1, C, H, W]`.
    Empty where something else than norms, tokens and linear layers reads or makes channels: then none can go.
    """
    width, inside = cast(Any, blocks[0].attn).proj.out_features, {m for b in blocks for m in b.modules()}
    names = {m: n for n, m in model.named_modules() if m not in inside and next(m.parameters(recurse=False), None) is not None}
    order: list[nn.Module] = []
    handles = [m.register_forward_pre_hook(lambda m, _: order.append(m)) for m in (*names, blocks[0])]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, int] = {}
    if blocks[0] not in order or set(names) - set(order) or any(layers_of(cast(nn.Module, b.mlp)) is None for b in blocks):
        return {}
    before = order[: order.index(blocks[0])]
    embeds = [m for m in before if isinstance(m, (nn.Linear, nn.Conv2d))][-1:]
    stem = before[: before.index(embeds[0])] if embeds else []
    for module, name in names.items():
        held = dict(module.named_parameters(recurse=False))
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if module in stem:
                continue
            axis = 0 if module in before else 1
            if module.weight.shape[axis] != width:
                return {}
            found[name] = axis
        elif all(p.ndim == 1 for p in held.values()):
            if module in stem:
                continue  # of a convolution before the last, whose channels are others
            if any(len(p) != width for p in held.values()):
                return {}
            found[name] = 0
        elif all(p.shape[-1] == width for p in held.values()):
            found |= {f"{name}.{n}".strip("."): p.ndim - 1 for n, p in held.items()}
        else:
            return {}
    return {names[embeds[0]]: 0, **found} if embeds else {}


def parts_of(model: nn.Module, found: dict[str, int]) -> list[Part]:
    """The parameters that `around` found, as parts of channels."""
    made: list[Part] = []
    for name, axis in found.items():
        owner, _, last = name.rpartition(".")
        held = getattr(model.get_submodule(owner), last)
        view = lambda t, axis=axis: t.movedim(axis, 0)
        held = [held] if isinstance(held, nn.Parameter) else [p for p in held.parameters(recurse=False) if p.ndim > axis]
        made += _view(held, view)
    return made


def _rows(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in (layer.weight, layer.bias) if isinstance(p, nn.Parameter)]


def _view(parameters: Sequence[Tensor], view: Callable[[Tensor], Tensor]) -> list[Part]:
    return [(p, view) for p in parameters]


def _viewed(layers: Sequence[nn.Module], view: Callable[[Tensor], Tensor]) -> list[Part]:
    return _view([p for layer in layers for p in _rows(layer)], view)
