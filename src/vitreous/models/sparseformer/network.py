"""SparseFormer: a few latent tokens that each look at a box of the image and move it.

Gao, Tong, Wang, Shou, "SparseFormer: Sparse Visual Recognition via Limited Latent Tokens", ICLR 2024 (`v1`), and Gao, Tong,
Lin, Chen, Shou, "Bootstrapping SparseFormers from Vision Foundation Models", CVPR 2024 (`btsp`).

The *focusing transformer* gives every token a box (a RoI), samples an early convolution's map at a few points in it, mixes
them with weights that the token itself generates, and moves the box; one layer does so four times with the same weights. The
*cortex transformer* behind it is plain ViT blocks, on 49 tokens instead of 196 or 576. `bootstrap` therefore takes them from a
trained ViT.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from timm.layers import QuickGELU
from timm.models import register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...anatomy import read
from ...errors import VitreousError
from ..official import official
from .focus import BTSP, V1, AdaptiveMixing, Focus, Style, full, heads_of


class EarlyConvolution(nn.Module):
    """The only look at all pixels: images [B, C, H, W] to a map [B, D, H/4, W/4], normalised over channels."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 7, stride=2, padding=3)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.conv1(x))).permute(0, 2, 3, 1)
        return F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)


class SparseFormer(nn.Module):
    """SparseFormer; images [B, C, H, W] of any size to logits [B, num_classes] (features [B, width] when 0).

    Args:
        style: `V1` or `BTSP`. widths: of the tokens in the first focusing layer, and behind it. depth: plain blocks.
        tokens: latent tokens, without the class token. points: looked at by each token each time. repeats: of the first
        focusing layer. conv_dim: channels of the map that is looked at.
    """

    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def __init__(
        self,
        style: Style,
        widths: tuple[int, int],
        depth: int,
        tokens: int,
        points: int = 36,
        conv_dim: int = 96,
        repeats: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        head_bias: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if "place" in style.first and any(width % 8 for width in widths):
            raise VitreousError(f"widths {widths} hold no sine and cosine of four numbers: both have to be multiples of 8")
        start, width = widths
        norm = partial(nn.LayerNorm, eps=style.eps)
        self.num_features = self.head_hidden_size = self.embed_dim = width
        self.num_classes, self.head_bias, self.num_prefix_tokens = num_classes, head_bias, int(style.class_token)
        layers = repeats + 1 + depth
        rates = [drop_path_rate * i / (layers - 1) for i in range(layers)]
        self.feat_extractor = EarlyConvolution(in_chans, conv_dim)
        self.initial_roi = nn.Embedding(tokens, 4)
        self.initial_embedding = nn.Embedding(1 if style.class_token else tokens, start)
        self.cls_embedding = nn.Embedding(1, width) if style.class_token else None
        self.focusing = nn.ModuleList(
            [
                Focus(style, style.first, start, conv_dim, points, rates[:repeats]),
                nn.Sequential(nn.Linear(start, width), *([norm(width)] if style.transition_norm else []))
                if start != width
                else nn.Identity(),
                Focus(style, style.second, width, conv_dim, points, rates[repeats : repeats + 1]),
            ]
        )
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads_of(style, width),
                qkv_bias=True,
                drop_path=rate,
                norm_layer=cast(type[nn.Module], norm),
                act_layer=QuickGELU if style.quick_gelu else nn.GELU,
            )
            for rate in rates[repeats + 1 :]
        )
        self.norm = norm(width)
        self.proj = self._classifier()
        self.init_weights()

    def _classifier(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes, bias=self.head_bias) if self.num_classes else nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, (Focus, AdaptiveMixing)):
                m.init_weights()
        nn.init.kaiming_normal_(self.feat_extractor.conv1.weight, mode="fan_out", nonlinearity="relu")
        nn.init.trunc_normal_(self.initial_embedding.weight)
        # Boxes of half the image on the largest square grid that the tokens fill; the rest see all of it.
        side = math.isqrt(len(self.initial_roi.weight))
        corner = torch.cartesian_prod(*[torch.arange(side) / max(side - 1, 1) * 0.5] * 2)
        self.initial_roi.weight[:] = torch.tensor([0.0, 0.0, 1.0, 1.0])
        self.initial_roi.weight[: side**2] = torch.cat([corner, corner + 0.5], dim=1)

    def no_weight_decay(self) -> set[str]:
        return {"initial_roi.weight"}

    def focus(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images to tokens [B, N, width] before the cortex, and the boxes [B, N, 4] each time they were looked at.

        Boxes are (x1, y1, x2, y2) as shares of width and height, and may reach outside the image.
        """
        features = self.feat_extractor(x)
        tokens = self.initial_embedding.weight.expand(self.initial_roi.num_embeddings, -1)
        # Copies: torch counts no operations of a module whose input is a view of a parameter.
        tokens, roi = tokens.repeat(x.shape[0], 1, 1), full(self.initial_roi.weight).repeat(x.shape[0], 1, 1)
        seen: list[Tensor] = []
        for layer in self.focusing:
            if isinstance(layer, Focus):
                tokens, roi = layer(features, tokens, roi, seen)
            else:
                tokens = layer(tokens)
        return tokens, seen

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to tokens [B, N, width], the class token first where there is one."""
        tokens, _ = self.focus(x)
        if self.cls_embedding is not None:
            tokens = torch.cat([self.cls_embedding.weight.expand(x.shape[0], 1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.norm(tokens[:, 0] if self.cls_embedding is not None else tokens.mean(1))
        return pooled if pre_logits else self.proj(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.proj

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear classifier; `global_pool` is ignored, the pooling belongs to the style."""
        self.num_classes = num_classes
        self.proj = self._classifier().to(self.norm.weight)
        if isinstance(self.proj, nn.Linear):
            nn.init.trunc_normal_(self.proj.weight, std=0.02)


def bootstrap(
    vit: nn.Module, *, tokens: int = 48, keep: int | None = None, tune: int = 2, points: int = 16, conv_dim: int = 64
) -> SparseFormer:
    """A SparseFormer that inherits the last `keep` blocks of a trained plain `vit` (default two thirds, as in the paper: 8 of
    12, 16 of 24), its final norm, classifier and class token; the truncated leading blocks are replaced by a new focusing
    transformer of half the width.

    Only what is new, the class token and the first `tune` inherited blocks have `requires_grad`; train them with `align`,
    on images without labels. `vit` is not changed.

    Raises VitreousError when `vit` has other than plain blocks, or pools its tokens in a way that this head cannot.
    """
    anatomy = read(vit)
    anatomy.require_plain("bootstrap")
    depth, width = len(anatomy.blocks), cast(int, anatomy.width)
    keep = max(1, round(depth * 2 / 3)) if keep is None else keep
    if not 1 <= keep <= depth or not 0 <= tune <= keep:
        raise VitreousError(f"keep={keep}, tune={tune} do not fit {depth} blocks: 0 <= tune <= keep <= {depth}, keep >= 1")
    pool = anatomy.pool
    norm = getattr(vit, "fc_norm" if pool == "avg" else "norm", None)
    if pool not in ("token", "avg") or not isinstance(norm, nn.LayerNorm):
        raise VitreousError(
            f"bootstrap needs a class token and a norm, or a mean and a norm behind it; this model pools by {pool!r}"
        )
    style = replace(BTSP, class_token=pool == "token", eps=norm.eps)
    in_chans = next(m for m in vit.modules() if isinstance(m, nn.Conv2d)).in_channels
    half = max(8, width // 16 * 8)
    model = SparseFormer(style, (half, width), 0, tokens, points, conv_dim, num_classes=0, in_chans=in_chans)
    if model.cls_embedding is not None:
        model.cls_embedding.weight.data.copy_(cast(Tensor, vit.cls_token)[0, :1])
    inherited = [vit.get_submodule(block.name) for block in anatomy.blocks[-keep:]]
    model.blocks.extend(copy.deepcopy(inherited))
    model.norm = copy.deepcopy(norm)
    model.proj = copy.deepcopy(cast(Any, vit).get_classifier())
    model.num_classes = getattr(vit, "num_classes", 0)
    model.head_bias = getattr(model.proj, "bias", None) is not None
    for part in (*model.blocks, model.norm, model.proj):
        part.requires_grad_(False)
    for block in model.blocks[:tune]:
        block.requires_grad_(True)
    model.pretrained_cfg = model.default_cfg = {**getattr(vit, "pretrained_cfg", {}), "classifier": "proj"}
    return model.train(vit.training)


def align(model: SparseFormer, vit: nn.Module, x: Tensor) -> Tensor:
    """The bootstrapping objective, a scalar: one minus the mean cosine between what `model` and its `vit` make of images `x`
    [B, C, H, W], before the classifier. No labels; no gradient goes to `vit`."""
    teacher: Any = vit
    with torch.no_grad():
        target = teacher.forward_head(teacher.forward_features(x), pre_logits=True)
    own = model.forward_head(model.forward_features(x), pre_logits=True)
    return 1 - F.cosine_similarity(own, target, dim=1).mean()


# The release of 2023 named its tensors in another way.
OLD_NAMES = (
    (r"^token_(roi|embedding)\.", r"initial_\1."),
    (r"\.tuo_proj\.", ".out_proj."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ln_attn\.", ".norm1."),
    (r"\.ffn\.0\.", ".norm2."),
    (r"\.ffn\.1\.", ".mlp.fc1."),
    (r"\.ffn\.3\.", ".mlp.fc2."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.classifier\.", "proj."),
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: their list of layers starts with the three that focus."""

    def renamed(name: str) -> str:
        for old, new in OLD_NAMES:
            name = re.sub(old, new, name)
        if found := re.match(r"layers\.(\d+)\.", name):
            i = int(found[1])
            name = (f"focusing.{i}." if i < 3 else f"blocks.{i - 3}.") + name[found.end() :]
        return name

    return {renamed(name): tensor for name, tensor in state.items()}


IMAGENET, INCEPTION, CLIP = (
    (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
)


def published() -> Iterator[tuple[str, dict[str, Any], tuple[Any, Any]]]:
    """Every variant of the official repository: name, arguments, mean and deviation of its images."""
    for size, widths, depth, tokens, drop in (
        ("tiny", (256, 512), 7, 49, 0.2),
        ("small", (320, 640), 7, 64, 0.3),
        ("base", (384, 768), 9, 81, 0.4),
    ):
        yield f"v1_{size}", dict(style=V1, widths=widths, depth=depth, tokens=tokens, drop_path_rate=drop), IMAGENET
    clip = replace(BTSP, quick_gelu=True)
    for size, widths, depth, tokens, embedding in (("base", (384, 768), 8, 48, 512), ("large", (512, 1024), 16, 63, 768)):
        small = dict(widths=widths, depth=depth, points=16, conv_dim=64)
        yield f"btsp_augreg_{size}", dict(**small, style=BTSP, tokens=48), INCEPTION
        yield f"btsp_openai_clip_{size}", dict(**small, style=clip, tokens=tokens, num_classes=embedding, head_bias=False), CLIP


def register(variant: str, arguments: dict[str, Any], normalisation: tuple[Any, Any]) -> None:
    name = f"sparseformer_{variant}"

    def build(pretrained: bool = False, **kwargs: Any) -> SparseFormer:
        if pretrained:
            raise VitreousError(f"the weights of {name} are not fetched: load the official file with load_official")
        for ignored in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(ignored, None)
        model = SparseFormer(**{**arguments, **kwargs})
        model.pretrained_cfg = model.default_cfg = dict(
            architecture=name,
            input_size=(3, 224, 224),
            crop_pct=0.875,
            interpolation="bilinear",
            mean=normalisation[0],
            std=normalisation[1],
            num_classes=model.num_classes,
            classifier="proj",
            first_conv="feat_extractor.conv1",
            license="mit",
        )
        return model

    build.__name__ = name
    globals()[name] = register_model(build)
    for known in (variant, name):
        official(f"sparseformer--{known}", build, convert)


for _variant in published():
    register(*_variant)
