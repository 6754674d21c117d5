"""Progress of a step that takes long, and going on from what a stopped run has finished."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitreous.errors import VitreousError
from vitreous.work import Work, fingerprint, part, tick, working


def test_parts_are_made_once_for_the_same_work(tmp_path: Path) -> None:
    made: list[str] = []

    def make() -> dict[str, Tensor]:
        made.append("made")
        return {"w": torch.arange(6.0).reshape(2, 3).T}

    told: list[float] = []
    for key in ("a", "a", "b"):
        with working(Work(told.append, tmp_path, key)):
            assert torch.equal(part("block 0", make)["w"], torch.arange(6.0).reshape(2, 3).T)
            tick(0.5)
    assert len(made) == 2 and told == [0.5] * 3
    assert part("block 0", make) and len(made) == 3, "outside of a work nothing is kept"
    tick(1.0)
    assert told == [0.5] * 3


def test_a_broken_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "a-block.safetensors").write_bytes(b"half")
    with working(Work(None, tmp_path, "a")), pytest.raises(VitreousError, match=r"a-block\.safetensors.*delete it"):
        part("block", dict)


def test_the_fingerprint_depends_on_every_value() -> None:
    x = torch.arange(6.0)
    assert fingerprint("RepQ()", x) == fingerprint("RepQ()", x.clone())
    assert (
        len({fingerprint("RepQ()", x), fingerprint("MinMax()", x), fingerprint("RepQ()", x + 1), fingerprint("RepQ()", None)})
        == 4
    )
