"""What timm asks of an image classifier, written once: a head that can be changed, and pyramids that give their maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import VitreousError


class Classifier(nn.Module):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`: `forward_features`, then `pool`, then `head`.

    A subclass writes `forward_features`, and `pool` and `make_head` where its own differ; it ends its `__init__` with
    `self.reset_classifier(num_classes)`. With `num_classes=0` the model gives what the head would read.

    num_features: width of what the head reads.
    global_pool: the published way to one feature an image, "avg" or "token"; "" leaves the features as they are.
    """

    head: nn.Module
    global_pool: str = "avg"

    def __init__(self, num_features: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = num_features
        self.head_drop = nn.Dropout(drop_rate)

    def make_head(self, num_classes: int) -> nn.Module:
        """`[B, num_features]` to `[B, num_classes]`."""
        return nn.Linear(self.num_features, num_classes)

    def pool(self, x: Tensor) -> Tensor:
        """Features `[B, C, H, W]` or `[B, N, C]` to `[B, C]`: their mean, or the first token."""
        if self.global_pool == "token":
            return x[:, 0]
        return x.mean((2, 3)) if x.ndim == 4 else x.mean(1)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes`; 0 leaves the features, and `global_pool=""` leaves them unpooled."""
        own = type(self).global_pool
        if global_pool not in (None, "", own):
            raise VitreousError(f"{type(self).__name__} pools by {own!r}: global_pool cannot be {global_pool!r}")
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = self.make_head(num_classes).apply(init_weights) if num_classes else nn.Identity()
        reference = next(self.parameters(), torch.empty(0))
        self.head = head.to(reference.device, reference.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Pyramid(Classifier):
    """A classifier made of `stages`, each `[B, C, H, W]` to `[B, C', H', W']`, after a `stem` and before a `norm`.

    widths, reductions: channels of what each stage gives, and the image's side over its side. `timm.create_model(…,
    features_only=True)` gives the maps `[B, widths[i], H / reductions[i], W / reductions[i]]`.
    """

    def __init__(self, widths: Sequence[int], reductions: Sequence[int], drop_rate: float = 0.0) -> None:
        super().__init__(widths[-1], drop_rate)
        self.stem: Callable[[Tensor], Tensor] = nn.Identity()
        self.stages = nn.ModuleList()
        self.norm: Callable[[Tensor], Tensor] = nn.Identity()
        self.feature_info = [
            dict(num_chs=width, reduction=reduction, module=f"stages.{i}")
            for i, (width, reduction) in enumerate(zip(widths, reductions, strict=True))
        ]

    def as_map(self, x: Tensor | tuple[Any, ...]) -> Tensor:
        """The map in what a stage hands to the next: the first part, where it hands on more than a map."""
        return x[0] if isinstance(x, tuple) else x

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(self.as_map(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps `[B, C, h, w]` of the stages `indices` (all by default; the last n of them), as timm's models give them.

        norm: the last one behind the final norm. stop_early: do not run what no one asked for. Unless `intermediates_only`, the
        final features come first.
        """
        if output_fmt != "NCHW":
            raise VitreousError(f"{type(self).__name__} gives its maps as NCHW, not {output_fmt}")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        x, maps = self.stem(x), []
        for i, stage in enumerate(self.stages):
            if i > last and stop_early:
                break
            x = stage(x)
            if i in taken:
                found = self.as_map(x)
                maps.append(self.norm(found) if norm and i == len(self.stages) - 1 else found)
        return maps if intermediates_only else (self.norm(self.as_map(x)), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of the stages `indices` do not need."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return cast(list[int], taken)


def init_weights(module: nn.Module) -> None:
    """As most of these papers start: linears from a normal of 0.02 cut at ±2, convolutions from He's by fan-out, norms at one.

    For `model.apply`.
    """
    m: Any = module
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
    elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)) and m.weight is not None:
        nn.init.ones_(m.weight)
    else:
        return
    if m.bias is not None:
        nn.init.zeros_(m.bias)
