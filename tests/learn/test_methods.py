"""What each way of teaching has of its own; goldens hold their losses."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import timm
import torch
from learning import pictures, vit
from torch import nn

import vitreous as vt
from vitreous.learn.ewa import Experts
from vitreous.learn.objective import look
from vitreous.learn.patch_mixing import replace_patches

QUICK = dict(batch=16, augment=None)


def test_a_student_of_nkd_comes_to_its_teacher():
    data = pictures()
    teacher = vt.train(vit(), data, epochs=12, **QUICK)
    taught = vt.train(vit(), data, vt.learn.NKD(teacher), epochs=6, **QUICK)
    with torch.no_grad():
        apart = [(m(data[0]).softmax(1) - teacher(data[0]).softmax(1)).abs().mean() for m in (taught, vit())]
    assert apart[0] < 0.7 * apart[1]


def test_uskd_reads_the_middle_block_and_leaves_no_head_behind():
    model = vit(depth=4)
    objective = vt.learn.USKD()
    assert objective.blocks(model) == (1,)
    taught = vt.train(model, pictures(), [vt.learn.CrossEntropy(), objective], epochs=1, **QUICK)
    assert taught.state_dict().keys() == model.state_dict().keys()


def test_deit_lt_defers_its_weights():
    torch.manual_seed(0)
    size = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4)
    student = timm.create_model("deit_tiny_distilled_patch16_224", **size)
    x, y = pictures()
    objective = vt.learn.DeiTLT(vit(), counts=(100, 30, 10, 3), defer=0.5)
    batch = vt.learn.Batch(x, y, torch.arange(64))
    terms = {}
    for share in (0.4, 0.6):
        with torch.no_grad():
            seen = look(student.eval(), x, objective.wants)
            now = vt.learn.Now(student, share, teach=lambda teacher, images: vt.learn.Seen(teacher(images)))
            terms[share] = objective(seen, batch, now)
    assert terms[0.4]["cls"] == terms[0.6]["cls"]
    assert terms[0.4]["dist"] != terms[0.6]["dist"]
    with pytest.raises(vt.VitreousError, match="distillation token"):
        vt.train(vit(), pictures(), vt.learn.DeiTLT(vit()), epochs=1, **QUICK)


def test_long_tail():
    labels = torch.arange(1000) % 10
    kept = vt.learn.long_tailed(labels, 0.01)
    assert torch.bincount(labels[kept]).tolist() == [100, 59, 35, 21, 12, 7, 4, 2, 1, 1]


def test_features_are_drawn_to_their_own_row():
    x, y = pictures()
    g = torch.Generator().manual_seed(1)
    table = nn.functional.normalize(torch.randn(4, 8, generator=g)[y] + 0.1 * torch.randn(64, 8, generator=g))
    shares = {}
    for name, rows in {"own": table, "shuffled": table[torch.randperm(64, generator=g)]}.items():
        rows_seen = []

        class Watched(vt.learn.AlignToTable):
            def __call__(self, seen, batch, now, kept=rows_seen):
                kept.append(float(super().__call__(seen, batch, now)["align"].detach()))
                return {"align": super().__call__(seen, batch, now)["align"]}

        vt.train(vit(), (x, y), Watched(rows), epochs=15, batch=32, augment=None)
        shares[name] = rows_seen[-1] / rows_seen[0]
    assert shares["own"] < 0.9
    with pytest.raises(vt.VitreousError, match="has 10 rows"):
        vt.train(vit(), (x, y), vt.learn.AlignToTable(table[:10]), epochs=1, batch=32, augment=None)


def test_patches_are_replaced_by_count_and_labels_follow():
    torch.manual_seed(0)
    a, b = torch.zeros(6, 3, 14, 14), torch.ones(6, 3, 14, 14)
    mixed, r = replace_patches(a, b, torch.tensor([0, 0.1, 0.3, 0.5, 0.99, 1]), 7)
    assert torch.allclose(mixed.mean((1, 2, 3)), r)
    assert torch.equal((r * 49).round(), torch.tensor([0.0, 5, 15, 24, 49, 49]))
    blocks = mixed.unfold(2, 2, 2).unfold(3, 2, 2)
    assert torch.equal(blocks.amin((-1, -2)), blocks.amax((-1, -2)))  # whole patches
    images, labels = pictures(8)
    mixed, shares = vt.learn.PatchMixing(4, grid=4, probability=1)(images, labels)
    own = shares.gather(1, labels[:, None])[:, 0]
    same = (mixed == images).float().mean((1, 2, 3))
    assert torch.allclose(own, same, atol=1e-6)


def test_the_replacement_curve_falls():
    data = pictures()
    model = vt.train(vit(), data, epochs=12, **QUICK)
    curve = vt.learn.replacement_curve(model, *data, shares=(0, 0.5, 1), grid=4)
    assert curve[0] > curve[1] > curve[2] and curve[2] < 0.1  # at the end every picture is of another class


def test_experts_average_keeps_their_mean_and_ends_as_one_model():
    model = vit(depth=4)
    many = vt.learn.with_experts(model, experts=3)
    layers = [m for m in many.modules() if isinstance(m, Experts)]
    assert len(layers) == 2
    x, y = pictures()
    assert torch.allclose(many.eval()(x), model(x), atol=1e-6)
    taught = vt.train(many, (x, y), [vt.learn.CrossEntropy(), vt.learn.EWA(0.0)], epochs=2, **QUICK)
    layer = next(m for m in taught.modules() if isinstance(m, Experts))
    before = dict(layer.mean())
    spread = (layer.experts[0].fc1.weight - layer.experts[1].fc1.weight).abs().max()
    assert spread > 1e-4  # each saw its own tokens
    layer.average(0.4)
    assert all(torch.allclose(before[k], v, atol=1e-6) for k, v in layer.mean())
    assert (layer.experts[0].fc1.weight - layer.experts[1].fc1.weight).abs().max() < spread
    one = vt.learn.merged(taught)
    assert one.state_dict().keys() == model.state_dict().keys()
    assert torch.allclose(one(x), taught(x), atol=1e-5)


def test_sharpness_of_a_known_loss():
    net = nn.Linear(3, 1, bias=False)
    scales = torch.tensor([1.0, 5.0, 2.0])

    def loss(m):
        return (m.weight[0].square() * scales).sum() / 2

    assert vt.learn.largest_eigenvalue(net, loss) == pytest.approx(5.0, rel=1e-3)
    before = net.weight.clone()
    with torch.no_grad():
        net.weight.zero_()
    assert 0.5 <= vt.learn.neighbourhood_loss(net, loss, rho=1.0, directions=64) * 1.0 <= 2.5
    assert torch.equal(net.weight, torch.zeros_like(before))


def test_merging_rules_and_their_refusals():
    x, y = pictures()
    base = vit()
    models = [vt.train(base, (x, y), epochs=3, seed=s, **QUICK) for s in (1, 2, 3)]
    names = base.state_dict().keys()
    uniform = vt.merge(models, vt.learn.UniformSoup())
    for k in names:
        assert torch.allclose(uniform.state_dict()[k], torch.stack([m.state_dict()[k] for m in models]).mean(0), atol=1e-6)
    notes: list[str] = []
    greedy = vt.merge(models, vt.learn.GreedySoup(), data=(x, y), notes=notes)
    accuracy = lambda m: (m(x).argmax(1) == y).float().mean()
    assert accuracy(greedy) >= max(map(accuracy, models)) and "kept" in notes[0]
    learned = vt.merge(models, vt.learn.LearnedSoup(steps=20), data=(x, y))
    loss = nn.functional.cross_entropy
    assert loss(learned(x), y) < max(loss(m(x), y) for m in models)
    merged = vt.merge(models, vt.learn.OPCM(), base=base)
    assert accuracy(merged) > accuracy(base)
    for refused, match in (
        (lambda: vt.merge(models[:1], vt.learn.UniformSoup()), "nothing to merge"),
        (lambda: vt.merge([models[0], vit(5)], vt.learn.UniformSoup()), "model 2 differs from the first at 'head"),
        (lambda: vt.merge(models, vt.learn.OPCM()), "give base="),
        (lambda: vt.merge(models, vt.learn.GreedySoup()), "give data="),
    ):
        with pytest.raises(vt.VitreousError, match=match):
            refused()


def test_batch_norms_are_counted_anew_and_integers_copied():
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 4)).eval()
    x, y = pictures()
    merged = vt.merge([make(), make()], vt.learn.UniformSoup(), data=(x, y))
    assert torch.allclose(merged[1].running_mean, merged[0](x).mean((0, 2, 3)), atol=1e-5)


def kept_for_backward(objective: vt.learn.SlimFit | None, model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of activations that one forward pass keeps for the backward pass."""
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in weights:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    now = vt.learn.Now(model, parts=objective.parts(model) if objective else None)
    if objective:
        objective.before_step(now)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), objective.around(now) if objective else nullcontext():
        loss = model(x).sum()  # kept alive: a freed tensor's place is used again
    assert loss.requires_grad
    return sum(kept.values())


def test_slimfit_keeps_less_and_moves_few():
    model, (x, y) = vit(depth=4).train(), pictures()
    full = kept_for_backward(None, model, x)
    frozen = kept_for_backward(vt.learn.SlimFit(frozen=0.9, compress=False), copy.deepcopy(model), x)
    small = kept_for_backward(vt.learn.SlimFit(frozen=0.9), copy.deepcopy(model), x)
    assert small < 0.6 * frozen < 0.6 * full
    with torch.no_grad():
        exact = model(x)
    objective = vt.learn.SlimFit(frozen=0.9)
    now = vt.learn.Now(model, parts=objective.parts(model))
    with objective.around(now):
        assert torch.allclose(model(x), exact, atol=1e-6)
    before = {n: p.clone() for n, p in model.named_parameters()}
    one = vt.train(model, (x[:16], y[:16]), [vt.learn.CrossEntropy(), objective], epochs=1, warmup=0, **QUICK)
    units = now.parts.units
    moved = [n for n in units if not torch.equal(one.get_parameter(n), before[n])]
    assert len(moved) == len(units) - int(0.9 * len(units))
    assert not torch.equal(one.head.weight, before["head.weight"]) and all(p.requires_grad for p in one.parameters())
    taught = vt.train(model, (x, y), [vt.learn.CrossEntropy(), vt.learn.SlimFit(frozen=0.5)], epochs=12, **QUICK)
    assert (taught(x).argmax(1) == y).float().mean() > 0.6


def test_slimfit_goes_on_where_it_stopped(tmp_path):
    data, teach = pictures(), [vt.learn.CrossEntropy(), vt.learn.SlimFit(frozen=0.7)]
    whole = vt.train(vit(), data, teach, epochs=3, **QUICK)
    given = dict(epochs=3, every=0.0, out=tmp_path / "run", **QUICK)

    def stop(line: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vt.train(vit(), data, teach, progress=stop, **given)
    again = vt.train(vit(), data, teach, **given)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
