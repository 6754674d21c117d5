"""Two transformers made alike, unit by unit: which permutations leave a transformer as it is, and how they are found."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import PlainBlock, plain_blocks, shared_copy
from ..errors import VitreousError
from ..outputs import answer
from ..steps import History, history_of, remember
from .merging import Kitchen, State, mean_of

if TYPE_CHECKING:
    from .pleas import PLeaS

SAMPLES = 4096  # tokens whose activations are compared


class Units:
    """A model in plain blocks on its own weights, and what it does on images."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        self.plain = shared_copy(model)
        self.blocks = plain_blocks(self.plain, "PLeaS")
        self.mlps = [_two_layers(b) for b in self.blocks]
        self.layers: dict[str, nn.Linear] = {}
        for i, (block, (first, last)) in enumerate(zip(self.blocks, self.mlps, strict=True)):
            attn: Any = block.attn
            for name in ("qkv", "q_proj", "k_proj", "v_proj", "proj"):
                if isinstance(getattr(attn, name, None), nn.Linear):
                    self.layers[f"{i}.{name}"] = getattr(attn, name)
            self.layers |= {f"{i}.first": first, f"{i}.last": last}

    @torch.no_grad()
    def seen(self) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Tensor], Tensor]:
        """Inputs and outputs of the layers, and what leaves each block, of the same tokens in any model; the answers."""
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        streams: list[Tensor] = []
        pick = lambda t: t.flatten(0, -2)[:: max(1, t.flatten(0, -2).shape[0] // SAMPLES)]
        handles = [
            layer.register_forward_hook(lambda _, given, out, n=name: kept.update({n: (pick(given[0]), pick(out))}))
            for name, layer in self.layers.items()
        ]
        handles += [b.register_forward_hook(lambda _, __, out: streams.append(pick(out))) for b in self.blocks]
        try:
            out = answer(self.plain(self.images))
        finally:
            for handle in handles:
                handle.remove()
        return kept, streams, out


def aligned(states: Sequence[State], kitchen: Kitchen, how: PLeaS) -> State:
    """See `PLeaS`."""
    from .pleas import joined, least_squares, match, similarity, split, together

    assert kitchen.model is not None and kitchen.batches is not None
    images = torch.cat([x for x, _ in kitchen.batches()])[: how.images]
    both = []
    for state in states:
        model = copy.deepcopy(kitchen.model)
        model.load_state_dict(state, strict=False)
        both.append(Units(model.eval(), images))
    one, two = both
    _, streams, _ = one.seen()
    _, theirs, before = two.seen()
    order = match(sum((similarity(a, b) for a, b in zip(streams, theirs, strict=True)), torch.zeros(())))
    _permute_stream(two, order)
    (here, _, _), (there, _, _) = one.seen(), two.seen()
    splits = []
    for i, block in enumerate(two.blocks):
        _permute_heads(cast(Any, block.attn), i, here, there)
        sides = ((f"{i}.first", 1), (f"{i}.last", 0))  # before and after the activation, as the official code
        alike = torch.stack([similarity(here[n][k], there[n][k]) for n, k in sides]).sum(0)
        splits.append(split(alike, match(alike), how.ratio))
    (here, _, _), (there, _, after) = one.seen(), two.seen()
    if (after - before).abs().max() > 1e-2 * before.abs().max():
        raise VitreousError("PLeaS cannot reorder this architecture without changing its answers: merge models of plain blocks")
    made = mean_of([u.model.state_dict() for u in both])
    made = {k: v for k, v in made.items() if k in states[0]}
    names = {id(p): n for n, p in one.model.named_parameters()}
    error = [0.0, 0.0]
    for key, a in one.layers.items():
        b, units = two.layers[key], splits[int(key.split(".")[0])]
        out, into = (units if key.endswith(end) else None for end in ("first", "last"))
        (xa, za), (xb, zb) = here[key], there[key]
        bias_a, bias_b = (m.bias if m.bias is not None else m.weight.new_zeros(m.out_features) for m in (a, b))
        fitted = {"weight": joined(a.weight.detach(), b.weight.detach(), out, into), "bias": joined(bias_a, bias_b, out).detach()}
        if how.squares and a.bias is not None:
            x = (xa + xb) / 2 if into is None else together(xa, xb, into)
            z = (za + zb) / 2 if out is None else together(za, zb, out)
            far = lambda f, x=x, z=z: float((x @ f["weight"].mT + f["bias"] - z).square().mean() / z.square().mean())
            error[0] += far(fitted) / len(one.layers)
            fitted = least_squares(x, z, fitted["weight"], fitted["bias"], ridge=1e-3)
            error[1] += far(fitted) / len(one.layers)
        for part, value in fitted.items():
            if getattr(a, part) is not None:
                made[names[id(getattr(a, part))]] = value
    if how.ratio:
        _widen(kitchen.model, one, made, names)
    if how.squares:
        kitchen.say(f"error of the layers' outputs, of their mean square: {error[0]:.3f} matched, {error[1]:.3f} fitted")
    return made


def _two_layers(block: PlainBlock) -> tuple[nn.Linear, nn.Linear]:
    found = [m for m in cast(nn.Module, block.mlp).modules() if isinstance(m, nn.Linear)]
    if len(found) != 2 or found[0].out_features != found[1].in_features:
        raise VitreousError(f"PLeaS matches the hidden units between two linear layers, and '{block.name}' has another MLP")
    return found[0], found[1]


@torch.no_grad()
def _permute_stream(units: Units, order: Tensor) -> None:
    """Reorder the channels that all blocks share, in every weight that reads or writes them."""
    width, inside = len(order), set()

    def axis(p: Tensor | None, at: int) -> None:
        if p is not None:
            p.copy_(p.index_select(at, order))

    for block, (first, last) in zip(units.blocks, units.mlps, strict=True):
        attn: Any = block.attn
        for name in ("qkv", "q_proj", "k_proj", "v_proj", "gate"):
            if isinstance(getattr(attn, name, None), nn.Linear):
                axis(getattr(attn, name).weight, 1)
        for layer in (attn.proj, last):
            axis(layer.weight, 0)
            axis(layer.bias, 0)
        axis(first.weight, 1)
        held = {id(p) for m in (attn, cast(nn.Module, block.mlp)) for p in m.parameters()}
        for p in block.parameters():
            if id(p) not in held and p.shape == (width,):
                axis(p, 0)
        inside |= {id(p) for p in block.parameters()}
    head = read(units.model).classifier
    for name, p in units.model.named_parameters():
        if id(p) in inside:
            continue
        if name == f"{head}.weight":
            axis(p, 1)
        elif name != f"{head}.bias" and width in p.shape:
            axis(p, p.shape.index(width))


@torch.no_grad()
def _permute_heads(attn: Any, i: int, here: dict[str, tuple[Tensor, Tensor]], there: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Whole heads, then in each head the channels that values and projection share, and those that queries and keys share."""
    from .pleas import match, similarity

    heads = attn.num_heads
    a, b = (t[f"{i}.proj"][0].unflatten(1, (heads, -1)) for t in (here, there))
    inner = [[similarity(a[:, g], b[:, h]) for h in range(heads)] for g in range(heads)]
    paired = [[match(s) for s in row] for row in inner]
    worth = torch.tensor(
        [[float(s.gather(1, p[:, None]).sum()) for s, p in zip(*r, strict=True)] for r in zip(inner, paired, strict=True)]
    )
    chosen, d = match(worth), a.shape[2]
    values = torch.cat([chosen[g] * d + paired[g][int(chosen[g])] for g in range(heads)])
    asks = torch.cat([chosen[g] * d + torch.arange(d) for g in range(heads)])
    fused = getattr(attn, "qkv", None) is not None
    if attn.position is None and isinstance(getattr(attn, "q_norm", nn.Identity()), nn.Identity):
        get = lambda t, n: t[f"{i}.qkv"][1].chunk(3, -1)["qk".index(n)] if fused else t[f"{i}.{n}_proj"][1]
        q1, k1, q2, k2 = (get(t, n).unflatten(1, (heads, -1)) for t in (here, there) for n in "qk")
        one, two = torch.cat([q1, k1]), torch.cat([q2, k2])
        both = [similarity(one[:, g], two[:, int(h)]) for g, h in enumerate(chosen)]
        asks = torch.cat([h * d + match(s) for h, s in zip(chosen, both, strict=True)])
    rows = {"q": asks, "k": asks, "v": values}
    if fused:
        n = heads * d
        order = torch.cat([asks, asks + n, values + 2 * n])
        for p in (attn.qkv.weight, attn.qkv.bias):
            if p is not None:
                p.copy_(p[order])
    else:
        for name, order in rows.items():
            for p in getattr(attn, f"{name}_proj").parameters():
                p.copy_(p[order])
    for name, order in rows.items():
        if isinstance(p := getattr(attn, f"{name}_bias", None), Tensor):
            p.copy_(p[order])
    attn.proj.weight.copy_(attn.proj.weight[:, values])


def _widen(model: nn.Module, units: Units, made: State, names: dict[int, str]) -> None:
    """Give the MLPs of `model`, in place, the sizes of their merged weights, and let a model of timm's know itself by them."""
    ratio = 0.0
    for first, last in units.mlps:
        for layer in (first, last):
            name = names[id(layer.weight)].removesuffix(".weight")
            weight = made[f"{name}.weight"]
            new = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None).to(weight)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
        ratio = (made[names[id(first.weight)]].shape[0] + 0.5) / first.in_features
    history = history_of(model)
    if history.base is not None:
        kwargs = {**history.base["kwargs"], "mlp_ratio": ratio}
        remember(model, History({**history.base, "kwargs": kwargs}, history.done))
