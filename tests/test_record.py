"""A saved file decides nothing: what it may say is checked before anything is built, and all else is one `VitreousError`."""

from __future__ import annotations

import copy
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import SMALL
from torch import Tensor, nn

import vitreous as vt
from vitreous.store.record import arguments

SHAPE = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = vt.open("vit_tiny_patch16_224", **SHAPE)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    small = vt.slim(model, [vt.prune.Heads(share=0.3), vt.tokens.EViT(keep=0.5), vt.quant.MinMax(weights=4)], images)
    return vt.save(small, tmp_path_factory.mktemp("saved") / "model.safetensors")


def tampered(saved: Path, target: Path, change: Callable[[dict[str, Any]], object], **tensors: Tensor) -> Path:
    """A copy whose record was changed by someone who left the sum out."""
    with safe_open(saved, "pt") as f:
        state, about = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["vitreous"])  # noqa: SIM118
    changed = change(about)
    save_file(state | tensors, target, {"vitreous": changed if isinstance(changed, str) else json.dumps(about)})
    return target


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(about: dict[str, Any]) -> None:
        at: Any = about
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "checkpoint path": (put("base", "kwargs", "checkpoint_path", value="/etc/passwd"), "none of its architecture's"),
    "configuration": (put("base", "kwargs", "pretrained_cfg", value={"url": "http://x"}), "none of its architecture's"),
    "overlay": (put("base", "kwargs", "pretrained_cfg_overlay", value={"file": "x"}), "none of its architecture's"),
    "pretrained": (put("base", "kwargs", "pretrained", value=True), "none of its architecture's"),
    "cache": (put("base", "kwargs", "cache_dir", value="/tmp"), "none of its architecture's"),
    "self": (put("base", "kwargs", "self", value=1), "none of its architecture's"),
    "a path as a value": (put("base", "kwargs", "global_pool", value="/etc/passwd"), "no plain value"),
    "a mapping as a value": (put("base", "kwargs", "global_pool", value={"a": 1}), "no plain value"),
    "hub": (put("base", "name", value="hf-hub:timm/x"), "network"),
    "old hub": (put("base", "name", value="hf_hub:timm/x"), "network"),
    "folder": (put("base", "name", value="local-dir:/tmp"), "network or another folder"),
    "unknown architecture": (put("base", "name", value="os.system"), "unknown model"),
    "name of a line": (put("base", "name", value="vit_tiny_patch16_224\n"), "unknown model"),
    "name of no word": (put("base", "name", value=3), "by a name"),
    "long name": (put("base", "name", value="x" * 10_000), "unknown model"),
    "base is a list": (put("base", value=[1]), "no mapping"),
    "arguments are a list": (put("base", "kwargs", value=[1]), "no arguments of its model"),
    "more in the base": (put("base", "more", value=1), "damaged"),
    "more in the record": (put("more", value=1), "cannot be read"),
    "no steps": (lambda about: about.pop("steps") and None, "cannot be read"),
    "steps are a mapping": (put("steps", value={}), "no list"),
    "a step is a number": (put("steps", 0, value=3), "no name or no plan"),
    "unknown step": (put("steps", 0, "step", value="os.system"), "unknown step"),
    "unknown parameter": (put("steps", 1, "__class__", value=1), "no parameter"),
    "parameter out of range": (put("steps", 1, "keep", value=7.0), "keep"),
    "parameter of another type": (put("steps", 1, "keep", value=[1]), "must be float"),
    "block that is not there": (put("steps", 1, "at", value=[99]), "no block 99"),
    "huge block": (put("steps", 1, "at", value=[10**30]), "must be finite|must be tuple"),
    "bits out of range": (put("steps", 2, "weights", value=99), "bits"),
    "no plan": (lambda about: about["steps"][0].pop("plan") and None, "no name or no plan"),
    "plan is a list": (put("steps", 0, "plan", value=[]), "no such plan"),
    "another step's plan": (put("steps", 0, "plan", value={"reduce_range": True, "layers": {}, "bits": {}}), "no such plan"),
    "no plan where one is needed": (put("steps", 0, "plan", value={}), "'heads' in its plan"),
    "heads that are words": (put("steps", 0, "plan", "heads", value=[["a"]] * 3), "'heads' in its plan"),
    "heads that are not there": (put("steps", 0, "plan", "heads", value=[[99], [], []]), "removes heads"),
    "heads of fewer blocks": (put("steps", 0, "plan", "heads", value=[[0]]), "blocks"),
    "all heads": (put("steps", 0, "plan", "heads", value=[[0, 1, 2], [], []]), "removes heads"),
    "layer that is not there": (put("steps", 2, "plan", "layers", value={"head.x": ["", ""]}), "does not fit"),
    "layer that is none": (put("steps", 2, "plan", "layers", value={"blocks.0.norm1": ["", ""]}), "does not fit"),
    "layer with one word": (put("steps", 2, "plan", "layers", value={"head": ["norm"]}), "does not fit"),
    "bits that cannot be": (put("steps", 2, "plan", "bits", value={"head": [99, 8]}), "'bits' in its plan"),
    "bits of one": (put("steps", 2, "plan", "bits", value={"head": [4]}), "does not fit"),
    "deep": (lambda about: "[" * 100_000, "nested too deeply"),
    "not JSON": (lambda about: "{", "not JSON"),
    "not a number": (lambda about: json.dumps(about).replace("0.5", "NaN"), "no number"),
    "endless": (lambda about: json.dumps(about).replace("0.5", "1e999"), "must be finite"),
    "thousands of digits": (lambda about: json.dumps(about).replace("0.5", "9" * 5000), "not JSON|must be"),
    "twice": (lambda about: json.dumps(about)[:-1] + ', "base": null}', "twice"),
    "a word alone": (lambda about: '"x"', "cannot be read"),
    "nothing": (lambda about: "null", "cannot be read"),
    "huge width": (put("base", "kwargs", "embed_dim", value=3 * 2**16), "million numbers"),
    "huger width": (put("base", "kwargs", "embed_dim", value=10**12), "no plain value"),
    "huge depth": (put("base", "kwargs", "depth", value=10**6), "tensors"),
    "huge image": (put("base", "kwargs", "img_size", value=2**18), "million numbers"),
    "negative width": (put("base", "kwargs", "embed_dim", value=-3), "building it failed"),
    "no head": (put("base", "kwargs", "num_heads", value=0), "building it failed"),
    "another head": (put("base", "kwargs", "num_heads", value=6), "does not fit|do not fit"),
    "another number of classes": (put("base", "kwargs", "num_classes", value=3), "do not fit"),
    "images in words": (put("expects", value={"mean": {"a": 1}}), "expects"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_tampered_files_are_refused(case: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    change, why = CHANGES[case]
    path = tampered(saved, tmp_path / "bad.safetensors", change)
    for open_it in (vt.load, vt.open):
        with pytest.raises(vt.VitreousError, match=why) as caught:
            open_it(path)
        assert len(str(caught.value)) < 1500


def test_what_was_not_tampered_with_loads(saved: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vt.load(saved)(x)
        assert torch.equal(vt.load(tampered(saved, tmp_path / "same.safetensors", lambda about: None))(x), expected)


def test_hubs_and_folders_are_asked_for(tmp_path: Path) -> None:
    for name in ("hf-hub:timm/vit_tiny_patch16_224", f"local-dir:{tmp_path}"):
        with pytest.raises(vt.VitreousError, match="ask for pretrained"):
            vt.open(name)


def test_arguments_that_read_files_are_asked_for() -> None:
    given: dict[str, Any] = {"checkpoint_path": "/etc/passwd", "pretrained_cfg": {"url": "http://x"}, "cache_dir": "/tmp"}
    for key, value in given.items():
        for name in ("vit_tiny_patch16_224", None):
            with pytest.raises(vt.VitreousError, match=f"'{key}' makes timm read"):
                vt.open(name, **{key: value})
    with pytest.raises(vt.VitreousError, match="'checkpoint_path' makes timm read"):
        vt.open("vit_tiny_patch16_224", pretrained=True, checkpoint_path="/etc/passwd")


def test_every_bit_counts(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    path = tmp_path / "flipped.safetensors"
    for seed in range(60):
        place = int(torch.randint(len(whole), (), generator=torch.Generator().manual_seed(seed))) if seed > 20 else seed * 150
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (seed % 8)
        path.write_bytes(flipped)
        with pytest.raises(vt.VitreousError):
            vt.load(path)


def test_weights_that_are_not_finite_or_compute_what_is_not(saved: Path, tmp_path: Path) -> None:
    model = vt.open("vit_tiny_patch16_224", **SHAPE)
    plain = vt.save(model, tmp_path / "plain.safetensors")
    for value, why in ((float("nan"), "holds NaN"), (float("inf"), "holds NaN or infinity"), (3e38, "what they compute is not")):
        weights = {"blocks.1.norm1.weight": torch.full((48,), value)}
        with pytest.raises(vt.VitreousError, match=why):
            vt.load(tampered(plain, tmp_path / "m.safetensors", lambda about: None, **weights))
        save_file({**model.state_dict(), **weights}, tmp_path / "checkpoint.safetensors")
        with pytest.raises(vt.VitreousError, match=why):
            vt.open("vit_tiny_patch16_224", checkpoint=tmp_path / "checkpoint.safetensors", **SHAPE)


def test_two_saves_of_one_model_are_equal(tmp_path: Path) -> None:
    model = vt.slim(vt.open(), [vt.tokens.EViT(keep=0.5)])
    first = vt.save(model, tmp_path / "a.safetensors").read_bytes()
    for i in range(8):
        assert vt.save(copy.deepcopy(model), tmp_path / f"{i}.safetensors").read_bytes() == first
    assert vt.save(vt.load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors").read_bytes() == first


def test_compiled_models_are_saved_under_their_own_names(tmp_path: Path) -> None:
    model = vt.open()
    plain = vt.save(model, tmp_path / "plain.safetensors").read_bytes()
    whole: Any = torch.compile(model)
    assert vt.save(whole, tmp_path / "whole.safetensors").read_bytes() == plain
    blocks: Any = model.get_submodule("blocks")
    blocks[1] = torch.compile(blocks[1])
    assert vt.save(model, tmp_path / "part.safetensors").read_bytes() == plain
    vt.load(tmp_path / "part.safetensors")


def test_a_model_that_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    model = vt.open("vit_tiny_patch16_224", **SHAPE, norm_layer=nn.LayerNorm)
    with pytest.raises(vt.VitreousError, match="plain values"):
        vt.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_arguments_that_architectures_take_are_allowed() -> None:
    for small in SMALL.values():
        assert {*small.arguments, *(small.resized or {})} <= arguments(small.name), small.name
    assert "img_size" in arguments("vit_small_patch14_reg4_dinov2.lvd142m")
    assert not {"checkpoint_path", "pretrained_cfg", "cache_dir"} & arguments("convnext_tiny")


def test_recursion_is_left_as_it_was(saved: Path, tmp_path: Path) -> None:
    limit = sys.getrecursionlimit()
    with pytest.raises(vt.VitreousError):
        vt.load(tampered(saved, tmp_path / "deep.safetensors", lambda about: '{"base":' * 100_000))
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize("asked", [{"depth": 10**6}, {"embed_dim": 3 * 10**6}, {"num_classes": 10**12}])
def test_models_that_no_memory_holds_are_refused_at_once(asked: dict[str, Any]) -> None:
    with pytest.raises(vt.VitreousError, match=r"weights take|over 1000 layers"):
        vt.open("vit_tiny_patch16_224", **asked)
