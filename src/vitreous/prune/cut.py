"""Take rows and columns out of a model for good: what is left is an ordinary, smaller model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..blocks import merged, plain_blocks
from ..errors import VitreousError

PARTS = {"qk": ("q", "k"), "v": ("v",)}


def cut_by(model: nn.Module, plan: dict[str, Any], step: str) -> None:
    """Keep in `model`, in place, what `plan` names: "heads", dimensions of "qk" and "v", units of "mlp", by block; residual
    channels "embedding", with what lies "around" the blocks."""
    blocks = plain_blocks(merged(model), step)
    for i, block in enumerate(blocks):
        kept = {kind: plan[kind][str(i)] for kind in ("heads", *PARTS, "mlp") if str(i) in (plan.get(kind) or {})}
        if kept.keys() & PARTS.keys():
            separate(block.attn)
        if "heads" in kept:
            cut_heads(block.attn, kept["heads"], step, block.name)
        for kind, parts in PARTS.items():
            if kind in kept:
                cut_dims(block.attn, parts, kept[kind], step, block.name)
        if "mlp" in kept:
            cut_units(cast(nn.Module, block.mlp), kept["mlp"], step, block.name)
    if plan.get("embedding"):
        try:
            cut_width(model, blocks, plan["embedding"], plan["around"])
        except (AttributeError, IndexError) as error:
            raise VitreousError(f"{step}: the plan is of another model: {error}") from error


def keep(module: nn.Module, index: Tensor, axis: int) -> None:
    """Keep these entries of the parameters of a linear layer, convolution, norm or scale along `axis` of its weight: outputs are
    0, inputs 1. What has one axis, as the bias, goes with the outputs."""
    for name, p in list(module.named_parameters(recurse=False)):
        if p.ndim > axis:
            setattr(module, name, _part(p, index, axis))
    m = cast(Any, module)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]
    elif isinstance(getattr(m, "normalized_shape", None), tuple):
        m.normalized_shape = (len(index),)


def _part(p: nn.Parameter, index: Tensor, axis: int) -> nn.Parameter:
    return nn.Parameter(p.detach().index_select(axis, index.to(p.device)), p.requires_grad)


def separate(attn: Any) -> None:
    """Queries, keys and values by three layers instead of one, so that they may differ in width."""
    if getattr(attn, "qkv", None) is None:
        return
    fused = attn.qkv
    biases = [getattr(attn, f"{part}_bias", None) for part in "qkv"]
    bias = fused.bias if biases[0] is None else torch.cat([cast(Tensor, b) for b in biases])
    size = fused.out_features // 3
    for i, part in enumerate("qkv"):
        rows = slice(i * size, (i + 1) * size)
        made = nn.Linear(fused.in_features, size, bias is not None, device=fused.weight.device, dtype=fused.weight.dtype)
        made.weight = nn.Parameter(fused.weight.detach()[rows].clone(), fused.weight.requires_grad)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach()[rows].clone(), fused.weight.requires_grad)
        setattr(attn, f"{part}_proj", made.train(fused.training))
        if biases[0] is not None:
            setattr(attn, f"{part}_bias", None)
    attn.qkv = None


def cut_heads(attn: Any, heads: Sequence[int], step: str, where: str) -> None:
    """Keep these heads of a plain attention module of ours."""
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        raise VitreousError(f"{step}: block '{where}' normalises all heads together: none can go without changing the rest")
    if not heads or not set(heads) <= set(range(attn.num_heads)):
        raise VitreousError(f"{step}: the plan keeps heads {list(heads)} of block '{where}', which has {attn.num_heads}")
    if len(heads) == attn.num_heads:
        return
    count, kept = attn.num_heads, torch.tensor(sorted(heads))
    rows = lambda size: (kept[:, None] * (size // count) + torch.arange(size // count)).flatten()
    for name in ("q_proj", "k_proj", "v_proj", "gate"):
        if (layer := getattr(attn, name, None)) is not None:
            keep(layer, rows(layer.out_features), 0)
    if getattr(attn, "qkv", None) is not None:
        size = attn.qkv.out_features // 3
        keep(attn.qkv, torch.cat([rows(size) + i * size for i in range(3)]), 0)
    for name in ("q_bias", "k_bias", "v_bias"):
        if (old := getattr(attn, name, None)) is not None:
            new = old.detach()[rows(len(old)).to(old.device)]
            setattr(attn, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    keep(attn.proj, rows(attn.proj.in_features), 1)
    if attn.position is not None:  # tables of positions may know all the heads
        before = attn.kept or range(count)
        attn.kept = [before[h] for h in kept.tolist()]
    attn.num_heads, attn.attn_dim = len(kept), attn.proj.in_features


def cut_dims(attn: Any, parts: Sequence[str], dims: Sequence[int], step: str, where: str) -> None:
    """Keep these dimensions in every head: of `parts` "q" and "k", or of "v" with its columns of the projection."""
    size = getattr(attn, f"{parts[0]}_proj").out_features // attn.num_heads
    if not dims or not set(dims) <= set(range(size)):
        raise VitreousError(f"{step}: the plan keeps dimensions {list(dims)} of block '{where}', whose heads have {size}")
    index = (torch.arange(attn.num_heads)[:, None] * size + torch.tensor(sorted(dims))).flatten()
    for part in parts:
        keep(getattr(attn, f"{part}_proj"), index, 0)
    if "v" in parts:
        if getattr(attn, "gate", None) is not None:
            keep(attn.gate, index, 0)
        keep(attn.proj, index, 1)
        attn.attn_dim = len(index)


def cut_width(model: nn.Module, blocks: Sequence[nn.Module], channels: Sequence[int], around: dict[str, int]) -> None:
    """Keep these residual channels everywhere, in their order. `around`: modules and parameters outside of the blocks by name,
    and the axis of each that is the channels."""
    index = torch.tensor(list(channels))
    for name, axis in around.items():
        owner, _, last = name.rpartition(".")
        held = getattr(model.get_submodule(owner), last)
        if isinstance(held, nn.Parameter):
            setattr(model.get_submodule(owner), last, _part(held, index, axis))
        else:
            keep(held, index, axis)
    width = 0
    for block in blocks:
        b, attn = cast(Any, block), cast(Any, block.attn)
        layers = layers_of(b.mlp)
        assert layers is not None
        width = width or attn.proj.out_features
        for part in ("norm1", "norm", "norm2", "ls1", "ls2"):
            for module in getattr(b, part, nn.Identity()).modules():
                keep(module, index, 0)
        keep(block, index, 0)
        for part in ("qkv", "q_proj", "k_proj", "v_proj", "gate"):
            if getattr(attn, part, None) is not None:
                keep(getattr(attn, part), index, 1)
        for layer in layers[0]:
            keep(layer, index, 1)
        for layer in (attn.proj, layers[1]):
            keep(layer, index, 0)
    for module in model.modules():  # what a model says of itself
        for name in ("embed_dim", "num_features", "head_hidden_size", "hidden_dim"):
            if not isinstance(module, type(blocks[0])) and getattr(module, name, None) == width:
                setattr(module, name, len(index))


def layers_of(mlp: nn.Module) -> tuple[list[nn.Linear], nn.Linear] | None:
    """The linear layers that make the hidden units of an MLP, and the one that reads them; None where it is made otherwise.

    A layer of twice as many outputs makes each unit and, in its second half, its gate.
    """
    linears = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
    others = [m for m in mlp.modules() if not isinstance(m, nn.Linear) and next(m.parameters(recurse=False), None) is not None]
    if len(linears) < 2 or others:
        return None
    *first, last = linears
    if any(m.in_features != last.out_features or m.out_features not in (last.in_features, 2 * last.in_features) for m in first):
        return None
    return first, last


def cut_units(mlp: nn.Module, units: Sequence[int], step: str, where: str) -> None:
    """Keep these hidden units of an MLP."""
    found = layers_of(mlp)
    if found is None:
        raise VitreousError(f"{step}: the MLP of block '{where}' is not two linear layers with a function of each unit between")
    first, last = found
    size = last.in_features
    if not units or not set(units) <= set(range(size)):
        raise VitreousError(f"{step}: the plan keeps {len(units)} hidden units of block '{where}', which has {size}")
    index = torch.tensor(sorted(units))
    for layer in first:
        keep(layer, torch.cat([index, index + size]) if layer.out_features == 2 * size else index, 0)
    keep(last, index, 1)


def units_stand_alone(mlp: nn.Module) -> bool:
    """Whether the hidden units can go one by one: found by trying, on random tokens, what the MLP gives without the second half
    of them, once set to zero in the layer that reads them and once cut."""
    found = layers_of(mlp)
    if found is None:
        return False
    last = found[1]
    half = max(last.in_features // 2, 1)
    zeroed, cut = copy.deepcopy(mlp).eval(), copy.deepcopy(mlp).eval()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, last.out_features, generator=draw).to(last.weight)
    with torch.no_grad():
        cast(Any, layers_of(zeroed))[1].weight[:, half:] = 0
        try:
            cut_units(cut, range(half), "", "")
            return torch.allclose(zeroed(x), cut(x), rtol=1e-3, atol=1e-4)
        except (RuntimeError, TypeError, AttributeError):
            return False
