"""Checkpoints as people save them open as what they are: the right tensors, and everything said that was done to them."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from families import FAMILIES
from safetensors.torch import save_file
from support import command
from timm.models import save_for_hf
from torch import nn

import vitreous as vt
from vitreous.models.official import SIDES, fitting_side
from vitreous.outputs import answer
from vitreous.store.checkpoints import read_safetensors
from vitreous.store.record import read_record

NAME = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8)
State = dict[str, torch.Tensor]


def made(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(NAME, **{**SMALL, "img_size": 32, "num_classes": 5, **kwargs}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def opened(path: Path, **kwargs: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return vt.open(NAME, checkpoint=path, **{**SMALL, **kwargs})


def same(one: nn.Module, other: nn.Module, side: int = 32) -> bool:
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return torch.equal(one(x), other(x))


def under(prefix: str, state: State) -> State:
    return {prefix + k: v for k, v in state.items()}


def noise(*names: str) -> State:
    return {name: torch.randn(7, 6) for name in names}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
OTHER = made(seed=1).state_dict()
# how a state dict is wrapped; always the same network inside
WAYS: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "training": lambda s: {"model_state_dict": s, "optimizer_state_dict": OPTIMIZER, "epoch": 3, "loss": 0.5},
    "DDP": lambda s: under("module.", s),
    "compiled": lambda s: {"state_dict": under("_orig_mod.", s)},
    "compiled inside DDP": lambda s: {"model": under("module._orig_mod.", s)},
    "DDP inside compiled": lambda s: under("_orig_mod.module.", s),
    "block by block compiled": lambda s: {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in s.items()},
    "FSDP": lambda s: {k.replace("blocks.", "_fsdp_wrapped_module.blocks."): v for k, v in s.items()},
    "Lightning": lambda s: {
        "epoch": 1,
        "pytorch-lightning_version": "2.5",
        "state_dict": under("model.", s) | noise("criterion.weight"),
        "optimizer_states": [OPTIMIZER],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.3)}},
        "hyper_parameters": {"lr": 0.1},
    },
    "net": lambda s: {"net": s, "acc": 91.5, "epoch": 7},
    "two wrappers of one's own": lambda s: {"state_dict": under("module.student.vit.", s)},
    "EMA of timm": lambda s: {"state_dict": OTHER, "state_dict_ema": s, "optimizer": OPTIMIZER, "metric": np.float64(71.2)},
    "EMA of DeiT": lambda s: {"model": OTHER, "model_ema": s, "scaler": {"scale": 65536.0}},
    "EMA in a module": lambda s: {"ema": {"module": under("module.", s), "decay": 0.999}, "model": OTHER},
    "EMA beside it in one dict": lambda s: under("model.", OTHER) | under("ema_model.", s),
    "an empty EMA": lambda s: {"state_dict": s, "state_dict_ema": None},
    "DINO": lambda s: {
        "teacher": under("backbone.", s) | noise("head.mlp.0.weight", "head.last_layer.weight_v"),
        "student": under("module.backbone.", OTHER),
        "optimizer": OPTIMIZER,
    },
    "teacher and student in one dict": lambda s: under("student.backbone.", OTHER) | under("teacher.backbone.", s),
    "I-JEPA": lambda s: {"target_encoder": under("module.", s), "encoder": under("module.", OTHER), "predictor": noise("a.b")},
    "MAE": lambda s: {"model": s | noise("mask_token", "decoder_embed.weight", "decoder_blocks.0.mlp.fc1.weight")},
    "a name of one's own": lambda s: {"my_vit": s, "optimizer": OPTIMIZER},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_network_comes_out(way: str, tmp_path: Path) -> None:
    model = made()
    torch.save(WAYS[way](model.state_dict()), tmp_path / "w.pth")
    assert same(opened(tmp_path / "w.pth", img_size=32, num_classes=5), model)
    assert same(opened(tmp_path / "w.pth"), model), "size and number of classes are the file's where they are not told"


def trained(**args: Any) -> dict[str, Any]:
    """What timm's train.py saves."""
    told = argparse.Namespace(model=NAME, num_classes=5, img_size=32, in_chans=None, mean=None, std=None, gp=None, class_map="")
    told.interpolation, told.crop_pct, told.input_size = "", None, None  # the script's own defaults
    told.model_kwargs, told.output = dict(SMALL), Path("out")
    vars(told).update(args)
    return {"epoch": 9, "arch": NAME, "state_dict": made().state_dict(), "optimizer": OPTIMIZER, "version": 2, "args": told}


def test_a_file_of_timms_training_tells_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "map.txt").write_text("elk\nfox\nowl\nemu\nape\n")
    told: dict[str, Any] = dict(mean=(0.1, 0.2, 0.3), std=[0.3, 0.2, 0.1], crop_pct=0.8, interpolation="bilinear")
    torch.save(trained(**told, class_map=str(tmp_path / "map.txt")), tmp_path / "model_best.pth.tar")
    with pytest.warns(UserWarning, match="built as the file tells: .*img_size=32"):
        model: Any = vt.open(tmp_path / "model_best.pth.tar")
    assert same(model, made())
    known = model.pretrained_cfg
    assert known["mean"] == (0.1, 0.2, 0.3) and known["std"] == (0.3, 0.2, 0.1) and known["crop_pct"] == 0.8
    assert known["interpolation"] == "bilinear" and known["label_names"] == ("elk", "fox", "owl", "emu", "ape")
    vt.save(model, tmp_path / "again.safetensors")
    again: Any = vt.open(tmp_path / "again.safetensors")
    assert same(again, model) and again.pretrained_cfg["label_names"] == known["label_names"]
    asked = ["anatomy", NAME, "--checkpoint", str(tmp_path / "model_best.pth.tar"), "--mean", "0.5"]
    status, _, error = command(monkeypatch, capsys, *asked)
    assert status == 0 and "weights: 'state_dict' of model_best.pth.tar" in error and "embed_dim=32" in error
    assert "bilinear to 32 x 32, the middle 80 %" in error and "mean 0.5, std 0.3 0.2 0.1" in error, "what is asked for wins"
    assert "5 classes: elk, fox" in error


def test_nothing_else_is_unpickled(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    torch.save(trained(callback=Harm()), tmp_path / "w.pth")
    with pytest.raises(vt.VitreousError, match=r"pickled code \(builtins.getattr, pathlib.Path\).*never run"):
        vt.open(tmp_path / "w.pth")
    assert not ran.exists()


@pytest.mark.parametrize("head", ["head", "classifier", "fc"])
def test_a_backbone_with_a_head_of_its_own(head: str, tmp_path: Path) -> None:
    model = made()
    state = model.state_dict()
    own = {f"{head}.{p}": state.pop(f"head.{p}") for p in ("weight", "bias")}
    torch.save(under("backbone.", state) | own, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=f"classifier: '{head}'"):
        whole = vt.open(NAME, checkpoint=tmp_path / "w.pth", **SMALL)
    assert same(whole, model)
    features = opened(tmp_path / "w.pth", num_classes=0)
    assert same(nn.Sequential(features, model.head), model)


def test_a_head_that_is_not_there_or_not_asked_for(tmp_path: Path) -> None:
    model = made()
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    torch.save({k: v for k, v in model.state_dict().items() if not k.startswith("head")}, tmp_path / "bare.pth")
    for name, kwargs in (("bare.pth", {}), ("whole.pth", {"num_classes": 0})):
        assert same(nn.Sequential(opened(tmp_path / name, **kwargs), model.head), model)
    with pytest.raises(vt.VitreousError, match="its head is for 5 classes, leave num_classes out"):
        opened(tmp_path / "whole.pth", num_classes=6)


def test_shapes_of_the_file_decide_and_other_sizes_are_resampled(tmp_path: Path) -> None:
    model = made(patch_size=4, in_chans=1, global_pool="avg")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    told = {k: v for k, v in SMALL.items() if k != "patch_size"}
    with pytest.warns(UserWarning, match="in_chans=1, patch_size=4, img_size=32, global_pool='avg'"):
        again: Any = vt.open(NAME, checkpoint=tmp_path / "w.pth", **told)
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    torch.save(made().state_dict(), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"'pos_embed' resampled from \(1, 17, 32\) to \(1, 37, 32\)"):
        vt.open(NAME, checkpoint=tmp_path / "w.pth", img_size=48, **SMALL)
    with pytest.warns(UserWarning, match="'patch_embed.proj.weight' resampled"):
        vt.open(NAME, checkpoint=tmp_path / "w.pth", img_size=64, **(SMALL | {"patch_size": 16}))


SHAPE = dict(depth=1, embed_dim=32, num_heads=2, num_classes=3)
WINDOWED = dict(window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2), num_classes=3)
TABLES: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": dict(img_size=32, patch_size=8, use_rel_pos_bias=True, **SHAPE),
    "vit_relpos_small_patch16_224": dict(img_size=32, patch_size=8, **SHAPE),
    "eva02_tiny_patch14_224": dict(img_size=28, patch_size=7, **SHAPE),
    "swin_tiny_patch4_window7_224": dict(img_size=64, **WINDOWED),
    "swinv2_tiny_window8_256": dict(img_size=64, **WINDOWED),
}


@pytest.mark.parametrize("name", TABLES)
def test_other_families_at_another_size(name: str, tmp_path: Path) -> None:
    kwargs = TABLES[name]
    model = timm.create_model(name, **kwargs).eval()
    torch.save({"model": under("module.", model.state_dict())}, tmp_path / "w.pth")
    larger = {**kwargs, "img_size": 2 * kwargs["img_size"]} | ({"window_size": 8} if "window_size" in kwargs else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(vt.open(name, checkpoint=tmp_path / "w.pth", **kwargs), model, kwargs["img_size"])
        other = vt.open(name, checkpoint=tmp_path / "w.pth", **larger)
    with torch.no_grad():
        assert other(torch.randn(1, 3, larger["img_size"], larger["img_size"])).shape == (1, 3)


def test_official_names_of_dinov2_with_registers(tmp_path: Path) -> None:
    name, kwargs = "vit_small_patch14_reg4_dinov2", dict(img_size=28, embed_dim=32, depth=1, num_heads=2, patch_size=14)
    model: Any = timm.create_model(name, **kwargs).eval()
    state = model.state_dict()
    official = {k: v for k, v in state.items() if k not in ("cls_token", "reg_token", "pos_embed")}
    first = torch.randn(1, 1, 32)
    official |= {"register_tokens": state["reg_token"], "cls_token": state["cls_token"] - first, "mask_token": torch.zeros(1, 32)}
    official["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
    for way in (lambda s: s, lambda s: {"teacher": under("backbone.", s) | noise("dino_head.mlp.0.weight")}):
        torch.save(way(official), tmp_path / "w.pth")
        with pytest.warns(UserWarning, match="converted from another library"):
            again: Any = vt.open(name, checkpoint=tmp_path / "w.pth", **kwargs)
        assert torch.equal(again.reg_token, model.reg_token) and torch.equal(again.pos_embed, model.pos_embed)
        assert torch.allclose(again.cls_token, model.cls_token, atol=1e-6)


def test_openai_names_of_clip(tmp_path: Path) -> None:
    name = "vit_base_patch16_clip_224.openai"
    model: Any = timm.create_model(name, img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=12).eval()
    s = model.state_dict()
    block, to = "visual.transformer.resblocks.0.", {"attn.qkv.": "attn.in_proj_", "attn.proj.": "attn.out_proj."}
    to |= {"norm1.": "ln_1.", "norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj."}
    official = {block + there + p: s[f"blocks.0.{here}{p}"] for here, there in to.items() for p in ("weight", "bias")}
    official |= {"visual.class_embedding": s["cls_token"][0, 0], "visual.positional_embedding": s["pos_embed"][0]}
    norms = (("norm_pre", "ln_pre"), ("norm", "ln_post"))
    official |= {f"visual.{b}.{p}": s[f"{a}.{p}"] for a, b in norms for p in ("weight", "bias")}
    official |= {"visual.conv1.weight": s["patch_embed.proj.weight"], "visual.proj": s["head.weight"].T}
    official["logit_scale"] = torch.ones(())
    save_file({k: v.contiguous() for k, v in official.items()}, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="converted"):
        again = vt.open(name, checkpoint=tmp_path / "w.safetensors", img_size=32, embed_dim=32, depth=1, num_heads=2)
    assert same(again, model)


def test_weights_go_into_a_module_of_ones_own(tmp_path: Path) -> None:
    torch.save({"model": under("module.", made().state_dict())}, tmp_path / "w.pth")
    assert same(vt.open(made(seed=2), checkpoint=tmp_path / "w.pth"), made())
    with pytest.raises(vt.VitreousError, match="taken as it is built: leave num_classes out"):
        vt.open(made(), num_classes=5)


def test_refusals_say_the_reason(tmp_path: Path) -> None:
    state = made().state_dict()
    cases: dict[str, tuple[Any, str]] = {
        "two sets": ({"first": state, "second": state}, r"several sets of weights \(first, second\)"),
        "another network": (
            under("resnet.", {"layer1.0.conv1.weight": torch.ones(3, 3)}),
            "names in the file begin with 'resnet.'",
        ),
        "a part only": ({k: v for k, v in state.items() if "blocks.1" not in k}, "missing"),
        "a norm too many": (state | {"norm_pre.weight": torch.ones(32)}, "unknown"),
        "no weights": ({"epoch": 3}, "no state dict"),
        "a list": ([1, 2], "no state dict"),
    }
    for name, (held, message) in cases.items():
        torch.save(held, tmp_path / "w.pth")
        with pytest.raises(vt.VitreousError, match=message):
            opened(tmp_path / "w.pth")
            pytest.fail(name)
    vt.save(vt.open(NAME, **SMALL, img_size=32), tmp_path / "s.safetensors")
    with pytest.raises(vt.VitreousError, match="built as it was saved: leave img_size out"):
        vt.open(tmp_path / "s.safetensors", img_size=64)


def test_a_folder_of_hugging_face(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
    config = transformers.ViTConfig(**size, id2label={0: "elk", 1: "fox"}, label2id={"elk": 0, "fox": 1})
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "m")
    told = {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2], "resample": 2}
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(told | {"size": {"height": 32, "width": 32}}))
    again: Any = vt.open(tmp_path / "m")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
    cfg = again.pretrained_cfg
    assert cfg["label_names"] == ("elk", "fox") and cfg["mean"] == (0.4, 0.5, 0.6) and cfg["interpolation"] == "bilinear"
    assert cfg["input_size"] == (3, 32, 32) and cfg["crop_mode"] == "squash" and cfg["crop_pct"] == 1
    with pytest.raises(vt.VitreousError, match=r"config.json says: leave num_classes out"):
        vt.open(tmp_path / "m", num_classes=3)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    with pytest.raises(vt.VitreousError, match="has no 'NoSuchModel'"):
        vt.open(tmp_path / "m")


def test_a_model_of_hugging_face_is_saved_whole(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    for name in ("HF ViT", "HF DINOv2, registers", "HF SigLIP", "HF DINOv3"):
        model: Any = FAMILIES[name].make()
        small = vt.slim(model, vt.tokens.EViT(keep=0.5)) if name != "HF DINOv3" else model
        again = vt.load(vt.save(small, tmp_path / "s.safetensors"))
        with torch.no_grad():
            torch.testing.assert_close(answer(again(x)), answer(small(x)), atol=0, rtol=0, msg=name)
    text = read_safetensors(tmp_path / "s.safetensors")[1]["vitreous"]
    read_record(text, "s")
    for harm, message in (('"hidden_size": "/etc"', "no plain value"), ('"use_backbone": 1', "none of its architecture's")):
        with pytest.raises(vt.VitreousError, match=message):
            read_record(text.replace('"hidden_size": 48', harm), "s")
    for other in ("NoSuchModel", "TimmWrapperModel", "PreTrainedModel"):
        with pytest.raises(vt.VitreousError, match="has no"):
            read_record(text.replace("DINOv3ViTModel", other), "s")


def test_a_folder_of_timm(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    told = dict(model_config={"label_names": ["owl", "fox"]}, model_args=dict(img_size=32, depth=1))
    save_for_hf(model, tmp_path / "m", safe_serialization=True, **told)
    again: Any = vt.open(tmp_path / "m")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.pretrained_cfg["mean"] == (0.1, 0.2, 0.3) and again.pretrained_cfg["label_names"] == ("owl", "fox")
    with torch.no_grad():
        assert torch.equal(vt.load(vt.save(again, tmp_path / "s.safetensors"))(x), model(x))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "model_args": {"checkpoint_path": "/etc/passwd"}}))
    with pytest.raises(vt.VitreousError, match="makes timm read files"):
        vt.open(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(vt.VitreousError, match=r"has no model\.safetensors and no"):
        vt.open(tmp_path / "m")


def test_what_the_script_was_not_told_stays_the_names_own(tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = vt.open(tmp_path / "w.pth")
    assert model.pretrained_cfg["interpolation"] == "bicubic" and model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_sizes_are_tried_only_where_most_weights_fit(share: float) -> None:
    tried: list[int] = []

    def build(img_size: int) -> nn.Module:
        tried.append(img_size)
        return nn.Identity()

    assert fitting_side(nn.Identity(), build, lambda _: share) is None
    assert tried == ([] if share < 0.5 else [*SIDES])
