"""Dynamic Perceiver: a latent code beside a convolutional network, with the early exits on the latent code.

Han, Han, Liu, Wang, Pan, Pu, Deng, Feng, Song, Huang, "Dynamic Perceiver for Efficient Visual Recognition", ICCV 2023.

The feature branch is an ordinary MobileNetV3, RegNet-Y or ResNet; the classification branch holds a few latent tokens. Before
each stage they exchange by cross-attention in both directions (x→z and z→x). Two exits read the latents of the third and the
fourth stage, one the feature map, and the last both branches; every exit is also told what the one before it said. When to
stop is calibrated by `calibrate_exits` in `early_exit`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp
from timm.models import register_model
from torch import Tensor, nn

from ...errors import VitreousError
from ..official import official
from .backbones import Backbone, mobilenet, regnet, resnet

EXITS = ("early3", "attention", "cnn", "merged")
GRID = 7  # cells along each side of the pooled map that latents attend to


class Attention(nn.Module):
    """Attention of queries [B, N, dim] to [B, M, kv_dim] through `inner` channels, without biases on q, k, v; `keys` gives the
    M keys a learned bias of their own (there is no other position in the latents' view of the map)."""

    def __init__(self, dim: int, kv_dim: int, inner: int, heads: int = 1, keys: int = 0) -> None:
        super().__init__()
        if inner % heads:
            raise VitreousError(f"{inner} channels do not split into {heads} heads: choose heads that divide each stage's width")
        self.num_heads = heads
        self.relative_position_bias = nn.Parameter(torch.zeros(1, keys, inner)) if keys else None
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(kv_dim, inner, bias=False)
        self.v_proj = nn.Linear(kv_dim, inner, bias=False)
        self.o_proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor, kv: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(kv), self.v_proj(kv)
        if self.relative_position_bias is not None:
            k = k + self.relative_position_bias
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm attention and MLP, of tokens [B, N, dim] to themselves, or to `kv` [B, M, kv_dim] where `kv_dim` is given."""

    def __init__(
        self, dim: int, kv_dim: int | None = None, inner: int | None = None, heads: int = 1, keys: int = 0, widen: int = 1
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm_kv = nn.LayerNorm(kv_dim) if kv_dim else None
        self.attn = Attention(dim, kv_dim or dim, inner or dim, heads, keys)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim * widen)

    def forward(self, x: Tensor, kv: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y if kv is None or self.norm_kv is None else self.norm_kv(kv))
        return x + self.mlp(self.norm2(x))


def attend_map(layer: Layer, x: Tensor, z: Tensor) -> Tensor:
    """z→x: every pixel of the map [B, C, h, w] attends to the latents [B, N, D]."""
    return layer(x.flatten(2).transpose(1, 2), z).transpose(1, 2).unflatten(2, x.shape[2:])


class Exchange(nn.Module):
    """What happens between two stages: the latents become half as many and wider, the map reads them, and they read the map."""

    def __init__(
        self,
        before: tuple[int, int] | None,  # latents and their width in the stage before; None in front of the first
        latents: int,
        width: int,
        depth: int,
        heads: int,
        widen: int,
        x2z: bool,
        z2x: bool,
        dwc: bool,
    ) -> None:
        super().__init__()
        self.mixer = nn.Sequential(nn.LayerNorm(before[0]), nn.Linear(before[0], latents)) if before else None
        self.expander = nn.Sequential(nn.LayerNorm(before[1]), nn.Linear(before[1], width)) if before else None
        self.z2x = Layer(width, width, inner=width // 8) if before and z2x else None
        self.dwc = nn.Conv2d(width, width, GRID, padding=GRID // 2, groups=width) if x2z and dwc else None
        self.x2z = Layer(width, width, keys=GRID**2) if x2z else None
        self.layers = nn.Sequential(*(Layer(width, heads=heads, widen=widen) for _ in range(depth)))

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B, C, h, w] and latents [B, N, D] to the same map and to [B, N / 2, C]."""
        if self.mixer is not None and self.expander is not None:
            z = self.expander(self.mixer(z.transpose(1, 2)).transpose(1, 2))
        if self.z2x is not None:
            x = attend_map(self.z2x, x, z)
        if self.x2z is not None:
            seen = x if self.dwc is None else x + self.dwc(x)
            z = self.x2z(z, F.adaptive_avg_pool2d(seen, GRID).flatten(2).transpose(1, 2))
        return x, self.layers(z)


class Exits(nn.Module):
    """The four classifiers. With `isc`, an exit also sees the logits of an earlier one, through Linear, BatchNorm, ReLU."""

    def __init__(self, widths: list[int], num_classes: int, isc: bool, hidden: int | None, drop_rate: float) -> None:
        super().__init__()
        *_, third, fourth, last = widths
        told = fourth if isc else 0

        def classifier(width: int) -> list[nn.Module]:
            if hidden is None:
                return [nn.Linear(width, num_classes)]
            return [nn.Linear(width, hidden), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(hidden, num_classes)]

        def tell() -> nn.Module:
            return nn.Sequential(nn.Linear(num_classes, told), nn.BatchNorm1d(told), nn.ReLU())

        self.early = nn.Linear(third, num_classes)
        self.isc3, self.isc4 = (tell(), tell()) if isc else (None, None)
        self.attention = nn.Linear(fourth + told, num_classes)
        self.drop = nn.Dropout(drop_rate)
        self.cnn = nn.Sequential(*classifier(last))
        self.merged = nn.Sequential(nn.BatchNorm1d(last + fourth + told), *classifier(last + fourth + told))

    def at_attention(self, z: Tensor, early: Tensor) -> Tensor:
        return self.attention(z if self.isc3 is None else torch.cat([z, self.isc3(early)], dim=1))

    def at_cnn(self, x: Tensor) -> Tensor:
        return self.cnn(self.drop(x))

    def at_end(self, x: Tensor, z: Tensor, attention: Tensor) -> Tensor:
        told = [] if self.isc4 is None else [self.isc4(attention)]
        return self.merged(torch.cat([x, z, *told], dim=1))


class DynPerceiver(nn.Module):
    """Dynamic Perceiver on images [B, C, H, W].

    In training mode `forward` gives the logits of all four `EXITS`, each [B, num_classes]. In eval mode it gives those of
    one, `exit` (0 to 3), and computes nothing behind it; with `exit=None` all four, as the official repository does. So a
    model fixed to each exit can be measured and shipped. `num_classes=0` gives `forward_features`.

    Args:
        backbone: makes the feature branch. num_latents: latent tokens, halved before each stage but the first.
        depth_factor: the latents pass 3, 3, 9, 3 layers times this. SA_widening_factor: of their MLPs.
        with_x2z, with_z2x, with_dwc, with_last_CA, with_isc: the ablations of the paper; the first x→z is always there.
        exit: see above. spatial_reduction: True; the official training commands name it.
        multi_label: an image may have several classes, so that `early_exit` asks how sure each yes or no is.

    Attributes:
        thresholds: [4], the least confidence (probability of the answer) at which `early_exit.dynamic` stops at an exit;
            until they are calibrated none is reached before the last.
    """

    thresholds: Tensor

    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def __init__(
        self,
        backbone: Callable[[], Backbone],
        num_latents: int = 128,
        depth_factor: tuple[int, ...] | list[int] = (1, 1, 1, 1),
        num_SA_heads: tuple[int, ...] | list[int] = (1, 2, 4, 8),
        SA_widening_factor: int = 4,
        with_x2z: bool = True,
        with_z2x: bool = True,
        with_dwc: bool = True,
        with_last_CA: bool = True,
        with_isc: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        exit: int | None = 3,
        spatial_reduction: bool = True,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        if not spatial_reduction:
            raise VitreousError("spatial_reduction=False has no published model: latents attend to the pooled map")
        if exit not in (None, 0, 1, 2, 3):
            raise VitreousError(f"exit is {exit!r}: choose 0 ({EXITS[0]}) to 3 ({EXITS[3]}), or None for all four")
        if num_latents < 8 or num_latents % 8:
            raise VitreousError(f"{num_latents} latents cannot be halved three times: choose a multiple of 8")
        parts = backbone()
        if in_chans != 3:
            _take(parts.stem, in_chans)
        widths = parts.widths
        self.exit, self.num_classes, self.multi_label = exit, num_classes, multi_label
        self.num_features = self.head_hidden_size = sum(widths[2:])
        self._split = [widths[4], widths[3], widths[2]]
        self._head = partial(Exits, widths, isc=with_isc, hidden=parts.hidden, drop_rate=parts.drop_rate)
        self.latent = nn.Parameter(torch.randn(num_latents, widths[0]).mul_(0.02).clamp_(-2, 2))
        self.stem, self.stages = parts.stem, nn.ModuleList(parts.stages)
        self.exchanges = nn.ModuleList(
            Exchange(
                (num_latents >> i - 1, widths[i - 1]) if i else None,
                num_latents >> i,
                widths[i],
                depth * factor,
                heads,
                SA_widening_factor,
                with_x2z or i == 0,
                with_z2x,
                with_dwc,
            )
            for i, (depth, factor, heads) in enumerate(zip((3, 3, 9, 3), depth_factor, num_SA_heads, strict=True))
        )
        self.last_z2x = Layer(widths[4], widths[3], inner=widths[4] // 8) if with_last_CA else None
        self.head = self._head(num_classes) if num_classes else None
        self.register_buffer("thresholds", torch.tensor([torch.inf] * 3 + [-torch.inf]))
        self.counted: dict[tuple[int, ...], tuple[int, ...]] = {}  # MACs up to each exit by image shape, for `dynamic`

    def _pooled(self, x: Tensor) -> Iterator[Tensor]:
        """What the exits read, each computed when it is asked for: the mean latents of stages 3 and 4, and the mean of the
        map before and after the last cross-attention."""
        x = self.stem(x)
        z = self.latent.repeat(x.shape[0], 1, 1)
        for i, (exchange, stage) in enumerate(zip(self.exchanges, self.stages, strict=True)):
            x, z = exchange(x, z)
            if i >= 2:
                yield z.mean(1)
            x = stage(x)
        yield x.mean((2, 3))
        if self.last_z2x is not None:
            x = attend_map(self.last_z2x, x, z)
        yield x.mean((2, 3))

    def exits(self, x: Tensor) -> Iterator[Tensor]:
        """Logits [B, num_classes] of the four exits in order, each computed when it is asked for."""
        if self.head is None:
            raise VitreousError("a model with num_classes=0 has no exits: call reset_classifier with a number of classes")
        pooled = self._pooled(x)
        yield (early := self.head.early(next(pooled)))
        z = next(pooled)
        yield (attention := self.head.at_attention(z, early))
        yield self.head.at_cnn(next(pooled))
        yield self.head.at_end(next(pooled), z, attention)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.head is None:
            return self.forward_features(x)
        if self.training or self.exit is None:
            return tuple(self.exits(x))
        return next(logits for i, logits in enumerate(self.exits(x)) if i == self.exit)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to what the last exit reads [B, num_features]: the pooled map, and the pooled latents of stages
        4 and 3. The branches share no grid that they could be returned on."""
        third, fourth, _, last = self._pooled(x)
        return torch.cat([last, fourth, third], dim=1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the last exit from `forward_features`."""
        if pre_logits or self.head is None:
            return features
        last, fourth, third = features.split(self._split, dim=1)
        return self.head.at_end(last, fourth, self.head.at_attention(fourth, self.head.early(third)))

    def get_classifier(self) -> nn.Module | None:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New exits, uncalibrated; `global_pool` is ignored, both branches are averaged."""
        self.num_classes = num_classes
        self.head = self._head(num_classes).to(self.latent) if num_classes else None
        self.thresholds.copy_(torch.tensor([torch.inf] * 3 + [-torch.inf]))

    def no_weight_decay(self) -> set[str]:
        return {"latent"}


def _take(stem: nn.Module, in_chans: int) -> None:
    """Let the first convolution take images of `in_chans` channels."""
    conv = next(m for m in stem.modules() if isinstance(m, nn.Conv2d))
    conv.in_channels = in_chans
    conv.weight = nn.Parameter(conv.weight.new_empty(conv.out_channels, in_chans, *conv.kernel_size))
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")


RENAMES = (
    (r"^cnn_stem\.", "stem."),
    (r"^cnn_body_stage(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),
    (r"^cnn_body\.block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),
    (r"^dwc(\d)_x2z\.", lambda m: f"exchanges.{int(m[1]) - 1}.dwc."),
    (r"^cross_att(\d)_(x2z|z2x)\.", lambda m: f"exchanges.{int(m[1]) - 1}.{m[2]}."),
    (r"^self_att(\d)\.", lambda m: f"exchanges.{int(m[1]) - 1}.layers."),
    (r"^token_(mixer|expander)\.(\d)\.", lambda m: f"exchanges.{int(m[2]) + 1}.{m[1]}."),
    (r"^last_cross_att_z2x\.", "last_z2x."),
    (r"\.cross_attn\.q_norm\.|\.self_attn\.norm\.", ".norm1."),
    (r"\.cross_attn\.kv_norm\.", ".norm_kv."),
    (r"\.(cross|self)_attn\.attention\.", ".attn."),
    (r"\.mlp\.layernorm\.", ".norm2."),
    (r"^early_classifier3\.", "head.early."),
    (r"^classifier_att\.", "head.attention."),
    (r"^isc", "head.isc"),
    (r"^classifier_cnn\.(weight|bias)", r"head.cnn.0.\1"),
    (r"^classifier_cnn\.", "head.cnn."),
    (r"^classifier_merge\.", "head.merged."),
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours; official checkpoints hold no thresholds, so no exit is taken early until they are calibrated."""

    def renamed(name: str) -> str:
        for old, new in RENAMES:
            name = re.sub(old, new, name)
        return name

    return {**{renamed(k): v for k, v in state.items()}, "thresholds": torch.tensor([torch.inf] * 3 + [-torch.inf])}


def published() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every variant of the official repository, with the depth factors of its training commands."""
    for name, width in (("", 1.0), ("_0x5", 0.5), ("_0x75", 0.75), ("_1x25", 1.25), ("_1x5", 1.5), ("_2x0", 2.0)):
        for latents in (128, 256, 512):
            arguments = dict(backbone=partial(mobilenet, width), num_latents=latents, depth_factor=(1, 1, 1, 3))
            yield f"mobilenetV3{name}_perceiver_t{latents}", arguments
    nets = torchvision.models
    for name, build in (("400m", nets.regnet_y_400mf), ("800m", nets.regnet_y_800mf)):
        for latents in (32, 64, 128, 256, 512):
            yield f"reg{name}_perceiver_t{latents}", dict(backbone=partial(regnet, build), num_latents=latents)
    for name, build in (("1x6g", nets.regnet_y_1_6gf), ("3x2g", nets.regnet_y_3_2gf)):
        for latents in (128, 256, 512):
            yield f"reg{name}_perceiver_t{latents}", dict(backbone=partial(regnet, build), num_latents=latents)
    shallow, deep = (2, 2, 2, 2), (3, 4, 6, 3)
    for name, width, depths, bottleneck, counts in (
        ("18", 1.0, shallow, False, (128, 256, 512)),
        ("34", 1.0, deep, False, (128, 256, 512)),
        ("50", 1.0, deep, True, (64, 128, 256, 512)),
        ("50_050", 0.5, deep, True, (64, 128, 256)),
        ("50_0375", 0.375, deep, True, (64, 128, 256)),
        ("50_0625", 0.625, deep, True, (128, 160, 192, 256)),
        ("50_075", 0.75, deep, True, (128, 256)),
    ):
        for latents in counts:
            arguments = dict(backbone=partial(resnet, width, depths, bottleneck), num_latents=latents)
            yield f"resnet{name}_perceiver_t{latents}", arguments


def register(name: str, arguments: dict[str, Any]) -> None:
    if name.startswith("reg"):
        arguments = {**arguments, "depth_factor": (1, 1, 1, 2)}

    def build(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
        if pretrained:
            raise VitreousError(f"the weights of {name} are not fetched: load the official file with load_official")
        for ignored in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(ignored, None)
        model = DynPerceiver(**{**arguments, **kwargs})
        first = next(n for n, m in model.stem.named_modules() if isinstance(m, nn.Conv2d))
        model.pretrained_cfg = model.default_cfg = dict(
            architecture=name,
            input_size=(3, 224, 224),
            crop_pct=0.875,
            interpolation="bicubic",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            num_classes=model.num_classes,
            classifier="head",
            first_conv=f"stem.{first}",
            license="mit",
        )
        return model

    build.__name__ = name
    globals()[name] = register_model(build)
    official(f"dyn-perceiver--{name}", partial(build, exit=None), convert)  # all four exits, as theirs


for _variant in published():
    register(*_variant)
