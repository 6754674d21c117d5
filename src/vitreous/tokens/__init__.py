"""Steps that shorten the token sequence."""

from .evit import EViT
from .mctf import MCTF
from .pooling import UniformPooling
from .random_choice import RandomChoice
from .tome import ToMe

__all__ = ["MCTF", "EViT", "RandomChoice", "ToMe", "UniformPooling"]
