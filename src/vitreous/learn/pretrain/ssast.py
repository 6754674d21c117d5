"""SSAST: patches of a spectrogram are found again among the hidden ones, and predicted."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import VitreousError
from ..objective import Batch, Now, Objective, Seen, objective, share
from .encode import hiding, patch_tokens, shape
from .masks import clusters, some
from .patches import in_full, patchify


class Heads(nn.Module):
    """The embedding that stands for hidden patches, and two heads of two layers to the values of a patch."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.mask_embed = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.xavier_normal_(self.mask_embed)
        self.cpredlayer, self.gpredlayer = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, values)) for _ in range(2)
        )


@in_full
def info_nce(targets: Tensor, predictions: Tensor, over: str = "targets") -> Tensor:
    """−mean log softmax of the matching pairs of `[B, n, D]` each, within one clip: among the `targets` of a prediction, as the
    paper's eq. 1 has it, or among the "predictions" for a target, as the released code."""
    scores = targets @ predictions.mT
    if over == "targets":
        scores = scores.mT
    return -scores.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()


@objective
@dataclass(frozen=True)
class SSAST(Objective):
    """Gong, Lai, Chung, Glass, "SSAST: Self-Supervised Audio Spectrogram Transformer" (AAAI 2022); no labels.

    Spectrograms `[B, 1, mels, frames]` through a ViT of one channel; ⌊mask · N⌋ patches are hidden (400 of 512) by a learnt
    embedding, in clusters, or at random where the grid has no room for them. Loss: InfoNCE + `weight` · squared error of the raw
    patch, each of a mask and a pass of its own. over: see `info_nce`; the released code, which the published
    figures are of, is "predictions".

    Published recipe: Adam (0.95, 0.999), 10⁻⁴, batch 24, 10 epochs of AudioSet-2M and LibriSpeech. Fine-tuned on the mean of all
    patch tokens.
    """

    wants = ()
    official: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^module\.", ""), (r"^(mask_embed|cpredlayer|gpredlayer)", r"parts.\1"), (r"^v\.", ""), (r"^p_input_.*", ""),
    )  # fmt: skip
    mask: float = 0.78125
    weight: float = 10.0
    over: str = "targets"

    def __post_init__(self) -> None:
        share(self, "mask")
        if self.over not in ("targets", "predictions"):
            raise VitreousError(f"SSAST: over must be targets or predictions, not '{self.over}'")

    def parts(self, model: nn.Module) -> nn.Module:
        s = shape(model, "SSAST")
        self.draw(s.grid)
        return Heads(s.width, s.patch[0] * s.patch[1] * s.channels)

    def draw(self, grid: tuple[int, int]) -> Tensor:
        """Places `[n]` that are hidden."""
        n = grid[0] * grid[1]
        count = int(self.mask * n)
        some(count, n - 1, f"SSAST: a mask of {self.mask}")
        return clusters(grid, count) if grid[0] > 5 else torch.tensor(random.sample(range(n), count))

    def predict(self, model: nn.Module, parts: nn.Module, x: Tensor, places: Tensor) -> Tensor:
        """Tokens `[B, n, C]` at the hidden `places [B, n]`."""
        assert isinstance(parts, Heads)
        s = shape(model, "SSAST")
        mask = torch.zeros(len(x), s.grid[0] * s.grid[1], dtype=torch.bool, device=x.device).scatter(1, places, True)
        with hiding(model, mask, parts.mask_embed):
            tokens = patch_tokens(model, x)
        return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))

    def losses(self, model: nn.Module, parts: nn.Module, x: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """InfoNCE and squared error, of hidden places `[B, n]` each."""
        assert isinstance(parts, Heads)
        target = patchify(x, shape(model, "SSAST").patch)
        asked = [target.gather(1, p[:, :, None].expand(-1, -1, target.shape[2])) for p in places]
        found = parts.cpredlayer(self.predict(model, parts, x, places[0]))
        made = parts.gpredlayer(self.predict(model, parts, x, places[1]))
        return info_nce(asked[0], found, self.over), F.mse_loss(made, asked[1])

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        assert now.parts is not None
        grid = shape(now.model, "SSAST").grid
        drawn = [torch.stack([self.draw(grid) for _ in batch.images]).to(batch.images.device) for _ in range(2)]
        nce, mse = self.losses(now.model, now.parts, batch.images, (drawn[0], drawn[1]))
        return {"nce": nce, "mse": self.weight * mse}
