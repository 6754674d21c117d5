"""Self-supervised pretraining: masks, targets, decoders and losses written once, and the papers' methods as objectives."""

from . import masks, patches
from .encode import load_reference
from .mae import MAE
from .simmim import SimMIM

__all__ = ["MAE", "SimMIM", "load_reference", "masks", "patches"]
