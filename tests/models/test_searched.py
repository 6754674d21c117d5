"""Checkpoints of networks that a search or a stitching made: each is another, and built by what its weights tell."""

from __future__ import annotations

import pytest
import torch
from support import golden, official_state

from vitreous import VitreousError
from vitreous.models import load_official
from vitreous.models.vit_resnas import told


@pytest.mark.parametrize("name", ["sn-netv2--ti_s_r16", "vit-resnas--resnas_tiny", "instatune--supervit", "as-vit--seed"])
def test_a_variant_that_nobody_named(name: str) -> None:
    info, _, x = golden(name)
    state = official_state(info)
    system, given = name.partition("--")[0], {}
    if system == "as-vit":
        with pytest.raises(VitreousError, match="no genotype"):
            load_official("as-vit--mine", state)
        given = {"genotype": info["kwargs"]["genotype"]}
    mine = load_official(f"{system}--mine", state, **given)
    assert sum(p.numel() for p in mine.parameters()) == info["params"]
    with torch.no_grad():
        torch.testing.assert_close(mine(x[:1]), load_official(name, state)(x[:1]))
    state.popitem()
    with pytest.raises(VitreousError, match="do not fit"):
        load_official(f"{system}--mine", state, **given)


@pytest.mark.parametrize(("name", "millions"), [("resnas_small", 65), ("resnas_medium", 97), ("res_tiny_reference", None)])
def test_published_networks_of_resnas(name: str, millions: int | None) -> None:
    from vitreous.models.official import _published

    with torch.device("meta"):
        model = _published[f"vit-resnas--{name}"][0]()
    if millions is not None:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=2)
        assert told(dict(model.state_dict()))["heads"] == [b.attn.heads for stage in model.stages for b in stage]
    with pytest.raises(VitreousError, match="no published variant"):
        load_official("resnas_huge", {})
