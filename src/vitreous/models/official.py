"""Published variants under their official names, and their official checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import VitreousError, nearest

Build = Callable[..., nn.Module]
Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]

_published: dict[str, tuple[Build, Convert]] = {}


def official(name: str, build: Build, convert: Convert = dict) -> None:
    """Make `name`, as "pvt--pvt_tiny" (system and variant), known to `load_official`.

    `build(**kwargs)` gives the model; `convert` turns the official state dict into ours and must use every tensor.
    """
    _published[name] = build, convert


def variants() -> list[str]:
    """All that `load_official` knows, as "system--variant"."""
    return sorted(_published)


def load_official(variant: str, state: Mapping[str, Tensor], **kwargs: Any) -> nn.Module:
    """The published `variant` with the weights of its official checkpoint, in eval mode.

    `variant` is the official name, as "pvt_tiny", or "system--variant" where several papers use one name (a bare "tiny" is
    told apart by its tensors). `state` has the official repository's own names and is used strictly: a tensor that is
    missing, left over or of another shape raises VitreousError. `kwargs` go to the variant's builder.
    """
    found = [n for n in _published if n == variant or n.partition("--")[2] == variant]
    if not found:
        hint = nearest(variant, [*_published, *(n.partition("--")[2] for n in _published)])
        raise VitreousError(f"no published variant '{variant}'{hint}")
    reasons = []
    for name in found:
        build, convert = _published[name]
        model = build(**kwargs)
        try:
            model.load_state_dict(convert(dict(state)), strict=True)
        except (RuntimeError, KeyError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reasons.append(f"{name}: {' '.join(lines[1:3]) or lines[0]}"[:300])
        else:
            return model.eval()
    raise VitreousError(f"the weights do not fit {'; nor '.join(reasons)}")
