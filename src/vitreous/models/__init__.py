"""Architectures, registered with timm on import: `timm.create_model("sit_tiny")` works after `import vitreous.models`."""

from . import bundled, dependencyvit, dyn_perceiver, early_exit, lookupvit, sit, sparseformer, stvit, van
from .official import load_official, variants

__all__ = [
    "bundled",
    "dependencyvit",
    "dyn_perceiver",
    "early_exit",
    "load_official",
    "lookupvit",
    "sit",
    "sparseformer",
    "stvit",
    "van",
    "variants",
]
