"""Explanations: where a model looks, as heatmaps on its grid of patches."""

from .attention import attention
from .grad_cam import grad_cam
from .rollout import rollout
from .survival import survival

__all__ = ["attention", "grad_cam", "rollout", "survival"]
