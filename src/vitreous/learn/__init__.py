"""Training objectives and schedules of the methods."""

from .consistency import token_reduction_consistency
from .schedule import keep_rate, set_keep

__all__ = ["keep_rate", "set_keep", "token_reduction_consistency"]
