"""ViT-ResNAS: masks make small networks of the large one, many in a batch, and the search cuts one out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from learning import vit
from small_models import SMALL
from support import GOLDENS, command

import vitreous as vt
from vitreous import VitreousError
from vitreous.learn.vit_resnas import deal
from vitreous.models.vit_resnas import ResidualReduction, Sizes, ViTResNAS, masked_layer_norm
from vitreous.search.nets.resnas import Supernet, search_resnas

SHAPE = {**SMALL["vit-resnas"].arguments, "depths": (2, 2, 1), "heads": (2, 2, 2, 4, 2), "hidden": (32, 32, 32, 48, 32)}


def small(**kwargs: object) -> ViTResNAS:
    torch.manual_seed(0)
    model = vt.open("vit_resnas_tiny", **{**SHAPE, "num_classes": 4, **kwargs})
    assert isinstance(model, ViTResNAS)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


def test_masked_layer_norm_as_published() -> None:
    with np.load(GOLDENS / "vit-resnas--masked_layernorm.npz") as z:
        x, mask, weight, bias = (torch.from_numpy(z[k]) for k in ("x", "mask", "weight", "bias"))
        np.testing.assert_allclose(masked_layer_norm(x, mask, weight, bias), z["y"], rtol=1e-6, atol=1e-7)


def test_a_masked_network_is_the_one_cut_out(tmp_path: Path) -> None:
    """Of two images in a batch each runs through a network of its own, and answers as that one does when it is cut out."""
    model, x = small(), torch.randn(2, 3, 56, 56)
    net = Supernet(model)
    draw = np.random.default_rng(0)
    genes = []
    while len(genes) < 2:
        g = tuple(draw.integers(0, net.choices).tolist())
        if sorted(net.decode(g)[0]) == net.decode(g)[0]:
            genes.append(g)
    both = [net.sizes(g, 1) for g in genes]
    sizes = Sizes(*(tuple(map(torch.cat, zip(*(getattr(s, f) for s in both), strict=True))) for f in Sizes.__dataclass_fields__))
    with torch.no_grad():
        together = model.forward_head(model.forward_features(x, sizes))
        for i, g in enumerate(genes):
            cut = net.cut(g)
            torch.testing.assert_close(cut(x[i : i + 1]), together[i : i + 1], rtol=1e-3, atol=1e-4)
            assert net.macs(g) < net.macs((0,) * len(g))
        vt.save(cut, tmp_path / "cut.safetensors")
        torch.testing.assert_close(vt.open(tmp_path / "cut.safetensors")(x), cut(x))
        whole = model.forward_head(model.forward_features(x, net.sizes((0,) * len(net.choices), 2)))
        torch.testing.assert_close(whole, model(x), rtol=1e-3, atol=1e-4)


def test_every_choice_is_dealt_as_often() -> None:
    sizes = deal(small(), 24, 4, [1.0, 0.75, 0.5])
    for counts in (sizes.widths[2], sizes.hidden[0]):
        assert sorted(torch.unique(counts, return_counts=True)[1].tolist()) == [8, 8, 8]
        assert (counts.view(6, 4) == counts[::4, None]).all()
    assert set(sizes.present[1].tolist()) == {0, 1} and set(sizes.present[0].tolist()) == {1}


def test_what_is_reduced_passes_by() -> None:
    """With layers that give nothing, the average of four patches is what is left, and the class token as it was."""
    layer = ResidualReduction(2, 3, 5)
    for p in layer.parameters():
        torch.nn.init.zeros_(p)
    x = torch.randn(1, 5, 3)
    y = layer(x)
    torch.testing.assert_close(y[:, :, :3], torch.stack([x[:, 0], x[:, 1:].mean(1)], 1))
    assert not y[:, :, 3:].any()


def test_the_supernet_trains() -> None:
    data = torch.randn(16, 3, 56, 56), torch.arange(16) % 4
    trained = vt.learn.train(small(), data, vt.learn.MultiArchitecture(examples=4), epochs=2, batch=16, augment=None)
    assert not torch.equal(trained.patch_head.weight, small().patch_head.weight)
    with pytest.raises(VitreousError, match="vit_resnas"):
        vt.learn.train(vit(), data, vt.learn.MultiArchitecture(), batch=16, augment=None)


def test_the_search_keeps_just_below_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small(num_classes=10)
    limit = 0.7 * Supernet(model).macs((0,) * len(Supernet(model).choices))
    data = vt.data.open_data("sample", model, limit=8)
    genes, wrong, net = search_resnas(model, data, limit, generations=2, population=6)
    assert 0.975 * limit <= net.macs(genes) <= limit and 0 <= wrong <= 1
    vt.save(model, tmp_path / "net.safetensors")
    net_file, out = str(tmp_path / "net.safetensors"), str(tmp_path / "cut.safetensors")
    words = ("evolve", net_file, "--limit", "40", "--measured", "20", "--out", out)
    status, said, _ = command(monkeypatch, capsys, *words, "--macs", str(limit))
    assert status == 0 and "MMACs" in said
    for more, told in (((), "--macs"), (("--macs", "1e6", "--bits"), "--bits"), (("--macs", "1e6", "--sort"), "--sort")):
        status, _, err = command(monkeypatch, capsys, *words, "--overwrite", *more)
        assert status == 2 and told in err
