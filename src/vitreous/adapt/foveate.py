"""A network that looks at its images as a retina does: log-polar samples about the middle take their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers.log_polar import LogPolar
from ..steps import Step, step
from .frozen import after_integers


class Foveated(nn.Module):
    """What `conv` makes of the log-polar image, `[B, C, H, W]` as `conv` takes it."""

    def __init__(self, conv: nn.Conv2d, inner: float) -> None:
        super().__init__()
        self.retina, self.conv = LogPolar(inner), conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.retina(x))

    @property
    def weight(self) -> Tensor:
        """For networks that look at their first layer's type."""
        return self.conv.weight


@step("adapt")
@dataclass(frozen=True)
class Foveate(Step):
    """Jérémie, Daucé and Perrinet, "Foveated Retinotopy Improves Classification and Localization in CNNs" (Vision, 2026): ahead
    of the first convolution the image is sampled on rings about its middle, `inner` (of half its side) the innermost, as many
    rings and angles as it has rows and columns (`mixers.LogPolar`). Turning the image becomes a shift from side to side, and
    enlarging it one from ring to ring.

    The network must learn to read such images: all of it goes on learning. Train it without augmentation of scale or rotation
    when it is compared. What lies outside of the inscribed circle is lost; compare with a network trained on the circle.
    `vt.mixers.log_polar.LogPolar` looks elsewhere (`fixation`). Deployable.
    """

    inner: float = 2**-5

    def __post_init__(self) -> None:
        if not 0 < self.inner < 1:
            raise VitreousError(f"adapt.Foveate: inner must lie in (0, 1), not {self.inner}")

    def refuse_after(self, done: Sequence[Step]) -> str:
        if any(isinstance(s, Foveate) for s in done):
            return "its images are log-polar already"
        return after_integers(done)

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        found = next(((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)
        if found is None:
            raise VitreousError(f"{self.name}: {type(model).__name__} has no convolution that reads its images")
        parent, _, last = found[0].rpartition(".")
        setattr(model.get_submodule(parent), last, Foveated(found[1], self.inner))
