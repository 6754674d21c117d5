"""Choose how to make a model small and fast under a budget, and do it."""

from .budget import Goal
from .front import Point
from .job import Job
from .run import Found, search

__all__ = ["Found", "Goal", "Job", "Point", "search"]
