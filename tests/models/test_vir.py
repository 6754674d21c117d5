"""What ViR adds: three forms of one retention, in which no token sees those behind it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import GOLDENS, fill

from vitreous.errors import VitreousError
from vitreous.mixers.retention import chunkwise_retention, decays, parallel_retention, recurrent_retention
from vitreous.models.vir import Retention


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_three_forms_are_equal(tokens: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, tokens, 4).double()
    gamma = decays(3).double()
    expected = parallel_retention(q, k, v, gamma)
    torch.testing.assert_close(recurrent_retention(q, k, v, gamma), expected)
    for chunk in (4, 16):
        torch.testing.assert_close(chunkwise_retention(q, k, v, gamma, chunk), expected)


def test_the_official_forms() -> None:
    with np.load(GOLDENS / "vir--retention_h3.npz") as z:
        golden = {k: torch.from_numpy(z[k]) for k in z.files if k != "info"}
        assert json.loads(bytes(z["info"]))["kwargs"]["dim"] == 24
    for form, softmax, name in (
        ("parallel", False, "parallel"),
        ("chunkwise", False, "chunkwise"),
        ("recurrent", False, "recurrent"),
        ("parallel", True, "released_parallel"),
    ):
        retention = Retention(24, 3, form, softmax).double()
        for ours, official in (("qkv", "qkv"), ("proj", "out_proj")):
            for part in ("weight", "bias"):
                parameter = getattr(getattr(retention, ours), part)
                parameter.data = torch.from_numpy(np.asarray(fill(f"{official}.{part}", tuple(parameter.shape)))).double()
        torch.testing.assert_close(retention.gamma.float(), golden["gamma"].float())
        retention.gamma = golden["gamma"].double()
        torch.testing.assert_close(retention(golden["x"]), golden[f"y_{name}"], rtol=1e-9, atol=1e-9)


def test_no_token_sees_those_behind_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 9, 8)
    other = x.clone()
    other[:, 5:] += 1
    retention = Retention(8, 2)
    assert torch.equal(retention(x)[:, :5], retention(other)[:, :5])
    assert not torch.allclose(Retention(8, 2, softmax=True)(x)[:, :5], Retention(8, 2, softmax=True)(other)[:, :5])


def test_forms_that_do_not_exist() -> None:
    for wrong in (dict(form="sideways"), dict(form="recurrent", softmax=True)):
        with pytest.raises(VitreousError, match="form must be one of"):
            Retention(8, 2, **wrong)
