"""What a search may combine: of each axis, steps from gentle to strong."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..anatomy import read
from ..errors import VitreousError, nearest
from ..prove.energy import Counters
from ..prune import Heads, NViT
from ..quant import WeightOnly
from ..steps import Step, history_of
from .budget import Goal
from .choose import INTEGERS
from .ways import ladders

AXES = ("tokens", "heads", "mlp", "bits", "runtime")
HEADS = (0.125, 0.25, 0.375, 0.5)  # shares of the heads that go
MLP = (0.9, 0.8, 0.7, 0.6)  # shares of the blocks' work that are left when hidden units go
CHANGES = {  # which limits an axis can help with
    "macs": ("tokens", "heads", "mlp"),
    "memory": ("tokens", "heads", "mlp"),
    "megabytes": ("heads", "mlp", "bits"),
}


def told_by() -> str:
    """What tells of the energy that a model takes on this machine."""
    if Counters().there:
        return "the processor's counters (of all its packages, with whatever else runs on them)"
    return (
        "LPViT's model (16 × 16 weights times tiles of 16 inputs, not measured: tokens, bits and runtimes change nothing in it)"
    )


def space(net: nn.Module, axes: Sequence[str] | None, goal: Goal) -> dict[str, list[list[Step]]]:
    """For each axis its ladders, each from gentle to strong; "runtime" has none, but is there if it may be chosen.

    axes: None for all that the model has. Raises `VitreousError` for one that is unknown or that the model does not have, and
    where none of them can come closer to a limit of `goal`.
    """
    asked = AXES if axes is None else tuple(axes)
    for axis in asked:
        if axis not in AXES:
            raise VitreousError(f"there is no axis {axis!r}{nearest(axis, AXES) or ': give some of ' + ', '.join(AXES)}")
    if not asked:
        raise VitreousError(f"a search needs an axis: give some of {', '.join(AXES)}")
    quantized = [s.name for s in history_of(net).steps() if s.family == "quant"]
    if quantized or getattr(net, "simulated", None):
        made = f" by {quantized[0]}" if quantized else ""
        raise VitreousError(f"the model is quantized already{made}: search from the float model that it was made of")
    anatomy = read(net)
    missing: dict[str, str] = {}
    try:
        anatomy.require_plain("the search")
    except VitreousError as reason:
        missing = {axis: str(reason) for axis in ("tokens", "heads", "mlp")}
    if any(len(getattr(net.get_submodule(b.name), "reducers", ())) for b in anatomy.blocks):
        missing["tokens"] = "it already drops or merges tokens"
    if axes is not None and (lacking := [a for a in asked if a in missing]):
        raise VitreousError(f"this model has no axis {lacking[0]!r}: {missing[lacking[0]]}")
    asked = tuple(a for a in asked if a not in missing)
    modelled = {} if Counters().there else {"energy": ("heads", "mlp")}  # measured, all change it
    for limit, useful in (CHANGES | modelled).items():
        if getattr(goal, limit) is not None and not set(useful) & set(asked):
            said = " as LPViT models it, for this machine shows no counters" if limit == "energy" else ""
            raise VitreousError(f"none of the axes {', '.join(asked)} changes {limit}{said}: add one of {', '.join(useful)}")
    found: dict[str, list[list[Step]]] = {"runtime": []} if "runtime" in asked else {}
    if "tokens" in asked:
        found["tokens"] = [[way.step for way in reversed(ladder)] for ladder in ladders(anatomy)]
    if "heads" in asked:
        found["heads"] = [[Heads(share=s) for s in HEADS]]
    if "mlp" in asked:
        found["mlp"] = [[NViT(keep=k, structures=("mlp",), rounds=4) for k in MLP]]
    if "bits" in asked:
        packed: list[list[Step]] = [[WeightOnly(bits=8), WeightOnly(bits=4)]] if goal.megabytes is not None else []
        found["bits"] = [*([s] for s in INTEGERS), *packed]
    return found
