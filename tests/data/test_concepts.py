"""Pruning of training data by the density of concepts: the golden, and that complex concepts get more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support import GOLDENS, command
from torch import Tensor

from vitreous.data import by_concepts, open_data
from vitreous.data.concepts import allotted, chosen, complexity, spherical_kmeans, whole
from vitreous.errors import VitreousError


def test_golden() -> None:
    z = np.load(GOLDENS / "concept-data-pruning--dbp.npz")
    k = json.loads(bytes(z["info"]))["kwargs"]
    x, cluster = torch.from_numpy(z["embeddings"]).double(), torch.from_numpy(z["labels"]).long()
    distance, intra, inter = complexity(x, cluster, k["num_NNs"])
    np.testing.assert_allclose(intra, z["d_intra"], rtol=1e-5)
    np.testing.assert_allclose(inter, z["d_inter"], rtol=1e-5)
    shares = (intra * inter / k["temperature"]).softmax(0)
    np.testing.assert_allclose(shares, z["p"], rtol=1e-5)
    sizes, count = cluster.bincount(), round(k["prune_ratio_keep"] * len(x))
    exact = allotted(shares, count, sizes, k["cls_bal_ratio"])
    np.testing.assert_allclose(exact, z["exact"], rtol=1e-5)
    counts = whole(exact, sizes)
    assert counts.sum() == count and (counts - torch.from_numpy(z["keep_per_cluster"])).abs().max() <= 1
    np.testing.assert_array_equal(chosen(distance, cluster, torch.from_numpy(z["keep_per_cluster"])), z["kept"])


def concepts(spreads: tuple[float, ...], n: int = 60) -> tuple[Tensor, Tensor]:
    """Vectors about as many directions, each with a spread of its own, and their concepts."""
    draw = torch.Generator().manual_seed(0)
    middles = F.normalize(torch.randn(len(spreads), 16, generator=draw), dim=1)
    of = torch.arange(len(spreads)).repeat_interleave(n)
    return middles[of] + torch.tensor(spreads)[of, None] * torch.randn(len(of), 16, generator=draw), of


def test_complex_concepts_keep_more_and_the_hardest() -> None:
    x, of = concepts((0.02, 0.05, 0.2))
    found = by_concepts(x, 0.4, clusters=3, temperature=0.01, balance=0.2)
    left = of[found.indices].bincount(minlength=3).tolist()
    assert len(found.indices) == 72 and left[0] <= left[1] < left[2] and left[0] > 0 and found.spread > 2
    flat = by_concepts(x, 0.4, clusters=3, temperature=1e3)
    assert of[flat.indices].bincount().tolist() == [24] * 3 and flat.spread == pytest.approx(1, rel=0.01)
    near = F.normalize(x[of == 2], dim=1) @ F.normalize(x[of == 2].mean(0), dim=0)

    def mean(order: Any) -> float:
        """How far from its middle what is kept of the third concept lies."""
        kept = by_concepts(x, 0.4, clusters=3, temperature=1e3, order=order).indices
        return float(1 - near[kept[kept >= 120] - 120].mean())

    assert mean("hard") > mean("random") > mean("easy")
    assert torch.equal(by_concepts(x, 1.0, clusters=3).indices, torch.arange(180))


def test_near_duplicates_go_first() -> None:
    x, _ = concepts((0.2, 0.2))
    x = torch.cat([x, x[:50] + 1e-4])
    twice = by_concepts(x, 0.7, clusters=2)
    once = by_concepts(x, 0.7, clusters=2, alike=0.9999)
    both = lambda k: len({i % 120 for i in k.indices.tolist()})
    assert once.duplicates == 50 and both(once) == len(once.indices) == 119 and both(twice) < len(twice.indices)


def test_clusters_are_found_again() -> None:
    x, of = concepts((0.05,) * 6)
    found = spherical_kmeans(F.normalize(x, dim=1), 6)
    assert len({(a, b) for a, b in zip(found.tolist(), of.tolist(), strict=True)}) == 6


@pytest.mark.parametrize("seed", range(3))
def test_allotted_is_the_optimum(seed: int) -> None:
    """No shift from one cluster to another comes closer to the shares, and bounds hold."""
    draw = np.random.default_rng(seed)
    sizes = torch.from_numpy(draw.integers(1, 30, 9))
    shares = torch.from_numpy(draw.dirichlet(np.full(9, 0.3)))
    count = int(sizes.sum() * 0.6)
    x = allotted(shares, count, sizes)
    least = torch.minimum(torch.full((9,), float(max(int(count / 9 * 0.5), 1))), sizes - 1.0)
    assert float(x.sum()) == pytest.approx(count) and (x <= sizes + 1e-9).all() and (x >= least - 1e-9).all()
    off = x - shares * count
    gives, takes = x > least + 1e-6, x < sizes - 1e-6
    assert off[gives].max() <= off[takes].min() + 1e-6
    assert whole(x, sizes).sum() == count and (whole(x, sizes) - x).abs().max() < 1


def test_refusals() -> None:
    x, _ = concepts((0.1,))
    for wrong in (dict(keep=0.0), dict(clusters=100), dict(temperature=0.0), dict(clusters=50, keep=0.1)):
        with pytest.raises(VitreousError):
            by_concepts(x, **{"keep": 0.5, "clusters": 4, **wrong})
    with pytest.raises(VitreousError, match="NaN"):
        by_concepts(x * torch.nan, 0.5, clusters=2)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for part, n in (("train", 12), ("test", 4)):
        for i in range(n):
            home = tmp_path / "photos" / part / "ab"[i % 2]
            home.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 255, (8, 8), np.uint8)
            Image.fromarray(noise).resize((28, 28)).save(home / f"{i}.png")
    how = ["thin", "--data", str(tmp_path / "photos"), "--clusters", "2", "--out", str(tmp_path / "kept.csv")]
    status, out, err = command(monkeypatch, capsys, *how)
    assert status == 0 and "6 of 12" in out, err
    train, test = (open_data(tmp_path / "kept.csv", part=part) for part in ("train", "test"))
    assert len(train) == 6 and len(test) == 4 and train.classes == ("a", "b")
    for words, said in ((["--keep", "2"], "keep must lie"), (["--order", "odd"], "--order"), ([], "exists")):
        status, _, err = command(monkeypatch, capsys, *how, *words, *(["--overwrite"] if words else []))
        assert status == 2 and said in err
    status, _, err = command(monkeypatch, capsys, "thin", "--out", str(tmp_path / "n.csv"))
    assert status == 2 and "no folder or table" in err
