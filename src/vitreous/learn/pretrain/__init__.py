"""Self-supervised pretraining: masks, targets, decoders and losses written once, and the papers' methods as objectives."""

from . import masks, patches
from .elastic import extract
from .encode import load_reference
from .eva import EVA
from .fsfm import FSFM
from .gmml import GMML
from .mae import MAE
from .mask_and_match import MaskAndMatch
from .poa import POA
from .selfpatch import SelfPatch
from .semaim import SemAIM
from .simmim import SimMIM
from .softcon import SoftCon, with_channels
from .ssast import SSAST
from .tov_vicreg import TOVVICReg
from .uni4eye import Uni4Eye, UnifiedViT
from .video import VideoMAEv2, VideoViT

__all__ = [
    "EVA",
    "FSFM",
    "GMML",
    "MAE",
    "POA",
    "SSAST",
    "MaskAndMatch",
    "SelfPatch",
    "SemAIM",
    "SimMIM",
    "SoftCon",
    "TOVVICReg",
    "Uni4Eye",
    "UnifiedViT",
    "VideoMAEv2",
    "VideoViT",
    "extract",
    "load_reference",
    "masks",
    "patches",
    "with_channels",
]
