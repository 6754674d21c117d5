"""Every explanation by its name, called alike, and what its sanity check has found."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from torch import Tensor, nn

from ..score import Target
from .attention import attention
from .cam import eigen_cam, grad_cam, grad_cam_pp, layer_cam
from .grad_rollout import grad_rollout
from .lrp import lrp, transformer_attribution
from .pixels import integrated_gradients, occlusion
from .rollout import rollout
from .salient import salient_relevance

Explanation = Callable[..., Tensor]


def _of_any_class(explain: Explanation) -> Explanation:
    def same(model: nn.Module, x: Tensor, target: Target = None) -> Tensor:
        return explain(model, x)

    return same


CLASSLESS = ("attention", "rollout", "eigen_cam")  # show the same whatever the target

# `(model, x [B, C, H, W], target=None)` to heatmaps `[B, h, w]`, not negative.
METHODS: dict[str, Explanation] = {
    "attention": _of_any_class(attention),
    "rollout": _of_any_class(rollout),
    "grad_rollout": grad_rollout,
    "transformer_attribution": transformer_attribution,
    "lrp": lrp,
    "salient_relevance": salient_relevance,
    "grad_cam": grad_cam,
    "grad_cam_pp": grad_cam_pp,
    "layer_cam": layer_cam,
    "eigen_cam": eigen_cam,
    "integrated_gradients": integrated_gradients,
    "occlusion": occlusion,
}


def warning(method: str) -> str | None:
    """A sentence for a method that failed the sanity check by model randomisation, or None where it passed or is not measured.

    The measurements are those of `vitreous.prove.faithfulness`, kept in `see/sanity.toml` by `benchmarks/see.py`.
    """
    failed = [m for m in sanity().get(method, {}).values() if not m["passes"]]
    if not failed:
        return None
    found = "; ".join(f"{m['correlation']:.2f} on {m['model']}, {m['date']}" for m in failed)
    return f"{method} fails the sanity check: its maps stay alike when all weights are random (rank correlation {found})"


def sanity() -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured, by method and model: `model`, `correlation`, `bound`, `passes`, `images` and `date`."""
    return tomllib.loads(files("vitreous.see").joinpath("sanity.toml").read_text())
