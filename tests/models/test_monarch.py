"""What Monarch adds: products of two block-diagonal matrices, and the nearest of them to any matrix."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import GOLDENS, fill, small_vit

import vitreous as vt
from vitreous.mixers import MonarchLinear


def test_layers_and_projections_are_the_official_ones() -> None:
    with np.load(GOLDENS / "monarch--linear_project_16.npz") as z:
        info, arrays = json.loads(bytes(z["info"])), {k: torch.from_numpy(z[k]) for k in z.files if k != "info"}
    for i, given in enumerate(info["kwargs"]["layers"]):
        layer = MonarchLinear(given["in_features"], given["out_features"], given["nblocks"]).double()
        layer.load_state_dict({k: torch.from_numpy(fill(k, tuple(shape))).double() for k, shape in given["state"].items()})
        torch.testing.assert_close(layer(arrays[f"x{i}"]), arrays[f"y{i}"], rtol=1e-9, atol=1e-9)
    for name in "AB":
        weight = arrays[name]
        layer = MonarchLinear(weight.shape[1], weight.shape[0], 4, bias=False).double()
        layer.project(weight)
        torch.testing.assert_close(layer.dense(), arrays[f"{name}_monarch"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("inputs", "outputs", "nblocks"), [(16, 16, 4), (16, 48, 2), (10, 14, 4), (13, 29, 3), (24, 12, 4)])
def test_no_other_monarch_matrix_is_nearer(inputs: int, outputs: int, nblocks: int) -> None:
    """No gradient leads away from the projection, no start by chance ends nearer, and a Monarch matrix is its own projection."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs).double()
    layer = MonarchLinear(inputs, outputs, nblocks, bias=False).double()
    layer.project(weight)
    loss = (layer.dense() - weight).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() < 1e-10 for p in layer.parameters())
    other = MonarchLinear(inputs, outputs, nblocks, bias=False).double()
    optimiser = torch.optim.LBFGS(other.parameters(), max_iter=60)

    def closure() -> float:
        optimiser.zero_grad()
        far = (other.dense() - weight).square().sum()
        far.backward()
        return float(far)

    optimiser.step(closure)
    assert closure() > loss * (1 - 1e-9)
    dense = other.dense().detach()
    layer.project(dense)
    torch.testing.assert_close(layer.dense(), dense)


def test_a_fourier_transform_is_a_monarch_matrix() -> None:
    """Its 16 × 16 cosines, with inputs in the order that four by four transforms want, have nothing but what rank 1 holds."""
    n, b = 16, 4
    places, order = torch.arange(n), torch.arange(n).reshape(b, b).T.flatten()
    fourier = torch.exp(-2j * torch.pi * torch.outer(places, places) / n)[:, order]
    blocks = fourier.reshape(b, b, b, b).permute(1, 2, 0, 3)
    assert (torch.linalg.svdvals(blocks)[..., 1:] < 1e-5).all()


def test_as_a_step_it_keeps_the_stated_weights() -> None:
    """An MLP of 48 and 192 in 4 blocks: (12 + 48) · 12 · 4 of 48 · 192 weights a layer, 31 %, and the nearest such layer."""
    model = small_vit(depth=1)
    small = vt.slim(model, vt.prune.Monarch())
    mlp = small.blocks[0].mlp
    assert sum(p.numel() for n, p in mlp.named_parameters() if "blkdiag" in n) == 2 * 2880
    assert "keep 5,760" in str(small.vitreous)
    rank = torch.linalg.svd(model.blocks[0].mlp.fc1.weight, full_matrices=False)
    same = (rank.U[:, :12] * rank.S[:12]) @ rank.Vh[:12]  # of as many weights: 12 · (48 + 192)
    off = {what: (w - model.blocks[0].mlp.fc1.weight).norm() for what, w in (("monarch", mlp.fc1.dense()), ("rank", same))}
    assert off["monarch"] < 1.1 * off["rank"]
    with pytest.raises(vt.VitreousError, match="nblocks"):
        vt.prune.Monarch(nblocks=1)
    with pytest.raises(vt.VitreousError, match="cannot have 64 blocks"):
        vt.slim(model, vt.prune.Monarch(nblocks=64))
