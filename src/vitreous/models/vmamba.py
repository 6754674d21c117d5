"""What the descendants of VMamba share: overlapping stems and downsampling, and the names of their checkpoints.

Liu et al., "VMamba: Visual State Space Model" (NeurIPS 2024). No model by itself.
"""

from __future__ import annotations

from functools import partial

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .official import renamed

Norm = partial(LayerNorm2d, eps=1e-5)


def stem(in_chans: int, channels: int, stride: int = 2, act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Images `[B, in_chans, H, W]` to `[B, channels, H / 2 / stride, W / 2 / stride]` by two overlapping convolutions."""
    first = nn.Conv2d(in_chans, channels // 2, stride + 1, stride, padding=1)
    second = nn.Conv2d(channels // 2, channels, 3, 2, padding=1)
    return nn.Sequential(first, Norm(channels // 2), act(), second, Norm(channels))


def downsample(inputs: int, outputs: int) -> nn.Sequential:
    """A map to one of half the side, by an overlapping convolution."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, padding=1), Norm(outputs))


def vmamba_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: a stage begins with the downsampling that ends the official one before it.

    Official sequences also count the layers in them that only permute.
    """
    names = {}
    for key, tensor in state.items():
        part, *rest = key.split(".")
        if part == "layers" and rest[1] == "downsample":
            key = ".".join([f"stages.{int(rest[0]) + 1}.0", *rest[2:]])
        elif part == "layers":
            key = ".".join([f"stages.{rest[0]}.{int(rest[2]) + 1}", *rest[3:]])
        names[key] = tensor
    return renamed(
        names,
        (r"^patch_embed\.0\.", "stem.0."),
        (r"^patch_embed\.2\.", "stem.1."),
        (r"^patch_embed\.5\.", "stem.3."),
        (r"^patch_embed\.7\.", "stem.4."),
        (r"^(stages\.\d\.0)\.1\.", r"\1.0."),
        (r"^(stages\.\d\.0)\.3\.", r"\1.1."),
        (r"^(stages\.\d\.[1-9]\d*)\.norm\.", r"\1.norm1."),
        (r"^classifier\.", ""),
    )
