"""UniFormer: local relations by convolution in the early stages, global ones by attention in the late ones.

Li et al., "UniFormer: Unifying Convolution and Self-attention for Visual Recognition" (TPAMI 2023). Facts from the official
repository, Sense-X/UniFormer: its models for images, those trained with token labeling too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from timm.layers import LayerNorm2d, Mlp, calculate_drop_path_rates
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...mixers import ConditionalPosition, MetaBlock, conv_norm
from ..classifier import Pyramid, init_weights
from ..official import official, publish, renamed


def local_block(
    channels: int, hidden: int, layer_scale: float | None = None, drop: float = 0.0, drop_path: float = 0.0
) -> nn.Module:
    """DPE, then a block whose MHRA has local affinity (equations 1 to 5): a learned 5 × 5 neighbourhood; `[B, C, H, W]`."""
    affinity = nn.Sequential(
        nn.Conv2d(channels, channels, 1),
        nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
        nn.Conv2d(channels, channels, 1),
    )
    mlp = Mlp(channels, hidden, use_conv=True, drop=drop)
    return nn.Sequential(
        ConditionalPosition(channels), MetaBlock(channels, affinity, mlp, nn.BatchNorm2d, layer_scale, drop_path)
    )


class GlobalBlock(Block):
    """DPE, then a block whose MHRA has global affinity (equation 6): softmax attention over all places of `[B, C, H, W]`."""

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, qkv_bias=True, norm_layer=cast(Any, partial(nn.LayerNorm, eps=1e-6)), **kwargs)
        self.position = ConditionalPosition(dim)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self.position(x)
        return super().forward(x.flatten(2).mT, *args, **kwargs).mT.unflatten(2, x.shape[2:])


def patch_embed(inputs: int, outputs: int, patch: int) -> nn.Sequential:
    """Patches of `patch` pixels a side, and a LayerNorm; `[B, C, H, W]`."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, patch, patch), LayerNorm2d(outputs, eps=1e-5))


def conv_stem(inputs: int, outputs: int) -> nn.Sequential:
    """Overlapping patches of 4 pixels a side by two convolutions of stride 2; `[B, C, H, W]`."""
    half = outputs // 2
    return nn.Sequential(conv_norm(inputs, half, 3, 2, bias=True), nn.GELU(), conv_norm(half, outputs, 3, 2, bias=True))


class UniFormer(Pyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`.

    head_dim: channels of a head. overlap: whether patches overlap. layer_scale: what it starts at in the global blocks, and with
    `scale_local` in the local ones; None for none. token_labels: whether a second head, `aux_head`, reads every place; half of
    its largest answer for each class is added (Jiang et al., "All Tokens Matter", 2021). In training too: the official code gives
    the answers of both heads there, for a loss on dense labels that is not here.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 8, 3),
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        overlap: bool = False,
        layer_scale: float | None = None,
        scale_local: bool = False,
        token_labels: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        self.token_labels = token_labels
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(embed_dims):
            if overlap:
                embed = conv_norm(in_chans, width, 3, 2, bias=True) if i else conv_stem(in_chans, width)
            else:
                embed = patch_embed(in_chans, width, 2 if i else 4)
            if i < 2:
                scale = layer_scale if scale_local else None
                blocks = [local_block(width, int(width * mlp_ratio), scale, drop_rate, rate) for rate in rates[i]]
            else:
                drops = dict(proj_drop=drop_rate, attn_drop=attn_drop_rate, init_values=layer_scale)
                blocks = [
                    GlobalBlock(width, width // head_dim, mlp_ratio=mlp_ratio, drop_path=rate, **drops) for rate in rates[i]
                ]
            self.stages.append(nn.Sequential(embed, *blocks))
            in_chans = width
        self.norm = nn.BatchNorm2d(embed_dims[-1])
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.token_labels and num_classes:
            self.aux_head = self.make_head(num_classes).apply(init_weights).to(next(self.head.parameters()))
        else:
            self.aux_head = None

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        answer = super().forward_head(x, pre_logits)
        if pre_logits or self.aux_head is None:
            return answer
        return answer + 0.5 * self.aux_head(x.flatten(2).mT).amax(1)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: a stage is its embedding and its blocks, one after the other."""
    overlap = "patch_embed1.proj.0.weight" in state
    names: dict[str, Tensor] = {}
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        kind, stage = part.rstrip("1234"), int(part[-1]) - 1 if part[-1] in "1234" else 0
        if kind == "patch_embed":
            key = f"stages.{stage}.0.{rest}"
        elif kind == "blocks":
            number, _, rest = rest.partition(".")
            place = f"stages.{stage}.{int(number) + 1}"
            if stage >= 2:
                key = f"{place}.{rest.replace('pos_embed', 'position.proj')}"
            elif rest.startswith("pos_embed"):
                key = f"{place}.0.proj.{rest.rpartition('.')[2]}"
            else:
                key = f"{place}.1.{rest}"
        names[key] = tensor.flatten() if "gamma_" in key else tensor
    embeds = ((r"^(stages\.\d\.0)\.proj\.", r"\1.0."), (r"^(stages\.\d\.0)\.norm\.", r"\1.1."))
    if overlap:
        embeds = (
            *((rf"^(stages\.0\.0)\.proj\.{i}\.", rf"\1.{place}.") for i, place in enumerate(("0.0", "0.1", "", "2.0", "2.1"))),
            (r"^(stages\.[123]\.0)\.proj\.", r"\1."),
        )
    return renamed(
        names,
        *embeds,
        (r"^(stages\.[01]\.\d+\.1)\.conv1\.", r"\1.attn.0."),
        (r"^(stages\.[01]\.\d+\.1)\.attn\.(weight|bias)", r"\1.attn.1.\2"),
        (r"^(stages\.[01]\.\d+\.1)\.conv2\.", r"\1.attn.2."),
        (r"gamma_(\d)$", r"ls\1.gamma"),
    )


PLUS: dict[str, Any] = dict(depths=(3, 5, 9, 3), overlap=True)
BASE: dict[str, Any] = dict(depths=(5, 8, 20, 7))
LARGE: dict[str, Any] = dict(embed_dims=(128, 192, 448, 640), depths=(5, 10, 24, 7), layer_scale=1e-6, scale_local=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "uniformer_small": {},
    "uniformer_small_plus": dict(**PLUS, head_dim=32),
    "uniformer_small_plus_dim64": PLUS,
    "uniformer_base": BASE,
    "uniformer_base_ls": dict(**BASE, layer_scale=1e-6),
}
# With token labeling. The official names are those of the experiments, as functions of both kinds share names; of these models,
# those that are not called dim64 or large have heads of 32 channels.
LABELED: dict[str, dict[str, Any]] = {
    "uniformer_small_tl_224": dict(head_dim=32),
    "uniformer_small_tl_384": dict(head_dim=32),
    "uniformer_small_dim64_tl_224": {},
    "uniformer_small_plus_tl_224": dict(**PLUS, head_dim=32),
    "uniformer_small_plus_tl_384": dict(**PLUS, head_dim=32),
    "uniformer_small_plus_dim64_tl_224": PLUS,
    "uniformer_base_tl_224": dict(**BASE, head_dim=32),
    "uniformer_base_tl_384": dict(**BASE, head_dim=32),
    "uniformer_base_dim64_tl_224": BASE,
    "uniformer_large_ls_tl_224": LARGE,
    "uniformer_large_ls_tl_384": LARGE,
}
for _name, _arguments in {**VARIANTS, **LABELED}.items():
    publish(
        UniFormer,
        _name,
        dict(**_arguments, token_labels=_name in LABELED),
        variant=f"uniformer--{_name}",
        convert=convert,
        size=384 if _name.endswith("384") else 224,
        first_conv="stages.0.0.0.0" if _arguments.get("overlap") else "stages.0.0.0",
        classifier=("head", "aux_head") if _name in LABELED else "head",
    )
# Functions whose names only the models with token labeling have.
for _name in ("uniformer_small_dim64", "uniformer_base_dim64", "uniformer_large_ls"):
    official(f"uniformer--{_name}", partial(UniFormer, **LABELED[f"{_name}_tl_224"], token_labels=True), convert)
