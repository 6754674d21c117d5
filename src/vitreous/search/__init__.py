"""Choose how to make a model small and fast under a budget, and do it."""

from .job import Job

__all__ = ["Job"]
