"""A ViT of any smaller width and depth inside of a larger one: the first channels, and blocks evenly spaced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ...errors import VitreousError
from ...steps import history_of, remember
from .encode import positions_at


def networks(widths: Sequence[int], depths: Sequence[int], repeat: float = 3.0) -> list[tuple[int, int]]:
    """(width, depth) as often as each is drawn: up to `repeat`² times the smallest, once the whole one, which comes last."""
    often = [np.linspace(repeat, 1, len(n)) for n in (widths, depths)]
    pairs = [(w, d, round(a * b)) for w, a in zip(widths, often[0], strict=True) for d, b in zip(depths, often[1], strict=True)]
    return [(w, d) for w, d, times in pairs for _ in range(times)]


def kept_blocks(depth: int, of: int) -> list[int]:
    """Which of `of` blocks stay: the first and the last always."""
    return [int(i) for i in np.linspace(0, of - 1, depth)]


def plain(model: nn.Module) -> VisionTransformer:
    """Raises `VitreousError` for what is no plain ViT of timm, whose parts are known by name."""
    if not isinstance(model, VisionTransformer) or not all(type(b) is Block for b in model.blocks):
        raise VitreousError(f"sizes are taken out of plain ViTs of timm: {type(model).__name__} is none")
    return model


def sliced(model: VisionTransformer, width: int, depth: int, grid: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """The tensors of the ViT of `width` and `depth` inside of `model`, as views of its own; positions for `grid` if given.

    Linear layers are multiplied by the ratio of the widths, so that what they give keeps its scale (Zhang et al., POA).
    """
    whole, ratio = model.embed_dim, model.embed_dim / width
    kept = {i: new for new, i in enumerate(kept_blocks(depth, len(model.blocks)))}
    made: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            if int(block) not in kept:
                continue
            if rest.startswith("attn.qkv."):
                cut = p.unflatten(0, (3, whole))[:, :width]
                cut = (cut[..., :width] if p.ndim == 2 else cut).flatten(0, 1)
            else:
                cut = p[tuple(slice(n * width // whole) for n in p.shape)]
            made[f"blocks.{kept[int(block)]}.{rest}"] = cut * ratio if p.ndim == 2 else cut
        elif name.startswith("patch_embed.proj."):
            made[name] = p[:width]
        elif name.startswith("head."):
            made[name] = p if p.ndim == 1 else p[:, :width] * ratio
        else:
            p = positions_at(model, grid) if name == "pos_embed" and grid is not None else p
            made[name] = p[..., :width]
    return made


def shrunk(model: VisionTransformer, width: int, depth: int) -> VisionTransformer:
    """A copy of `model` with the parts of this size, whose weights are still to be put in."""
    small = copy.deepcopy(model)
    small.blocks = nn.Sequential(*(small.blocks[i] for i in kept_blocks(depth, len(small.blocks))))
    small.embed_dim = small.num_features = small.head_hidden_size = width
    for m in small.modules():
        if isinstance(m, nn.LayerNorm):
            m.normalized_shape = (width,)
        elif isinstance(m, nn.Linear):
            m.in_features = m.in_features * width // model.embed_dim
            m.out_features = m.out_features if m is small.head else m.out_features * width // model.embed_dim
    for block in small.blocks:
        attn: Any = block.get_submodule("attn")
        attn.num_heads = attn.num_heads * width // model.embed_dim
        attn.attn_dim = width
    return small


def extract(model: nn.Module, width: int, depth: int) -> nn.Module:
    """The ViT of `width` and `depth` inside of a pretrained one, an ordinary model of timm in eval mode.

    Raises `VitreousError` for a size that is no part of it: heads keep their width.
    """
    whole = plain(model)
    attn: Any = whole.blocks[0].attn
    head = whole.embed_dim // attn.num_heads
    if not head <= width <= whole.embed_dim or width % head or not 1 <= depth <= len(whole.blocks):
        raise VitreousError(
            f"this model holds widths up to {whole.embed_dim} in steps of {head}, and 1 to {len(whole.blocks)} blocks: "
            f"not {width} and {depth}"
        )
    small = shrunk(whole, width, depth)
    with torch.no_grad():
        for name, value in sliced(whole, width, depth).items():
            holder, _, leaf = name.rpartition(".")
            setattr(small.get_submodule(holder), leaf, nn.Parameter(value.detach().clone()))
    history = history_of(model)
    if history.base is not None:
        asked = {"embed_dim": width, "depth": depth, "num_heads": width // head}
        remember(small, replace(history, base={**history.base, "kwargs": {**history.base["kwargs"], **asked}}))
    return small.eval()
