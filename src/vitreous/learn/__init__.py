"""Training objectives and schedules of the methods."""

from .consistency import token_reduction_consistency
from .frd import frd, reverse_modules
from .schedule import keep_rate, set_keep
from .sparsifiner import connectivity_loss, predictor_parameters, sparsifiner_distillation

__all__ = [
    "connectivity_loss",
    "frd",
    "keep_rate",
    "predictor_parameters",
    "reverse_modules",
    "set_keep",
    "sparsifiner_distillation",
    "token_reduction_consistency",
]
