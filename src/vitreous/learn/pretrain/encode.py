"""The encoder under a mask: what it is told is hidden, and what it makes of the rest. Any model of timm with a `patch_embed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...anatomy import read
from ...errors import VitreousError
from ...models.official import renamed
from ..objective import Objective, look


class Shape(NamedTuple):
    """`grid` of patches of `patch` pixels that enter the model, `embedded` wide, in pictures of `channels`; tokens that leave are
    `width` wide, each for `stride` pixels a side."""

    grid: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    embedded: int
    width: int
    stride: int


def shape(model: nn.Module, name: str, rest: bool = False) -> Shape:
    """Raises `VitreousError` for a model that does not cut pictures of one size into patches, as timm's do; and for a size that
    its patches, or the tokens that leave a pyramid, do not divide, unless the `rest` may be left out."""
    embed: Any = getattr(model, "patch_embed", None)
    grid, patch, proj = (getattr(embed, k, None) for k in ("grid_size", "patch_size", "proj"))
    if grid is None or patch is None or not isinstance(proj, nn.Conv2d):
        raise VitreousError(
            f"{name} hides patches where a model cuts pictures into them: {type(model).__name__} has no patch_embed"
        )
    info: Any = getattr(model, "feature_info", None)
    stride = info[-1]["reduction"] if info else patch[0]
    stride = stride if isinstance(stride, int) else stride[0]
    size, least = getattr(embed, "img_size", None), max(*patch, stride)
    if size is not None and not rest and any(n % p or n % stride for n, p in zip(size, patch, strict=True)):
        near = sorted({max(n // least, 1) * least for n in size} | {-(-n // least) * least for n in size})
        raise VitreousError(
            f"{name}: the model takes pictures of {size[0]} × {size[1]}, which its patches of {least} pixels do not divide: open "
            f"it with img_size={' or '.join(map(str, near))}"
        )
    owner: Any = model
    return Shape(grid, patch, proj.in_channels, proj.out_channels, owner.num_features, stride)


@contextmanager
def hiding(model: nn.Module, mask: Tensor, token: Tensor) -> Iterator[None]:
    """While open, `token [1, 1, C]` stands for the patches that `mask [B, N]` marks, before positions are added."""

    def replace(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return torch.where(mask.view(*out.shape[:-1], 1), token.view(-1).to(out.dtype), out)

    embed: Any = model.get_submodule("patch_embed")
    handle = embed.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def patch_tokens(model: nn.Module, images: Tensor, norm: bool = True) -> Tensor:
    """`[B, N, C]`, after the final norm or as they leave the last block; of pyramids those of the last stage."""
    if norm:
        found = look(model, images, {"patches"}).patches
    else:
        found = look(model, images, (), (-1,)).blocks[-1][:, read(model).prefix :]
    assert found is not None
    return found.flatten(1, -2)


def positions_at(model: nn.Module, grid: tuple[int, int]) -> Tensor:
    """Learned positions of a model of timm for another grid, `[1, P + N, C]`, as DINO resamples them: bicubic, by the factor
    (side + 0.1) / old side, which is not quite what asking for the size gives."""
    table: Tensor = model.get_parameter("pos_embed")
    embed: Any = model.get_submodule("patch_embed")
    old, prefix = embed.grid_size, table.shape[1] - embed.grid_size[0] * embed.grid_size[1]
    if grid == tuple(old):
        return table
    square = table[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)
    factor = tuple((n + 0.1) / o for n, o in zip(grid, old, strict=True))
    new = F.interpolate(square, scale_factor=factor, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([table[:, :prefix], new.flatten(2).mT], 1)


class _Called(nn.Module):
    """`call(model, …)` as a forward, which `functional_call` can run with other tensors."""

    def __init__(self, model: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, images: Tensor) -> Tensor:
        return self.call(self.model, images)


def called_with(model: nn.Module, tensors: Mapping[str, Tensor], call: Callable[[Any, Tensor], Tensor], images: Tensor) -> Tensor:
    """`call(model, images)` with `tensors` in the place of parameters of these names, which gradients reach."""
    return functional_call(_Called(model, call), {f"model.{name}": t for name, t in tensors.items()}, (images,))


def at_size(model: nn.Module, call: Callable[[Any, Tensor], Tensor], images: Tensor) -> Tensor:
    """`call(model, images)` of a model of timm, for images of another size than it is built for: its positions are resampled,
    with gradient. Raises `VitreousError` for one that has no table of positions, or whose patches do not divide the size."""
    embed: Any = model.get_submodule("patch_embed")
    (height, width), side = images.shape[2:], embed.patch_size
    if (height, width) == tuple(embed.img_size or ()):
        return call(model, images)
    if not isinstance(getattr(model, "pos_embed", None), nn.Parameter):
        raise VitreousError(f"{type(model).__name__} has no learned positions to resample for crops of {height} × {width}")
    if height % side[0] or width % side[1]:
        raise VitreousError(f"patches of {side[0]} × {side[1]} do not divide crops of {height} × {width}")
    strict, embed.strict_img_size = embed.strict_img_size, False
    try:
        return called_with(model, {"pos_embed": positions_at(model, (height // side[0], width // side[1]))}, call, images)
    finally:
        embed.strict_img_size = strict


def load_reference(model: nn.Module, objective: Objective, state: Mapping[str, Tensor]) -> nn.Module:
    """Weights of an official pretraining checkpoint into `model`; returns the objective's parts with theirs.

    `objective.official` renames them: what becomes `parts.…` is the objective's, the rest the model's. Strict: raises
    `VitreousError` for a tensor that is missing, left over or of another shape.
    """
    parts = objective.parts(model) or nn.Identity()
    whole = nn.ModuleDict({"model": model, "parts": parts})
    have = whole.state_dict()
    found = {k if k.startswith("parts.") else f"model.{k}": v for k, v in renamed(state, *objective.official).items()}
    computed = (".relative_position_index", "model.")  # by timm; and what the objective has no use for
    found = {k: v for k, v in found.items() if not k.endswith(computed)}
    wrong = [k for k in have.keys() | found.keys() if k not in have or k not in found or found[k].shape != have[k].shape]
    if wrong:
        raise VitreousError(
            f"the weights do not fit {type(objective).__name__} of this model: {len(wrong)} are missing, left over or of another "
            f"shape, the first '{min(wrong)}'"
        )
    whole.load_state_dict(found)
    return parts


def asked(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller of timm's registry asks of a model without published weights; timm's own words for it left out."""
    if pretrained:
        raise VitreousError(f"{name} has no published weights: leave --pretrained out")
    own = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {k: v for k, v in kwargs.items() if k not in own}
