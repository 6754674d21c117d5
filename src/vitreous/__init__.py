"""Vitreous makes vision transformers clear, small and fast."""

from . import data, models, prove, prune, quant, see, ship, tokens
from .anatomy import read
from .blocks import traced
from .errors import VitreousError
from .glass import glass
from .steps import Recipe, Step, slim
from .store import load
from .store import open_model as open  # noqa: A004
from .store import save_model as save

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "Step",
    "VitreousError",
    "data",
    "glass",
    "load",
    "models",
    "open",
    "prove",
    "prune",
    "quant",
    "read",
    "save",
    "see",
    "ship",
    "slim",
    "tokens",
    "traced",
]
