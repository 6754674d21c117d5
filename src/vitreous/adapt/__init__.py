"""Steps that add small trainable parts and leave the rest frozen (prompts, registers, a side network, a head), or layers to learn
with all the rest (learnable spacings, attention by row and column)."""

from .dcls import DCLS
from .ela import ELA
from .embed import Embed
from .foveate import Foveate
from .hst import HST
from .registers import Registers
from .softhgnn import SoftHGNN
from .vpt import VPT

__all__ = ["DCLS", "ELA", "HST", "VPT", "Embed", "Foveate", "Registers", "SoftHGNN"]
