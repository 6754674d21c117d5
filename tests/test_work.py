"""Progress of a step that takes long, and going on from what a stopped run has finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vitreous import quant, slim, tokens
from vitreous.errors import VitreousError
from vitreous.files.folders import locked
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


def test_a_changed_part_is_refused(tmp_path: Path) -> None:
    with working(Work(None, tmp_path, "a")):
        part("block", lambda: {"w": torch.arange(6.0)})
        path = tmp_path / "a-block.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        with pytest.raises(VitreousError, match=r"a-block\.safetensors.*changed.*delete it"):
            part("block", dict)


class Scaled(nn.Module):
    def __init__(self, scale: float, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.linear, self.scale, self.act = nn.Linear(3, 3), scale, act
        nn.init.ones_(self.linear.weight), nn.init.ones_(self.linear.bias)


def test_the_fingerprint_depends_on_all_that_decides() -> None:
    x = torch.arange(6.0)
    things = [
        *(x, x + 1, x.reshape(2, 3), x.double(), x.int(), None, "x", [x, x], [x], {"a": x}, {"b": x}, [x, "x"], ("x", x)),
        *(Scaled(1.0), Scaled(2.0), Scaled(1.0, torch.tanh), Scaled(1.0).half(), nn.Linear(3, 3, bias=False)),
        *(tokens.EViT(keep=0.9), tokens.EViT(keep=0.2), ("ab", "c"), ("a", "bc")),
    ]
    assert len({fingerprint(thing) for thing in things}) == len(things)
    assert fingerprint("RepQ()", Scaled(1.0), {"a": x, "b": 1}) == fingerprint("RepQ()", Scaled(1.0), {"b": 1, "a": x.clone()})


def test_a_resumed_run_takes_nothing_from_another_history(vit: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """4-bit weights behind EViT(0.9) are not those behind EViT(0.2), though all weights before are the same."""
    quantizer = quant.WeightOnly(bits=4, rounding="second-order")
    for keep in (0.9, 0.2):
        recipe = [tokens.EViT(keep=keep), quantizer]
        expected, resumed = slim(vit, recipe, images), slim(vit, recipe, images, resume=tmp_path / "kept")
        for name, value in expected.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
    before = len(list((tmp_path / "kept").iterdir()))
    slim(vit, [tokens.EViT(keep=0.2), quantizer], images, resume=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == before, "the same work is taken up again"
    assert not list(tmp_path.glob(".*"))


def test_one_run_at_a_time_in_a_resume_folder(vit: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with locked(tmp_path / "kept"), pytest.raises(VitreousError, match="another --resume"):
        slim(vit, tokens.EViT(), resume=tmp_path / "kept")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "kept", tmp_path / "a\0b"):
        with pytest.raises(VitreousError, match="cannot keep parts"):
            slim(vit, tokens.EViT(), resume=folder)
