"""SparseFormer (Gao et al., 2024): few tokens that look where they choose, and how a trained ViT becomes one."""

from .network import SparseFormer, align, bootstrap, convert, published

__all__ = ["SparseFormer", "align", "bootstrap", "convert", "published"]
