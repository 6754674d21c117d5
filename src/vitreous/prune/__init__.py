"""Steps that remove weights, heads or blocks."""

from .divergence import Divergence
from .heads import Heads
from .lpvit import LPViT
from .monarch import Monarch
from .mpcvit import MPCHeads
from .nvit import NViT
from .sparse_then_prune import SparseThenPrune
from .subnet import Subnet
from .two_four import TwoFour, on_tensor_cores, read_packed, write_packed

__all__ = [
    "Divergence",
    "Heads",
    "LPViT",
    "MPCHeads",
    "Monarch",
    "NViT",
    "SparseThenPrune",
    "Subnet",
    "TwoFour",
    "on_tensor_cores",
    "read_packed",
    "write_packed",
]
