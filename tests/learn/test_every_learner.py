"""What every objective, optimiser and merging rule keeps to, whichever it is."""

from __future__ import annotations

import importlib
import sys

import pytest
import timm
import torch
from learning import pictures, vit
from torch import nn

import vitreous as vt
from vitreous.cli.systems import listed
from vitreous.learn import written
from vitreous.learn.merging import RULES
from vitreous.learn.objective import REGISTRY

SLIMMED = {
    "FRD": vt.tokens.TokenSlimming(keep=0.5, at=(1,)),
    "TokenReductionConsistency": vt.tokens.MCTF(r=1),
    "Connectivity": vt.tokens.Sparsifiner(budget=0.5),
    "SparsifinerDistillation": vt.tokens.Sparsifiner(budget=0.5),
    "KeepRate": vt.tokens.EViT(keep=0.7, at=(1,)),
    "SemanticProxies": [vt.adapt.VPT(prompts=2), vt.adapt.Embed(dims=8)],
    "PHReg": vt.adapt.Registers(count=2),
    "KeepZeros": vt.prune.TwoFour(),
    "GPUSQ": vt.prune.TwoFour(),
}
NARROW = {
    "MAE": dict(width=16, depth=1, heads=2),
    "FSFM": dict(width=16, depth=1),
    "SelfPatch": dict(local=1, prototypes=64, patch_prototypes=32),
    "POA": dict(local=0, prototypes=(64,)),
}
WITHOUT_LOSS = ("AttentionSparsity", "EWA", "KeepRate", "KeepZeros", "SlimFit")
FOR_PLAIN = (
    "AlignToTable", "AttentionSparsity",
    "BinaryCrossEntropy", "CrossEntropy", "FeatureMatch", "KD", "NKD", "USKD", "EWA", "DeiTLT", "InstaTune", "SlimFit",
    *SLIMMED,
)  # fmt: skip


def student(name: str) -> nn.Module:
    model = vit(patch_size=4)
    if name == "DeiTLT":
        torch.manual_seed(0)
        size = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4)
        return timm.create_model("deit_tiny_distilled_patch16_224", **size).eval()
    if name == "EWA":
        return vt.learn.with_experts(model)
    return vt.slim(model, SLIMMED[name]) if name in SLIMMED else model


def made(name: str) -> vt.learn.Objective:
    if name == "AlignToTable":
        return vt.learn.AlignToTable(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    if name == "SemanticProxies":
        return vt.learn.SemanticProxies(classes=4)
    fields = REGISTRY[name].__dataclass_fields__
    if name in NARROW:
        return REGISTRY[name](**NARROW[name])
    return REGISTRY[name](**({"teacher": vit(patch_size=4)} if "teacher" in fields else {}))


@pytest.mark.parametrize("name", REGISTRY)
def test_objectives(name: str) -> None:
    """The model keeps its parts and changes, a second run gives the same weights, and the teacher stands still; or, where the
    objective is for other models than a plain ViT, it says so."""
    model, objective, data = student(name), made(name), pictures()
    teacher = getattr(objective, "teacher", None)
    before = {k: v.clone() for k, v in teacher.state_dict().items()} if teacher is not None else {}
    both = [objective, vt.learn.CrossEntropy()] if name in WITHOUT_LOSS else [objective]
    settings = dict(epochs=0.5, batch=32, augment=None)
    try:
        once, again = (vt.train(model, data, both, **settings) for _ in range(2))
    except vt.VitreousError as error:
        assert name not in FOR_PLAIN, error
        return
    assert once.state_dict().keys() == model.state_dict().keys() and not once.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in once.state_dict().items())
    assert any(not torch.equal(v, model.state_dict()[k]) for k, v in once.state_dict().items())
    for k, v in before.items():
        assert torch.equal(v, teacher.state_dict()[k])
    assert type(written.objectives(f"{name}()")[0]) is type(objective) if name != "AlignToTable" else True


@pytest.mark.parametrize("name", [n for n in FOR_PLAIN if "teacher" in REGISTRY[n].__dataclass_fields__])
def test_no_teacher(name: str) -> None:
    with pytest.raises(vt.VitreousError, match="teacher"):
        vt.train(student(name), pictures(), REGISTRY[name](), epochs=1, batch=32, augment=None)


@pytest.mark.parametrize("name", written.OPTIMISERS)
def test_optimisers(name: str) -> None:
    """Weights that do not learn stay, the rest falls; biases and norms do not decay."""
    model, data = vit(), pictures()
    model.cls_token.requires_grad_(False)
    taught = vt.train(model, data, optimiser=written.optimiser(f"{name}()"), epochs=1, batch=32, augment=None)
    assert torch.equal(taught.cls_token, model.cls_token)
    groups = written.optimiser(f"{name}(weight_decay=0.3)").make(model, nn.Identity()).param_groups
    assert {g["weight_decay"] for g in groups for p in g["params"] if p.ndim < 2} == {0.0}
    assert {g["weight_decay"] for g in groups for p in g["params"] if p.ndim == 2} == {0.3}


@pytest.mark.parametrize("name", RULES)
def test_merging_rules(name: str) -> None:
    """Twice the same model is that model, its integers too, and neither argument changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()
    model[2].num_batches_tracked.fill_(7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    base = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()
    data = pictures() if RULES[name].needs_data else None
    if name == "PLeaS":
        with pytest.raises(vt.VitreousError, match="choose a transformer"):
            vt.merge([model, model], RULES[name](), data=data)
        return
    merged = vt.merge([model, model], RULES[name](), base=base if RULES[name].needs_base else None, data=data)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert data is not None or merged[2].num_batches_tracked == 7
    if not RULES[name].needs_base:
        assert all(torch.allclose(v, before[k], atol=1e-6) for k, v in merged.state_dict().items() if k.startswith(("1", "3")))


def test_every_system_has_an_entry_that_is_there() -> None:
    for row in [r for f in ("distill", "optimise", "adapt", "pretrain") for r in listed(f)]:
        for entry in row["entry"].split(", "):
            module, _, name = entry.rpartition(".")
            held = sys.modules.get(module) or importlib.import_module(module)
            assert hasattr(held, name), entry
