"""GMM attention (Li and Zhang, 2024) in the five networks that it was published in."""

from . import cait, pit, swin, t2t
from .vit import GaussianMaskAttention, GaussianMixtureMask, GMMViT, gaussian

__all__ = ["GMMViT", "GaussianMaskAttention", "GaussianMixtureMask", "cait", "gaussian", "pit", "swin", "t2t"]
