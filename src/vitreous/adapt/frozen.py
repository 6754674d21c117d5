"""What of a model goes on learning."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..steps import Step


def learn_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Freeze `model`, in place, all but `parameters`."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def after_integers(done: Iterable[Step]) -> str:
    """Why what is to be learnt comes before quantization; empty where nothing was quantized yet."""
    late = any(s.family == "quant" for s in done)
    return "the scales were fitted without what it adds, and integers do not learn: adapt first, then quantize" if late else ""
