"""Networks designed without training: DeepMAD's program and As-ViT's measures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import GOLDENS, command, fill

import vitreous as vt
from vitreous import VitreousError
from vitreous.models.as_vit import AsViT
from vitreous.models.deepmad import Stage
from vitreous.search.nets import as_vit, deepmad
from vitreous.search.nets.deepmad import Structure, figures

SEED = "8,2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|32,32"
TINY = "4,2,2,1|2,1,2,1|2,1,2,1|2,1,2,1|16,8"


def rows() -> dict[str, Any]:
    with np.load(GOLDENS / "deepmad--scores.npz") as z:
        return json.loads(bytes(z["info"]))["rows"]


def structure(blocks: list[dict[str, Any]]) -> Structure:
    stages = tuple(Stage(b["out"], b["btn"], b["k"], b["L"], b["s"]) for b in blocks if "L" in b)
    last = None if "L" in blocks[-1] else blocks[-1]["out"]
    return Structure(stages, blocks[0]["out"], "DW" in blocks[1]["class"], last)


@pytest.mark.parametrize("name", rows())
def test_deepmad_scores_as_published(name: str) -> None:
    row = rows()[name]
    found = figures(structure(row["structure"]), as_published=True)
    assert found.entropies == pytest.approx(row["score_list"], rel=1e-9)
    assert found.effectiveness == pytest.approx(row["effective"], rel=1e-9)
    assert found.penalty == pytest.approx(row["penalty"], rel=1e-9)
    assert (found.flops, found.params) == pytest.approx((row["flops"], row["params"]))


def test_deepmad_counts_the_maps_as_they_are() -> None:
    """A depthwise net on larger images has more entropy, which the released code does not see."""
    net = structure(rows()["deepmad-29M-224"]["structure"])
    assert figures(replace(net, size=448)).entropy > figures(net).entropy
    assert figures(replace(net, size=448), as_published=True).entropies[1:] == figures(net, as_published=True).entropies[1:]


def test_deepmad_effectiveness_forbids_deep_thin_nets() -> None:
    """With the limit the program finds another net than without: shallower for its width."""
    loose, tight = (deepmad.design(2e8, 2e6, rho, generations=12, population=20) for rho in (9.0, 0.15))
    assert figures(tight).effectiveness <= 0.15 < figures(loose).effectiveness
    assert all(figures(n).flops <= 2e8 and figures(n).params <= 2e6 for n in (loose, tight))
    assert sum(s.depth for s in tight.stages) < sum(s.depth for s in loose.stages)


def test_deepmad_refuses_what_cannot_be() -> None:
    with pytest.raises(VitreousError, match="no network within the limits"):
        deepmad.design(1e3, generations=2, population=10)
    with pytest.raises(VitreousError, match="above 0"):
        deepmad.design(-1.0)


def official(name: str) -> str:
    name = re.sub(r"^stages\.(\d)\.1\.(norm|reduction)", r"layers.\1.downsample.\2", name)
    name = re.sub(r"^stages\.(\d)\.(\d)\.", r"layers.\1.blocks.\2.", name)
    return name.replace(".norm2.", ".mlps.0.0.").replace(".mlp.", ".mlps.0.1.")


def test_as_vit_measures_as_published() -> None:
    model = AsViT(32, genotype=SEED, num_classes=10)
    model.load_state_dict(
        {k: torch.from_numpy(np.asarray(fill(official(k), tuple(v.shape)))) for k, v in model.state_dict().items()}
    )
    model = model.double()
    with np.load(GOLDENS / "as-vit--scores.npz") as z:
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 3, 32, 32)))
        kernel = as_vit.ntk(model, x)
        np.testing.assert_allclose(kernel.diagonal(), z["gram_diag"], rtol=1e-9)
        np.testing.assert_allclose(torch.linalg.eigvalsh(kernel), z["eigenvalues"], rtol=1e-9)
        assert as_vit.condition(model, x) == pytest.approx(float(z["ntk_cond"]), rel=1e-9)
        plane = torch.from_numpy(z["U"]).T.reshape(2, 3, 32, 32)
        assert as_vit.length_distortion(model, plane) == pytest.approx(float(z["length"]), rel=1e-9)


def test_as_vit_measures_length_without_norms() -> None:
    """Norms would hide how much the layers stretch: twice the weights make it longer, with norms they would not."""
    torch.manual_seed(0)
    model, plane = AsViT(32, genotype=TINY, num_classes=0), torch.randn(2, 3, 32, 32)
    before, gain = as_vit.length_distortion(model, plane), model.patch_embed.proj.weight
    with torch.no_grad():
        gain *= 2
    assert as_vit.length_distortion(model, plane) > 1.5 * before


def test_as_vit_takes_the_least_sum_of_ranks() -> None:
    measured = [as_vit.Complexity(1.0, 1.0), as_vit.Complexity(2.0, 9.0), as_vit.Complexity(3.0, 5.0)]
    assert as_vit.least(measured) == 1  # ranks 0 + 2, 1 + 0, 2 + 1


def test_as_vit_scales_depth_and_width_together(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lambda genotype, **_: as_vit.Complexity(1.0, as_vit.count(genotype))  # the largest is the most expressive
    monkeypatch.setattr(as_vit, "complexity", said)
    found = as_vit.scale(TINY, 4e6, inits=1)
    sizes = [n for _, n, _ in found]
    assert sizes == sorted(sizes) and sizes[-1] >= 4e6 > sizes[-2]
    stages, _, width = as_vit.parse(found[-1][0])
    assert sum(s[3] for s in stages) == 4 + len(found) and width > 4 * 8
    assert sum(p.numel() for p in AsViT(224, genotype=found[0][0]).parameters()) == sizes[0]


def test_topology_goes_where_the_reward_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a length that only 64 heads have, the policy ends at 64 heads."""
    said = lambda genotype, **_: as_vit.Complexity(1.0, float(genotype.split("|")[-1].startswith("64")))
    monkeypatch.setattr(as_vit, "complexity", said)
    assert as_vit.topology(120).split("|")[-1].startswith("64")


def test_design_at_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(as_vit, "topology", lambda *a, **k: TINY)
    monkeypatch.setattr(as_vit, "WIDER", (1.2,))
    out = tmp_path / "net.safetensors"
    status, said, err = command(
        monkeypatch, capsys, "design", "as-vit", "--params", "4e6", "--num-classes", "7", "--out", str(out)
    )
    assert (status, err) == (0, "") and "genotype" in said
    assert vt.open(out)(torch.zeros(1, 3, 224, 224)).shape == (1, 7)
    for words, reason in ((["deepmad"], "needs --macs"), (["asvit"], "did you mean"), (["as-vit", "--params", "9"], "smallest")):
        status, _, err = command(monkeypatch, capsys, "design", *words, "--out", str(tmp_path / "b.safetensors"))
        assert status == 2 and reason in err
