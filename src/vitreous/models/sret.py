"""SReT: every block runs twice with the same weights, and attends within slices of the tokens to pay for it.

Shen, Liu and Xing, "Sliced Recursive Transformer" (ECCV 2022). Facts from the official repository, szq0214/SReT. There the
second run of a block slices the tokens in a random order, in evaluation too, so that its answers are random; here the order is
random in training alone, and evaluation slices the tokens as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import Attention, DropPath, Mlp, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import model_entrypoint
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import conv_norm, require_size
from .classifier import Pyramid, init_weights
from .official import official, publish, renamed


def coefficient() -> nn.Parameter:
    """Of the learnable residual connection (section 3.3), which has one on each side of every sum."""
    return nn.Parameter(torch.ones(1))


class NonLinearProjection(nn.Module):
    """NLL (section 3.2): what parts two runs of a block from each other; c₁ · x + c₂ · mlp(norm(x)) on `[B, N, C]`."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        self.norm1, self.mlp = nn.LayerNorm(channels, eps=1e-6), Mlp(channels, int(channels * ratio))
        self.c1, self.c2 = coefficient(), coefficient()

    def forward(self, x: Tensor) -> Tensor:
        return self.c1 * x + self.c2 * self.mlp(self.norm1(x))


class RecursiveBlock(nn.Module):
    """One block run `len(groups)` times, each time followed by a projection of its own (equation 4); `[B, N, C]`.

    groups: in how many slices the tokens attend among themselves, for each run.
    """

    def __init__(
        self, channels: int, num_heads: int, mlp_ratio: float, np_mlp_ratio: float, groups: Sequence[int], drop_path: float
    ) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(channels, eps=1e-6), Attention(channels, num_heads, qkv_bias=True)
        self.norm2, self.mlp = nn.LayerNorm(channels, eps=1e-6), Mlp(channels, int(channels * mlp_ratio))
        self.c1, self.c2, self.c3, self.c4 = coefficient(), coefficient(), coefficient(), coefficient()
        self.groups = tuple(groups)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.projections = nn.ModuleList(NonLinearProjection(channels, np_mlp_ratio) for _ in groups)

    def attend(self, x: Tensor, groups: int) -> Tensor:
        """Sliced group self-attention: each of `groups` runs of N / groups tokens by itself."""
        return self.attn(x.reshape(-1, x.shape[1] // groups, x.shape[2])).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        for i, (groups, projection) in enumerate(zip(self.groups, self.projections, strict=True)):
            if self.training and i and groups > 1:
                order = torch.randperm(x.shape[1], device=x.device)
                y = self.attend(self.norm1(x)[:, order], groups)[:, order.argsort()]
            else:
                y = self.attend(self.norm1(x), groups)
            x = self.c1 * x + self.c2 * self.drop_path(y)
            x = self.c3 * x + self.c4 * self.drop_path(self.mlp(self.norm2(x)))
            x = projection(x)
        return x


class Stage(nn.Module):
    """A depthwise convolution that halves the side, but for the first stage, then recursive blocks; on maps `[B, C, H, W]`."""

    def __init__(self, pool: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pool, self.blocks = pool, nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        return self.blocks(x.flatten(2).mT).mT.unflatten(2, (x.shape[2], x.shape[3]))


class Stem(nn.Module):
    """Images `[B, C, *img_size]` to maps of an eighth of the side, by three convolutions, with learned positions."""

    def __init__(self, in_chans: int, width: int, img_size: tuple[int, int]) -> None:
        super().__init__()
        convs = [conv_norm(i, o, 3, 2, bias=True) for i, o in ((in_chans, width // 2), (width // 2, width), (width, width))]
        self.convs = nn.Sequential(*(part for conv in convs for part in (conv, nn.ReLU())))
        self.img_size = img_size
        self.pos_embed = nn.Parameter(torch.zeros(1, width, img_size[0] // 8, img_size[1] // 8))

    def forward(self, x: Tensor) -> Tensor:
        require_size(x, self.img_size, "SReT")
        return self.convs(x) + self.pos_embed


class SReT(Pyramid):
    """Images `[B, C, *img_size]` to logits `[B, num_classes]`; the sides of `img_size` are multiples of 8.

    depths: shared blocks of each stage; each counts twice in the paper's. groups1, groups2: slices of each stage's tokens in
    the first and the second run of a block. mlp_ratio, np_mlp_ratio: hidden widths of the blocks' MLPs and of the non-linear
    projections', over the stage's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        base_dim: int = 32,
        depths: Sequence[int] = (2, 5, 3),
        heads: Sequence[int] = (2, 4, 8),
        groups1: Sequence[int] = (8, 4, 1),
        groups2: Sequence[int] = (2, 1, 1),
        mlp_ratio: float = 3.6,
        np_mlp_ratio: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [base_dim * n for n in heads]
        super().__init__(widths, [8 * 2**i for i in range(len(heads))], drop_rate)
        size = cast(tuple[int, int], to_2tuple(img_size))
        rows, columns = (side // 8 for side in size)
        self.stem = Stem(in_chans, widths[0], size)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, (width, groups) in enumerate(zip(widths, zip(groups1, groups2, strict=True), strict=True)):
            if i:
                rows, columns = (rows + 1) // 2, (columns + 1) // 2
            if any(side % 8 for side in size) or any(rows * columns % n for n in groups):
                raise VitreousError(
                    f"SReT: the sides of img_size {size} must be multiples of 8, and the {rows} × {columns} tokens of stage {i} "
                    f"must divide into {groups} slices: choose another img_size, or groups1 and groups2"
                )
            pool = nn.Conv2d(widths[i - 1], width, 3, 2, 1, groups=widths[i - 1]) if i else nn.Identity()
            make = partial(RecursiveBlock, width, heads[i], mlp_ratio, np_mlp_ratio, groups)
            self.stages.append(Stage(pool, [make(rate) for rate in rates[i]]))
        self.fc_norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.apply(init_weights)
        trunc_normal_(self.stem.pos_embed, std=0.02)
        self.reset_classifier(num_classes)

    def pool(self, x: Tensor) -> Tensor:
        """Features `[B, C, H, W]` to `[B, C]`: their mean, normalised after it."""
        return self.fc_norm(super().pool(x))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours. They name a shared block twice, 4b and 4b + 2, and loading leaves the latter's weights in it."""
    names = {}
    for key, tensor in state.items():
        part, *path = key.split(".")
        if part == "transformers":
            stage, i, rest = path[0], int(path[2]), ".".join(path[3:])
            if i % 4 == 2:
                continue
            if i % 4 == 0:
                tensor = state[f"transformers.{stage}.blocks.{i + 2}.{rest}"]
            within = "" if i % 4 == 0 else f"projections.{i % 4 // 2}."
            key = f"stages.{stage}.blocks.{i // 4}.{within}{rest}"
        elif part == "pools":
            key = f"stages.{int(path[0]) + 1}.pool.{path[-1]}"
        names[key] = tensor
    return renamed(
        names,
        (r"^norm\.", "fc_norm."),
        (r"^pos_embed$", "stem.pos_embed"),
        (r"^patch_embed\.(conv|bn)1\.", r"stem.convs.0.\1."),
        (r"^patch_embed\.(conv|bn)2\.", r"stem.convs.2.\1."),
        (r"^patch_embed\.(conv|bn)3\.", r"stem.convs.4.\1."),
        (r"^(stem\.convs\.\d\.)conv\.", r"\g<1>0."),
        (r"^(stem\.convs\.\d\.)bn\.", r"\g<1>1."),
        (r"coefficient(\d)\.bias$", r"c\1"),
    )


WHOLE: dict[str, Any] = dict(groups1=(1, 1, 1), groups2=(1, 1, 1))
LARGER: dict[str, Any] = dict(mlp_ratio=4.0)
SMALL: dict[str, Any] = dict(base_dim=42, heads=(3, 6, 12), mlp_ratio=3.0, np_mlp_ratio=2.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "SReT_T": {},
    "SReT_LT": LARGER,
    "SReT_LT_16_14_1": dict(groups1=(16, 14, 1), groups2=(1, 1, 1), **LARGER),
    "SReT_S": SMALL,
    "SReT_T_wo_slice": WHOLE,
    "SReT_LT_wo_slice": LARGER | WHOLE,
    "SReT_S_wo_slice": SMALL | WHOLE,
    "SReT_T_wo_slice_finetune_384": WHOLE | dict(img_size=384),
    "SReT_S_wo_slice_finetune_384": SMALL | WHOLE | dict(img_size=384),
    "SReT_S_wo_slice_finetune_512": SMALL | WHOLE | dict(img_size=512),
}
VARIANTS |= {f"{name}_distill": VARIANTS[name] for name in VARIANTS if name[5:] in ("T", "LT", "S", "T_wo_slice", "LT_wo_slice")}
for _name, _arguments in VARIANTS.items():
    _short = _name.removeprefix("SReT_").lower()
    _cfg = dict(size=_arguments.get("img_size", 224), maps=3, fixed_input_size=True, first_conv="stem.convs.0.0")
    publish(SReT, f"sret_{_short}", _arguments, variant=f"sret--{_short}", convert=convert, **_cfg)
    official(f"sret--{_name}", model_entrypoint(f"sret_{_short}"), convert)
