"""A head for retrieval: features of unit norm in place of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from ..steps import Step, step
from .frozen import after_integers


class EmbeddingHead(nn.Module):
    """`[B, C]` to `[B, dims]` of unit norm: layer norm, a linear layer, division by the norm."""

    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, dims)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.fc(self.norm(x)), dim=-1)


@step("adapt")
@dataclass(frozen=True)
class Embed(Step):
    """A new head of `dims` numbers that reads what the classifier read, as in Ren et al. (ICLR 2024, section 3.1).

    It is random, from a fixed seed, until it is trained (`learn.SemanticProxies`); what else learns stays as it was. The model
    then answers with features, by whose cosine pictures are found. Comes before quantization; deployable.
    """

    dims: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.dims <= 2**16:
            raise VitreousError(f"adapt.Embed: dims must lie in 1 to 65536, not {self.dims}")

    def refuse_after(self, done: Sequence[Step]) -> str:
        taken = any(s.name in ("adapt.Embed", "adapt.HST") for s in done)
        return "the classifier has been replaced already" if taken else after_integers(done)

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        anatomy = read(model)
        name, width = anatomy.classifier, anatomy.width
        if name is not None:
            width = cast(Any, model.get_submodule(name)).in_features
        else:
            asked = getattr(model, "get_classifier", None)
            given = asked() if callable(asked) else None
            name = next((n for n, m in model.named_modules() if m is given), None)
        if name is None or width is None:
            raise VitreousError(
                f"{self.name}: {anatomy.kind} has no classifier to take the place of: name the layer by "
                "vitreous.read(model, classifier=…)"
            )
        parent, _, child = name.rpartition(".")
        reference = next(model.parameters())
        setattr(model.get_submodule(parent), child, EmbeddingHead(width, self.dims).to(reference))
        read(model, classifier="")
        cast(Any, model).vitreous_embeds = True
