"""The bundled model: a timm `VisionTransformer` trained on Fashion-MNIST by `benchmarks/train_bundled.py`.

Plain pre-norm blocks behind timm's convolutional stem ("Early Convolutions Help Transformers See Better", Xiao et al., 2021),
without which a vision transformer this small needs many times the training: 7 × 7 patches of 4 pixels, width 128, 8 blocks of
4 heads, 1.8 M parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from timm.layers import HybridEmbed
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

MEAN, STD = (0.2860,), (0.3530,)
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
WEIGHTS = Path(__file__).parent.parent / "data" / "bundled" / "fashion_vit.safetensors"


def embed(in_chans: int, img_size: int, embed_dim: int, **kwargs: Any) -> HybridEmbed:
    stem = ConvStem(in_chans, depth=4, channels=(32, 64, 96, 128), kernel_size=3, stride=(2, 1, 2, 1), act_layer=nn.GELU)
    return HybridEmbed(stem, img_size=img_size, patch_size=1, in_chans=in_chans, embed_dim=embed_dim)


@register_model
def vit_fashion(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The bundled model; `pretrained=True` reads the weights that lie in the package."""
    for ignored in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(ignored, None)
    shape: dict[str, Any] = dict(img_size=28, in_chans=1, num_classes=10, embed_dim=128, depth=8, num_heads=4)
    model = VisionTransformer(**{**shape, **kwargs}, embed_layer=embed)
    model.pretrained_cfg = model.default_cfg = dict(  # type: ignore[assignment]
        architecture="vit_fashion",
        input_size=(1, 28, 28),
        fixed_input_size=True,
        mean=MEAN,
        std=STD,
        interpolation="bilinear",
        crop_pct=1.0,
        num_classes=10,
        classifier="head",
        license="mit",
    )
    if pretrained:
        model.pretrained_cfg["label_names"] = CLASSES  # type: ignore[index]
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(WEIGHTS).items()})
    return model
