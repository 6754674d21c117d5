"""Choose how to make a model small and fast under a budget, and do it."""

from .budget import Goal
from .job import Job

__all__ = ["Goal", "Job"]
