"""UniFormer (Li et al., 2022): local relations first, global ones behind; and its light form."""

from .light import UniFormerLight
from .network import GlobalBlock, UniFormer, local_block

__all__ = ["GlobalBlock", "UniFormer", "UniFormerLight", "local_block"]
