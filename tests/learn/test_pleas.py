"""Merging by permutations and least squares."""

from __future__ import annotations

import copy

import pytest
import torch
from learning import pictures, vit

import vitreous as vt
from vitreous.learn.matching import Units, _permute_stream


def scrambled(model):
    """The same function with its channels, heads and hidden units in another order."""
    new = copy.deepcopy(model)
    g = torch.Generator().manual_seed(3)
    units = Units(new, pictures(8)[0])
    _permute_stream(units, torch.randperm(24, generator=g))
    with torch.no_grad():
        for block in new.blocks:
            heads = torch.randperm(3, generator=g)
            rows = torch.cat([h * 8 + torch.randperm(8, generator=g) for h in heads])
            order = torch.cat([rows, rows + 24, rows + 48])
            block.attn.qkv.weight.copy_(block.attn.qkv.weight[order])
            block.attn.qkv.bias.copy_(block.attn.qkv.bias[order])
            block.attn.proj.weight.copy_(block.attn.proj.weight[:, rows])
            hidden = torch.randperm(96, generator=g)
            block.mlp.fc1.weight.copy_(block.mlp.fc1.weight[hidden])
            block.mlp.fc1.bias.copy_(block.mlp.fc1.bias[hidden])
            block.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, hidden])
    return new


def strong():
    model = vit()
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model


def test_a_model_and_itself_in_another_order_merge_to_itself():
    x, y = pictures()
    model = strong()
    other = scrambled(model)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(vt.merge([model, other], vt.learn.UniformSoup())(x), model(x), atol=0.1)
        for rule in (vt.learn.PLeaS(squares=False), vt.learn.PLeaS()):
            torch.testing.assert_close(vt.merge([model, other], rule, data=(x, y))(x), model(x), rtol=1e-2, atol=1e-3)


def test_two_models_that_learnt_apart(tmp_path):
    x, y = pictures(128)
    models = [vt.train(vit() if s == 0 else strong(), (x, y), epochs=4, batch=32, augment=None, seed=s) for s in range(2)]
    loss = lambda m: float(torch.nn.functional.cross_entropy(m(x), y).detach())
    notes: list[str] = []
    merged = vt.merge(models, vt.learn.PLeaS(), data=(x, y), notes=notes)
    assert loss(merged) < loss(vt.merge(models, vt.learn.UniformSoup())) and "fitted" in notes[0]
    wide = vt.merge(models, vt.learn.PLeaS(ratio=0.5), data=(x, y))
    assert wide.blocks[0].mlp.fc1.out_features == 144 == wide.blocks[1].mlp.fc2.in_features
    assert torch.isfinite(wide(x)).all()
    named = [vt.open("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3) for _ in range(2)]
    vt.save(vt.merge(named, vt.learn.PLeaS(ratio=0.5), data=(x, y)), tmp_path / "wide.safetensors")
    assert vt.load(tmp_path / "wide.safetensors").blocks[0].mlp.fc1.out_features == 144


def test_refusals():
    data = pictures()
    for refused, match in (
        (lambda: vt.merge([vit()] * 3, vt.learn.PLeaS(), data=data), "two models"),
        (lambda: vt.merge([vit()] * 2, vt.learn.PLeaS()), "give data="),
        (lambda: vt.learn.PLeaS(ratio=1.0), "ratio must lie"),
    ):
        with pytest.raises(vt.VitreousError, match=match):
            refused()
