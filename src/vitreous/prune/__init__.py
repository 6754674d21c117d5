"""Steps that remove weights, heads or blocks."""

from .heads import Heads

__all__ = ["Heads"]
