"""Steps that lower precision."""

from .adalog import AdaLog
from .auto import Auto, why
from .coverage import Coverage, coverage
from .dopq import DopQ
from .gradient import GradientPTQ
from .isvit import ISViT
from .ivit import IViT
from .lrpqvit import LRPQViT
from .minmax import MinMax
from .mptq import MPTQ
from .mse import MSE
from .percentile import Percentile
from .qhyvit import QHyViT
from .repq import RepQ
from .shiftadd import ShiftAdd, operations
from .smoothquant import SmoothQuant
from .weightonly import WeightOnly

__all__ = [
    "MPTQ",
    "MSE",
    "AdaLog",
    "Auto",
    "Coverage",
    "DopQ",
    "GradientPTQ",
    "ISViT",
    "IViT",
    "LRPQViT",
    "MinMax",
    "Percentile",
    "QHyViT",
    "RepQ",
    "ShiftAdd",
    "SmoothQuant",
    "WeightOnly",
    "coverage",
    "operations",
    "why",
]
