"""Steps that add small trainable parts to a model and leave the rest frozen: prompts, registers, a side network, a head."""

from .dcls import DCLS
from .ela import ELA
from .embed import Embed
from .foveate import Foveate
from .hst import HST
from .registers import Registers
from .vpt import VPT

__all__ = ["DCLS", "ELA", "HST", "VPT", "Embed", "Foveate", "Registers"]
