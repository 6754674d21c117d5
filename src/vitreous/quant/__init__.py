"""Steps that lower precision."""

from .minmax import MinMax
from .repq import RepQ

__all__ = ["MinMax", "RepQ"]
