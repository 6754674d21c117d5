"""The supernet, its search, InstaTune and SimQ-NAS."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from learning import pictures, vit
from support import GOLDENS, command, error, golden, official_state, small_vit

import vitreous as vt
from vitreous import VitreousError
from vitreous.models import load_official
from vitreous.prune.subnet import Choice, Space, Subnet, macs, outside, sliced, sort_units
from vitreous.search.nets import simq
from vitreous.search.nets.evolve import evolve
from vitreous.search.nets.policy import LAYERS, search_policy
from vitreous.search.nets.subnets import search_subnets

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_instatune_supernet_as_published() -> None:
    info, expected, x = golden("instatune--supervit")
    said = info["sample_config"]
    model = load_official("instatune--supervit", official_state(info))
    assert sum(p.numel() for p in model.parameters()) == info["params"]
    n = said["num_layers"]
    choice = Choice(n, tuple(said["num_attention_heads"][:n]), tuple(said["vit_intermediate_sizes"][:n]))
    with torch.no_grad():
        assert abs(sliced(model, choice, x).numpy() - expected).max() <= 1e-4 * abs(expected).max()
        assert abs(model(x).numpy() - expected).max() > 1e-2 * abs(expected).max()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"])
def test_a_subnet_cut_out_answers_as_it_does_in_place(name: str, tmp_path: Path) -> None:
    model = vt.open(name, img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=4, num_classes=7)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    whole, space = model(X), Space.of(model, width=0.5)
    assert space.widths == (24, 36, 48) and len(space.choices) == 10
    for seed in (2, 1, 0):
        choice = replace(space.draw(random.Random(seed)), width=space.widths[seed])
        inside = sliced(model, choice, X)
        assert (inside - whole).norm() > 1e-3 * whole.norm()
        cut = Subnet.of(choice).apply(model)
        torch.testing.assert_close(cut(X), inside)
        assert space.decode(space.encode(choice)) == choice
    torch.testing.assert_close(model(X), whole)
    torch.testing.assert_close(sliced(model, space.largest, X), whole)
    vt.save(cut, tmp_path / "cut.safetensors")
    torch.testing.assert_close(vt.open(tmp_path / "cut.safetensors")(X), inside)
    quantized = vt.slim(cut, vt.quant.RepQ(weights=8, activations=8), X)
    assert error(quantized, cut, X) < 0.3
    with vt.glass(cut) as g:
        cut(X)
    assert [a.shape[1] for a in g.attention] == list(choice.heads)
    assert cut.num_features == choice.width < 48 and cut.forward_features(X).shape[2] == choice.width


def test_gradients_reach_the_prefix_alone() -> None:
    model = small_vit(num_heads=4)
    choice = Choice(2, (2, 1), (48, 96))
    sliced(model, choice, X).square().sum().backward()
    blocks = list(model.blocks)
    assert blocks[0].mlp.fc1.weight.grad[:48].abs().min() > 0 and not blocks[0].mlp.fc1.weight.grad[48:].any()
    assert not blocks[1].attn.proj.weight.grad[:, 12:].any() and blocks[2].mlp.fc1.weight.grad is None
    half = macs(model, Choice(4, (2,) * 4, (96,) * 4), 17) / macs(model, Choice(4, (4,) * 4, (192,) * 4), 17)
    assert half == pytest.approx(0.5)
    model.zero_grad(set_to_none=True)
    narrow = Choice(4, (4,) * 4, (192,) * 4, 24)
    sliced(model, narrow, X).square().sum().backward()
    for p, axis in (
        (model.patch_embed.proj.weight, 0),
        (model.pos_embed, 2),
        (model.norm.weight, 0),
        (blocks[3].mlp.fc1.weight, 1),
    ):
        part = p.grad.movedim(axis, 0)
        assert part[:24].abs().sum() > 0 and not part[24:].any()
    assert model.norm.normalized_shape == (48,) and macs(model, narrow, 17) > 0.5 * macs(model, Space.of(model).largest, 17)


@pytest.mark.parametrize("images", [None, X])
def test_sorting_changes_no_answer_and_puts_the_best_first(images: torch.Tensor | None) -> None:
    model = small_vit(num_heads=4)
    with torch.no_grad():
        for b in model.blocks:
            b.attn.proj.weight[:, :24] *= 0.01  # the first two heads and the first hidden units say next to nothing
            b.mlp.fc2.weight[:, :96] *= 0.01
    before, half = model(X), Choice(4, (2,) * 4, (96,) * 4)
    lost = (sliced(model, half, X) - before).norm()
    sort_units(model, images)
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)
    assert (sliced(model, half, X) - before).norm() < 0.3 * lost


def test_sorting_puts_the_channels_that_say_most_first() -> None:
    model = small_vit(num_heads=4)
    with torch.no_grad():  # of the first half next to nothing is written or read
        for p, axis in [(model.patch_embed.proj.weight, 0), (model.pos_embed, 2), (model.cls_token, 2), (model.head.weight, 1)]:
            p.narrow(axis, 0, 24).mul_(0.01)
        for b in model.blocks:
            for layer, axis in ((b.attn.qkv, 1), (b.attn.proj, 0), (b.mlp.fc1, 1), (b.mlp.fc2, 0)):
                layer.weight.narrow(axis, 0, 24).mul_(0.01)
    before, kept = model(X), model.head.weight[:, 24:].detach().clone()
    sort_units(model)
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)
    assert {tuple(c) for c in model.head.weight[:, :24].T.tolist()} == {tuple(c) for c in kept.T.tolist()}


def test_instatune_trains_the_subnets_too() -> None:
    """After as many steps a sub-network answers better than one of a model that was trained plainly."""
    model, data = vit(depth=3, num_heads=4), pictures()
    smallest = Space.of(model, 1, width=0.5).smallest
    given = dict(epochs=4, batch=16, augment=None, optimiser=vt.learn.AdamW(lr=5e-3))
    lost = []
    for objective in (vt.learn.InstaTune(depth=1, width=0.5), vt.learn.CrossEntropy()):
        trained = vt.learn.train(model, data, objective, **given)
        lost.append(float(torch.nn.functional.cross_entropy(sliced(trained, smallest, data[0]), data[1])))
    assert lost[0] < 0.9 * lost[1]


def test_predictor_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simq, "COSTS", np.array([4.0, 5.0, 6.0]))  # the whole grid ends here too, in ten seconds
    monkeypatch.setattr(simq, "ALPHAS", np.array([9.0, 10.0]))
    with np.load(GOLDENS / "simq-nas--predictor.npz") as z:
        genes, y, wanted = z["features"], z["y"], z["pred"]
    one_hot = simq.OneHot(genes[:50])
    predictor = simq.Predictor(one_hot(genes[:50]), y[:50])
    np.testing.assert_allclose(predictor(one_hot(genes[50:])), wanted, rtol=1e-9)
    off, tau = simq.quality(wanted, y[50:])
    assert off < 0.1 and tau > 0.4


def test_linas_measures_little_and_finds_the_front() -> None:
    """With as many measurements it comes closer to a known best than evolution that measures every child."""
    weights = np.random.default_rng(0).random(24)
    seen: list[tuple[int, ...]] = []

    def measure(genes: tuple[int, ...]) -> tuple[float, float]:
        seen.append(genes)
        return float(sum(genes)), 1.0 + float(weights @ (2 - np.array(genes)))

    area = lambda found: sum(min((v[1] for v in found.found.values() if v[0] <= cost), default=99.0) for cost in range(10, 40))
    ours = simq.linas([3] * 24, measure, population=20, rounds=1, predicted=10)
    used = len(set(seen))
    plain = evolve([3] * 24, measure, population=20, generations=max(2, used // 20), seed=0)
    assert used <= 80 and area(ours) < area(plain)


def test_constraints_are_kept_and_nothing_is_measured_twice() -> None:
    seen: list[tuple[int, ...]] = []
    found = evolve(
        [5] * 6, lambda g: (seen.append(g) or -float(sum(g)),), over=lambda g: sum(g) - 12, generations=15, population=12
    )
    assert max(map(sum, found.found)) == 12 == sum(found.best())
    assert len(seen) - 1 <= len(found.found)  # one is asked for its number of objectives
    with pytest.raises(VitreousError, match="closest is over by"):
        evolve([5] * 6, lambda g: (0.0,), over=lambda g: 1.0, generations=1, population=5)


def labelled(model: torch.nn.Module, n: int = 24) -> vt.data.Data:
    return vt.data.open_data("sample", model, limit=n)


def fashion() -> torch.nn.Module:
    return vt.open(
        "vit_tiny_patch16_224", img_size=28, in_chans=1, patch_size=7, embed_dim=32, depth=2, num_heads=2, num_classes=10
    )


def test_fronts_of_subnets_and_of_policies() -> None:
    model = fashion()
    found = search_subnets(model, labelled(model), Space.of(model, 1), measured=20)
    assert [m.macs for m in found] == sorted(m.macs for m in found)
    assert [m.wrong for m in found] == sorted((m.wrong for m in found), reverse=True)
    limit = 0.8 * macs(model, Space.of(model).largest, 17)
    assert all(m.macs <= limit for m in search_subnets(model, labelled(model), Space.of(model, 1), limit=limit, measured=20))
    with pytest.raises(VitreousError, match="smallest sub-network"):
        search_subnets(model, labelled(model), limit=9.0)
    policies = search_policy(
        model, labelled(model), labelled(model).tensor(range(8)), Space.of(model, 2, 1.0), population=5, rounds=1
    )
    assert all(set(p.floats) <= {f"blocks.{i}.{layer}" for i in range(2) for layer in LAYERS} for p in policies)
    assert len({p.bytes for p in policies}) == len(policies)


def test_what_is_no_supernet() -> None:
    with pytest.raises(VitreousError, match="plain ViT of timm's"):
        Space.of(timm.create_model("resnet18"))
    with pytest.raises(VitreousError, match="each of the 2 blocks"):
        Subnet(2, (1,), (4, 4))
    with pytest.raises(VitreousError, match="has 4 blocks"):
        Subnet(5, (1,) * 5, (4,) * 5).apply(small_vit())
    with pytest.raises(VitreousError, match="all alike"):
        Space.of(uneven())
    with pytest.raises(VitreousError, match="48 channels, not 49"):
        Subnet(1, (2,), (4,), 49).apply(small_vit())
    with pytest.raises(VitreousError, match="width must be at least 1"):
        Subnet(1, (2,), (4,), 0)
    with pytest.raises(VitreousError, match="share of the width"):
        Space.of(small_vit(), width=0.0)
    odd = small_vit()
    odd.head = torch.nn.Bilinear(48, 48, 7)
    odd.head.forward = lambda x: torch.nn.functional.bilinear(x, x, odd.head.weight, odd.head.bias)
    for refused in (lambda: outside(odd), lambda: vt.learn.InstaTune(width=0.5).parts(odd)):
        with pytest.raises(VitreousError, match="width of VisionTransformer cannot be less"):
            refused()


def uneven() -> torch.nn.Module:
    model = small_vit()
    model.blocks[1].mlp = timm.layers.Mlp(48, 96)
    return model


def test_evolve_at_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    vt.save(fashion(), tmp_path / "net.safetensors")
    net, out = str(tmp_path / "net.safetensors"), tmp_path / "cut.safetensors"
    words = ("evolve", net, "--limit", "60", "--measured", "10", "--depth", "1", "--width", "0.5", "--out", str(out))
    status, said, _ = command(monkeypatch, capsys, *words)
    assert status == 0 and "MMACs" in said and vt.open(out)(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    status, _, err = command(monkeypatch, capsys, *words, "--overwrite", "--macs", "7")
    assert status == 2 and "smallest sub-network" in err
