"""Steps that shorten the token sequence."""

from .evit import EViT
from .tome import ToMe

__all__ = ["EViT", "ToMe"]
