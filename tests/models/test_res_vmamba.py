"""Res-VMamba: four ways to scan, and what enters a stage passing by."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from small_models import SMALL
from support import golden, official_state

from vitreous.mixers.cross_scan import CrossScan
from vitreous.mixers.scan import selective_scan
from vitreous.models import load_official


def test_every_place_is_read_by_every_other_and_each_way_with_its_own_weights() -> None:
    torch.manual_seed(0)
    scan, x = CrossScan(4, 2, 3).double(), torch.randn(1, 4, 3, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: scan(x)[0, :, 1, 2].sum(), x)
    assert (jacobian.abs().sum((0, 1)) > 0).all()
    A = -scan.A_logs.exp().unflatten(0, (4, -1))
    wanted = torch.zeros_like(x)
    for i, turn in enumerate((lambda t: t, lambda t: t.mT, lambda t: t.flip(2, 3), lambda t: t.flip(2, 3).mT)):
        there = turn(x)
        tokens = there.flatten(2).mT
        delta, B, C = (tokens @ scan.x_proj_weight[i].mT).split((2, 3, 3), -1)
        delta = torch.nn.functional.softplus(delta @ scan.dt_projs_weight[i].mT + scan.dt_projs_bias[i])
        y = selective_scan(tokens, delta, A[i], B, C, scan.Ds.unflatten(0, (4, -1))[i]).mT.reshape(there.shape)
        wanted = wanted + (y.mT if i % 2 else y).flip((2, 3) if i > 1 else ())
    torch.testing.assert_close(scan(x), wanted)


def test_a_checkpoint_without_residuals_is_vmamba() -> None:
    state = official_state(golden("res-vmamba--tiny_2222")[0])
    plain = {k: v for k, v in state.items() if not k.startswith("fuse.")}
    model = cast(Any, load_official("res-vmamba--tiny_2222", plain))
    with torch.no_grad():
        x = torch.randn(1, 96, 8, 8)
        torch.testing.assert_close(model.stages[1]((x, torch.randn_like(x)))[1], model.stages[1].downsample(x))
    assert all(not stage.fuse.weight.any() for stage in model.stages[1:])


@pytest.mark.parametrize("stage", [1, 2])
def test_what_entered_a_stage_reaches_the_next_beside_its_blocks(stage: int) -> None:
    model, x = cast(Any, SMALL["res-vmamba"].make()), SMALL["res-vmamba"].images(1)
    entered: list[Any] = []
    model.stages[stage].register_forward_hook(lambda _, given, out: entered.extend([*given[0], out[1]]))
    with torch.no_grad():
        model(x)
    out, before, next_before = entered
    pooled = torch.nn.functional.max_pool2d(before, 2)
    part = model.stages[stage]
    torch.testing.assert_close(next_before, part.downsample(out) + part.fuse(pooled))
    assert part.fuse(pooled).abs().max() > 1e-3 and before.shape == out.shape
