"""Explanations: where a model looks, as heatmaps on its grid of patches."""

from .artifacts import Artifacts, artifacts
from .attention import attention
from .cam import eigen_cam, grad_cam, grad_cam_pp, layer_cam
from .distance import AttentionDistance, distance
from .grad_rollout import grad_rollout
from .head_importance import HeadImportance, head_importance
from .lrp import lrp, transformer_attribution
from .methods import METHODS, Explanation, warning
from .paths import Paths, paths, without_paths
from .patterns import Patterns, patterns
from .pixels import integrated_gradients, occlusion
from .rollout import rollout
from .salient import salient_relevance
from .survival import survival

__all__ = [
    "METHODS",
    "Artifacts",
    "AttentionDistance",
    "Explanation",
    "HeadImportance",
    "Paths",
    "Patterns",
    "artifacts",
    "attention",
    "distance",
    "eigen_cam",
    "grad_cam",
    "grad_cam_pp",
    "grad_rollout",
    "head_importance",
    "integrated_gradients",
    "layer_cam",
    "lrp",
    "occlusion",
    "paths",
    "patterns",
    "rollout",
    "salient_relevance",
    "survival",
    "transformer_attribution",
    "warning",
    "without_paths",
]
