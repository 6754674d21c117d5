"""A small ViT and pictures that it can learn in seconds."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F


def vit(classes=4, **kwargs):
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": classes} | kwargs
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **size).eval()


def pictures(n=64):
    g = torch.Generator().manual_seed(3)
    y = torch.arange(n) % 4
    x = torch.randn(n, 3, 16, 16, generator=g) + F.one_hot(y, 4)[:, :3, None, None].float() * 2
    return x, y
