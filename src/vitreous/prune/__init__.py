"""Steps that remove weights, heads or blocks."""

from .heads import Heads
from .nvit import NViT

__all__ = ["Heads", "NViT"]
