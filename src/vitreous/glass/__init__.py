"""Looking into a model while it runs: record, and intervene."""

from .view import Glass, View, glass

__all__ = ["Glass", "View", "glass"]
