"""Steps that shorten the token sequence, or the list of tokens that each of them attends to."""

from .evit import EViT
from .mctf import MCTF
from .pooling import UniformPooling
from .random_choice import RandomChoice
from .semantic import SemanticTokens
from .slimming import TokenSlimming
from .sparsifiner import Sparsifiner
from .ssm_pruning import SSMPruning
from .tome import ToMe

__all__ = [
    "MCTF",
    "EViT",
    "RandomChoice",
    "SSMPruning",
    "SemanticTokens",
    "Sparsifiner",
    "ToMe",
    "TokenSlimming",
    "UniformPooling",
]
