"""Layer-wise relevance propagation through vision transformers: which part of a score came through where."""

from .propagate import Relevance, relevance

__all__ = ["Relevance", "relevance"]
