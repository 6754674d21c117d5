"""ElasticViT: levels of cost, memories of good networks, the loss; sub-networks in the supernet and cut out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from learning import vit
from small_models import SMALL
from support import GOLDENS, command, golden

import vitreous as vt
from vitreous import VitreousError
from vitreous.learn.elasticvit import Banks, alpha_divergence, depth_over_width, divergence
from vitreous.learn.objective import Batch, Now, Seen
from vitreous.models.elasticvit import Choice, ElasticViT
from vitreous.prune.elastic import between, cost, cut, draw, macs, recalibrate, row
from vitreous.search.nets.elastic import search_elastic

MOST = ((16, 2, 3, 5), (16, 2, 3, 5), (32, 2, 3, 3), (32, 2, 3, 3), (48, 2, 3, 3), (48, 2, 3, 3))
LEAST = (32, (8, 1, 3), ((8, 1, 2, 3), (8, 1, 2, 3), (16, 1, 2, 2), (16, 1, 2, 2), (16, 1, 2, 2), (16, 1, 2, 2)))
LEVELS, BAND = (0.6, 0.9, 1.2), 0.25


def small(**kwargs: Any) -> ElasticViT:
    torch.manual_seed(0)
    given = {**SMALL["elasticvit"].arguments, "stem": (16, 2, 5), "stages": MOST, "least": LEAST, "num_classes": 4, **kwargs}
    model = vt.open("elastic_T1", **given)
    assert isinstance(model, ElasticViT)
    for name, p in model.named_parameters():
        if "pwl_bn.weight" in name:
            torch.nn.init.ones_(p)
    return model


def test_the_loss_and_its_gradient_as_published() -> None:
    with np.load(GOLDENS / "elasticvit--alpha_divergence.npz") as z:
        g = {k: torch.from_numpy(np.asarray(z[k])) for k in z.files if k != "info"}
    student = g["student"].requires_grad_()
    for name, alpha in (("divergence_min", -1.0), ("divergence_max", 1.0)):
        torch.testing.assert_close(divergence(student, g["teacher"], alpha, 5.0)[0], g[name], rtol=1e-9, atol=1e-12)
    loss = alpha_divergence(student, g["teacher"])
    loss.backward()
    torch.testing.assert_close(loss, g["loss"], rtol=1e-9, atol=0)
    torch.testing.assert_close(student.grad, g["grad"], rtol=1e-9, atol=1e-12)
    assert alpha_divergence(torch.tensor([[200.0, -200.0]]), torch.tensor([[1.0, 0.0]])).isfinite()


def test_costs_as_published() -> None:
    """In what the released code counts, exactly."""
    for name in ("elastic_T1", "elastic_S1"):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert isinstance(model, ElasticViT)
        assert cost(model, model.choice) / 1e6 == pytest.approx(golden(f"elasticvit--{name}")[0]["mflops_by_reference"], rel=1e-9)


def test_a_sub_network_is_the_one_cut_out(tmp_path: Path) -> None:
    """Other sides, kernels, widths, depths: in the supernet as when cut out, saved and opened, and smaller."""
    model, x = small(), torch.randn(2, 3, 64, 64)
    recalibrate(model, [torch.randn(8, 3, 64, 64)])
    smaller = [model.least, model.largest, *between(model, 0, 1e7, 3)]
    with torch.no_grad():
        for net in smaller:
            assert net is not None
            model.run(net)
            alone = cut(model, net)
            torch.testing.assert_close(alone(x), model(x), rtol=1e-4, atol=1e-5)
            assert alone.least is None and alone.choice == net
        model.run(smaller[2])
        alone = cut(model, smaller[2])
        vt.save(alone, tmp_path / "cut.safetensors")
        torch.testing.assert_close(vt.open(tmp_path / "cut.safetensors")(x), alone(x))
    assert sum(p.numel() for p in alone.parameters()) < sum(p.numel() for p in model.parameters())
    with pytest.raises(VitreousError, match="no network"):
        model.run(Choice.of((64, (16, 2, 5), ((24, 2, 3, 5), *MOST[1:]))))
    with pytest.raises(VitreousError, match="cut out"):
        cut(alone, alone.choice)


def test_networks_are_drawn_above_a_floor_and_within_a_band() -> None:
    model, floor = small(), Choice.of((64, (8, 2, 3), ((8, 1, 2, 3), (16, 1, 3, 3), *LEAST[2][2:])))
    rows = draw(model, 200, floor)
    assert (rows >= torch.tensor(row(floor))).all() and len(rows.unique(dim=0)) > 100
    nets = between(model, 8e5, 9e5, 20)
    assert all(8e5 <= cost(model, n) <= 9e5 for n in nets)
    assert torch.equal(macs(model, torch.tensor([row(n) for n in nets])), torch.tensor([int(cost(model, n)) for n in nets]))
    with pytest.raises(VitreousError, match="supernet goes from"):
        between(model, 1e12, 2e12, 1)


def test_steps_move_to_neighbouring_levels() -> None:
    """Complexity-aware sampling: never two levels at once, the ends kept for two of three; three networks of one band."""
    model = small()
    banks = Banks(model, LEVELS, BAND)
    torch.manual_seed(0)
    walk = [(banks.move(), banks.level)[1] for _ in range(900)]
    steps = np.diff(walk)
    assert set(steps) == {-1, 0, 1} and set(walk) == {0, 1, 2}
    assert np.mean(steps[np.array(walk[:-1]) == 0] == 0) == pytest.approx(2 / 3, abs=0.1)
    for _ in range(10):
        net, known = banks.draw(model, 8, 1.0)
        assert not known and 0 <= cost(model, net) / 1e6 - LEVELS[banks.level] <= BAND


def test_good_networks_are_remembered_and_drawn_again(tmp_path: Path) -> None:
    """Performance-aware sampling: the worst gives way, and the good are drawn by the softmax of minus their loss."""
    model = small()
    banks = Banks(model, LEVELS, BAND)
    nets = list(dict.fromkeys(banks.pools[0]))[:5]
    for net, score in zip(nets[:4], (-3.0, -9.0, -8.0, -7.0), strict=True):
        banks.remember(net, score, 4)
    banks.remember(nets[4], -10.0, 4)
    assert set(banks.known[0]) == set(nets[:4])
    banks.remember(nets[4], -1.0, 4)
    assert set(banks.known[0]) == {nets[0], *nets[2:]}
    torch.manual_seed(0)
    drawn = [banks.draw(model, 4, 1.0) for _ in range(200)]
    assert all(known for _, known in drawn)
    assert np.mean([net == nets[4] for net, _ in drawn]) == pytest.approx(0.88, abs=0.07)
    assert not any(known for _, known in (banks.draw(model, 4, 0.0) for _ in range(20)))
    banks.move()
    torch.save(banks.state_dict(), tmp_path / "last.pt")  # a training that was stopped goes on with what it knew
    other = Banks(model, LEVELS, BAND)
    other.load_state_dict(torch.load(tmp_path / "last.pt", weights_only=True))
    banks.move()
    other.move()
    assert (other.known, other.level) == (banks.known, banks.level)


def test_width_is_preferred_to_depth() -> None:
    model = small()
    anchor = Choice.of(LEAST)
    wide = anchor._replace(stages=(*anchor.stages[:4], *((48, 1, 2, 2) for _ in range(2))))
    deep = anchor._replace(stages=(*anchor.stages[:4], *((16, 2, 2, 2) for _ in range(2))))
    assert depth_over_width(model, wide, anchor) < 0 < depth_over_width(model, deep, anchor)
    banks = Banks(model, LEVELS, BAND)
    banks.level, banks.pools[1] = 1, [wide, deep]
    banks.known[1] = {n: -1.0 for n in banks.pools[2][:4]}
    torch.manual_seed(0)
    assert np.mean([banks.draw(model, 6, 0.0)[0] == wide for _ in range(60)]) > 0.9


def test_the_least_learns_from_the_mean_of_the_three() -> None:
    """The terms of a step, written out; the three are remembered with the loss that they had."""
    model = small().train()
    objective, images, labels = (
        vt.learn.ConflictAware(levels=LEVELS, band=BAND, bank=8),
        torch.randn(6, 3, 64, 64),
        torch.arange(6) % 4,
    )
    banks = objective.parts(model)
    now, batch = Now(model, parts=banks), Batch(images, labels, torch.arange(6))
    own = model.choice
    objective.before_step(now)
    assert banks.steps == 1
    with objective.around(now):
        seen = Seen(model(images))
    assert model.choice == banks.now[0][0]
    terms = objective(seen, batch, now)
    assert model.choice == own
    other = copy.deepcopy(model)
    answers = []
    for net in [*(n for n, _ in banks.now), banks.floors[banks.level]]:
        other.run(net)
        answers.append(other(images))
    losses = [torch.nn.functional.cross_entropy(a, labels) for a in answers[:3]]
    torch.testing.assert_close(terms["drawn"], torch.stack(losses).sum())
    mean = torch.stack([a.softmax(1) for a in answers[:3]]).mean(0)
    torch.testing.assert_close(terms["least"], alpha_divergence(answers[3], mean))
    for (net, _), loss in zip(banks.now, losses, strict=True):
        assert banks.known[banks.level][net] == pytest.approx(-float(loss), rel=1e-4)
    terms["least"].backward(retain_graph=True)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    banks.known[banks.level] = dict.fromkeys(banks.known[banks.level], -99.0)
    objective(seen, batch, Now(model, epoch=0.3, parts=banks))
    assert min(banks.known[banks.level].values()) > -99
    banks.known[banks.level] = dict.fromkeys(banks.pools[banks.level][:8], -1.0)
    now.share = 0.99
    objective = vt.learn.ConflictAware(levels=LEVELS, band=BAND, bank=8, rate=0.25)
    with objective.around(now):  # at the end of the run always one that is remembered
        assert all(known for _, known in banks.now)


def test_the_supernet_trains_and_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, teacher = (torch.randn(16, 3, 64, 64), torch.arange(16) % 4), small(least=())
    wanted = vt.learn.ConflictAware(teacher=teacher, levels=LEVELS, band=BAND, bank=4)
    trained = vt.learn.train(small(), data, wanted, epochs=1, batch=8, augment=None)
    assert isinstance(trained, ElasticViT) and trained.choice == trained.largest
    assert not torch.equal(trained.pre_head_1.weight, small().pre_head_1.weight)
    with pytest.raises(VitreousError, match="elastic supernet"):
        vt.learn.train(vit(), data, wanted, batch=8, augment=None)
    with pytest.raises(VitreousError, match="band"):
        vt.learn.ConflictAware(band=0)
    model = small(num_classes=10)
    check = vt.data.open_data("sample", model, limit=8)
    before = copy.deepcopy(model.state_dict())
    made, wrong, spent = search_elastic(model, check, 1e6, torch.randn(8, 3, 64, 64), generations=2, population=4)
    assert spent <= 1e6 and 0 <= wrong <= 1 and made.least is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    vt.save(model, tmp_path / "net.safetensors")
    net_file, out = str(tmp_path / "net.safetensors"), str(tmp_path / "cut.safetensors")
    words = ("evolve", net_file, "--limit", "20", "--measured", "20", "--out", out)
    status, said, _ = command(monkeypatch, capsys, *words, "--macs", "1e6")
    assert status == 0 and "MMACs" in said
    for more, told in (((), "--macs"), (("--macs", "1e6", "--bits"), "--bits")):
        status, _, err = command(monkeypatch, capsys, *words, "--overwrite", *more)
        assert status == 2 and told in err
