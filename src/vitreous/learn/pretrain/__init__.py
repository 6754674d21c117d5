"""Self-supervised pretraining: masks, targets, decoders and losses written once, and the papers' methods as objectives."""

from . import masks, patches
from .elastic import extract
from .encode import load_reference
from .eva import EVA
from .gmml import GMML
from .mae import MAE
from .poa import POA
from .selfpatch import SelfPatch
from .semaim import SemAIM
from .simmim import SimMIM
from .ssast import SSAST
from .video import VideoMAEv2, VideoViT

__all__ = [
    "EVA",
    "GMML",
    "MAE",
    "POA",
    "SSAST",
    "SelfPatch",
    "SemAIM",
    "SimMIM",
    "VideoMAEv2",
    "VideoViT",
    "extract",
    "load_reference",
    "masks",
    "patches",
]
