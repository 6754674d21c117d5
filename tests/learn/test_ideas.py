"""What a method is about, by hand: each of these fails when the idea is taken out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from learning import pictures, vit
from torch import nn

import vitreous as vt
from vitreous.learn import Batch, Now, Seen
from vitreous.learn.align import alignment
from vitreous.learn.classify import by_labels
from vitreous.learn.collaborate import together
from vitreous.learn.ewa import Experts
from vitreous.learn.frd import recalibration
from vitreous.learn.heal import objectives_for
from vitreous.learn.long_tail import deit_lt
from vitreous.learn.measure import accuracy_on
from vitreous.learn.nkd import nkd, uskd
from vitreous.learn.sam import ascend
from vitreous.learn.sgd_sai import SGDSaIOptimizer

STEP = dict(epochs=1, batch=16, augment=None, warmup=0, clip=None)


def test_sam_steps_from_where_it_was_by_the_gradient_of_where_it_went():
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), pictures(16)
    taught = vt.train(net, (x, y), optimiser=vt.learn.SAM(vt.learn.SGD(0.1, 0.0, momentum=0.0), 0.5), **STEP)
    parameters = list(net.parameters())
    g = torch.autograd.grad(F.cross_entropy(net(x), y), parameters)
    norm = torch.stack([t.norm() for t in g]).norm()
    there = {n: p + 0.5 * t / norm for (n, p), t in zip(net.named_parameters(), g, strict=True)}
    loss = F.cross_entropy(torch.func.functional_call(net, there, (x,)), y)
    for p, ours, t in zip(parameters, taught.parameters(), torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(ours, p - 0.1 * t)


def test_sgd_sai_waits_for_a_gradient_and_keeps_single_numbers_calm():
    p, one = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))
    optimiser = SGDSaIOptimizer([p, one], lr=1.0)
    first = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for g in (torch.zeros(4), torch.full((4,), math.nan), first):
        p.grad, one.grad = g.clone(), torch.full((1,), 2.0)
        optimiser.step()
    torch.testing.assert_close(p.detach(), -first * first.norm() / first.std())
    assert one.detach() == -6  # three steps of its own gradient


def test_kd_is_scaled_by_the_square_of_its_temperature():
    z, t = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    now = Now(nn.Identity(), teach=lambda *_: Seen(t))
    found = vt.learn.KD(nn.Identity(), temperature=3.0)(Seen(z), Batch(z, None, torch.arange(5)), now)["kd"]
    p, q = (t / 3).softmax(1), (z / 3).softmax(1)
    torch.testing.assert_close(found, 9 * (p * (p / q).log()).sum(1).mean())


def test_labels_are_smoothed_and_several_may_hold():
    z = torch.tensor([[2.0, 0.0, -1.0]])
    seen, batch = Seen(z), Batch(z, torch.tensor([0]), torch.arange(1))
    now = Now(nn.Identity())
    soft = torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]])
    torch.testing.assert_close(vt.learn.CrossEntropy(0.1)(seen, batch, now)["ce"], -(soft * z.log_softmax(1)).sum())
    torch.testing.assert_close(
        vt.learn.BinaryCrossEntropy(0.1)(seen, batch, now)["bce"], F.binary_cross_entropy_with_logits(z, soft)
    )


def test_the_teacher_of_deit_lt_sees_the_students_own_picture_shrunk():
    shown = []
    x = torch.randn(2, 3, 16, 16)
    student = vt.open(
        "deit_tiny_distilled_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=4
    )
    seen = Seen(torch.zeros(2, 4), prefix=torch.randn(2, 2, 24))
    now = Now(student, teach=lambda _, images: shown.append(images) or Seen(torch.randn(2, 4)))
    vt.learn.DeiTLT(student, size=8)(seen, Batch(x, torch.tensor([0, 1]), torch.arange(2)), now)
    assert torch.equal(shown[0], F.interpolate(x, (8, 8), mode="bicubic", antialias=True))


def test_features_meet_the_rows_of_their_own_places():
    g = torch.Generator().manual_seed(0)
    table, x, index = torch.randn(9, 5, generator=g), torch.randn(4, 3, generator=g), torch.tensor([7, 2, 8, 0])
    objective, parts = vt.learn.AlignToTable(table, tau=0.1), nn.Linear(3, 5)
    found = objective(Seen(x, pooled=x), Batch(x, None, index), Now(nn.Identity(), parts=parts))["align"]
    torch.testing.assert_close(found, 0.3 * alignment(parts(x), table[index], 0.1))


def test_experts_come_nearer_by_a_share_that_rises():
    torch.manual_seed(0)
    experts = Experts(nn.Linear(2, 2), 3)
    for e in experts.experts:
        nn.init.normal_(e.weight)
    before = torch.stack([e.weight.detach().clone() for e in experts.experts])
    vt.learn.EWA(most=0.4).after_step(Now(nn.Sequential(experts), share=0.5))
    others = (before.sum(0) - before) / 2
    torch.testing.assert_close(torch.stack([e.weight for e in experts.experts]), 0.8 * before + 0.2 * others)


def test_what_is_mixed_in_and_its_label_are_of_one_picture():
    torch.manual_seed(0)
    x = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    mixed, shares = vt.learn.PatchMixing(5, grid=4, probability=1)(x, torch.arange(5))
    torch.testing.assert_close(shares, torch.stack([(mixed == c).float().mean((1, 2, 3)) for c in range(5)], 1))
    assert (shares.sum(1) == 1).all() and (shares > 0).sum() > 5


def test_a_learned_soup_leaves_out_what_does_harm():
    x, y = pictures()
    good = vt.train(vit(), (x, y), epochs=8, batch=16, augment=None)
    bad = vit()
    nn.init.normal_(bad.head.weight, std=3.0)
    notes: list[str] = []
    learned = vt.merge([good, bad], vt.learn.LearnedSoup(steps=60, lr=0.2), data=(x, y), notes=notes)
    uniform = vt.merge([good, bad], vt.learn.UniformSoup())
    assert F.cross_entropy(learned(x), y) < 0.7 * F.cross_entropy(uniform(x), y)
    assert float(notes[0].split()[1].strip(",")) > 0.8


def test_a_learned_soup_has_a_temperature():
    """A model that is right but unsure beats one that is sure and crooked: logits can be made larger, not straight.

    At temperature 1 the best share of the second is where half of the images have margin 0.3 + 5.6 s, and half 0.3 − 0.2 s.
    """
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).reshape(4, 1, 1, 2)
    y = torch.tensor([0, 0, 1, 1])
    models = []
    for w in ([0.3, 0.0], [3.0, 2.9]):
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        model[1].weight.data = torch.tensor([w, w]) * torch.tensor([[1.0], [-1.0]])
        models.append(model)
    vt.merge(models, vt.learn.LearnedSoup(steps=100, lr=0.1), data=(x, y), notes=(notes := []))
    assert float(notes[0].split()[1].strip(",")) > 0.9


@pytest.mark.parametrize("until", [0.0, 0.5, 1.0])
def test_pictures_are_mixed_until_a_share_of_the_run(until):
    calls = []

    def mix(images, labels):
        calls.append(len(images))
        return images, F.one_hot(labels, 4).float()

    vt.train(nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), pictures(), mix=mix, mix_until=until, **STEP)
    assert len(calls) == 4 * until


def test_averaged_weights_and_clipping_and_warmup():
    net, data = nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), pictures(16)
    plain = vt.learn.SGD(0.1, 0.0, momentum=0.0)
    start, after = net[1].weight.detach(), vt.train(net, data, optimiser=plain, **STEP)[1].weight
    averaged = vt.train(net, data, optimiser=plain, ema=0.75, **STEP)[1].weight
    torch.testing.assert_close(averaged, 0.75 * start + 0.25 * after)
    clipped = vt.train(net, data, optimiser=plain, **STEP | dict(clip=0.01))
    moved = torch.stack([(a - b).norm() for a, b in zip(clipped.parameters(), net.parameters(), strict=True)]).norm()
    torch.testing.assert_close(moved, torch.tensor(0.001), rtol=1e-3, atol=0.0)
    warm = vt.train(net, data, optimiser=plain, **STEP | dict(warmup=1.0))[1].weight
    assert (warm - start).norm() < 0.02 * (after - start).norm()  # its first step is a hundredth as long


# ---- one logit, and labels that mark several classes


def the_two(z):
    """The two classes that one logit `[B, 1]` stands for."""
    return torch.cat([torch.zeros_like(z), z], 1)


def test_one_logit_is_taught_as_two_classes():
    z, t = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(0))
    y, seen = torch.tensor([0, 1, 1, 0, 1, 0]), Seen(z)
    batch, now = Batch(z, y, torch.arange(6)), Now(nn.Identity(), teach=lambda *_: Seen(t))
    expected = F.binary_cross_entropy_with_logits(z[:, 0], y.float())
    torch.testing.assert_close(vt.learn.CrossEntropy()(seen, batch, now)["ce"], expected)
    torch.testing.assert_close(vt.learn.BinaryCrossEntropy()(seen, batch, now)["bce"], expected)
    for smooth in (vt.learn.CrossEntropy(0.1), vt.learn.BinaryCrossEntropy(0.1)):
        soft = F.binary_cross_entropy_with_logits(z[:, 0], 0.9 * y + 0.05)
        torch.testing.assert_close(next(iter(smooth(seen, batch, now).values())), soft)
    p, q = t.sigmoid(), z.sigmoid()
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(vt.learn.KD(nn.Identity())(seen, batch, now)["kd"], kl)
    torch.testing.assert_close(nkd(z, t, y), nkd(the_two(z), the_two(t), y))
    torch.testing.assert_close(uskd(z, t, F.one_hot(y)), uskd(the_two(z), the_two(t), F.one_hot(y)))
    for ours, theirs in zip(deit_lt(z, z, t, y), deit_lt(the_two(z), the_two(z), the_two(t), y), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours > 0
    empty = nn.ModuleList()
    torch.testing.assert_close(recalibration(z, [], t, [], empty), recalibration(the_two(z), [], the_two(t), [], empty))
    assert recalibration(z, [], t, [], empty)[1] > 0
    assert all(together(m, m)[0].shape[1] == 2 for m in (z, z[:, :, None, None]))


def test_one_logit_is_learnt_and_judged():
    net, (x, y) = vit(1), pictures(64)
    y = (y > 1).long()
    taught = vt.train(net, (x, y), epochs=12, batch=16, augment=None, optimiser=vt.learn.AdamW(lr=2e-3), mixup=0.2)
    with torch.no_grad():
        right = float(((taught(x)[:, 0] > 0) == (y == 1)).float().mean())
    assert right > 0.8 and accuracy_on(taught, (x, y)) == right
    assert vt.learn.replacement_curve(taught, x, y, [0.0]) == [right]
    healed = vt.heal(taught, taught, (x, y), epochs=1, batch=16, augment=None)
    assert (healed(x) - taught(x)).abs().max() > 1e-4


def test_labels_that_mark_several_classes_are_learnt_one_by_one():
    z, t = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    marks = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1]])
    batch, now = Batch(z, marks, torch.arange(5)), Now(nn.Identity(), teach=lambda *_: Seen(t))
    p, q = t.sigmoid(), z.sigmoid()
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(vt.learn.KD(nn.Identity(), multi_label=True)(Seen(z), batch, now)["kd"], kl)
    for objective in (vt.learn.CrossEntropy(), vt.learn.NKD(nn.Identity())):
        with pytest.raises(vt.VitreousError, match="BinaryCrossEntropy"):
            objective(Seen(z), batch, now)
    assert isinstance(by_labels(marks), vt.learn.BinaryCrossEntropy)
    assert isinstance(by_labels(F.one_hot(marks.argmax(1))), vt.learn.CrossEntropy)
    net, x = vit(3), pictures(5)[0]
    first, second = objectives_for(net, net, marks, x)
    assert isinstance(first, vt.learn.BinaryCrossEntropy) and isinstance(second, vt.learn.KD) and second.multi_label
    said = (net(x) > 0).int()
    assert accuracy_on(net, (x, marks)) == pytest.approx(float((said == marks).float().mean()))


def test_adaptive_sam_goes_further_where_weights_are_large():
    p = nn.Parameter(torch.tensor([2.0, -1.0]))
    p.grad = torch.tensor([1.0, 3.0])
    restore = ascend([p], 0.5, adaptive=True)
    torch.testing.assert_close(p.detach(), torch.tensor([2.0, -1.0]) + 0.5 * torch.tensor([4.0, 3.0]) / 13**0.5)
    restore()
    assert p.tolist() == [2.0, -1.0]


def test_specific_distillation_weighs_both_tokens_by_alpha():
    size = dict(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=4)
    student = vt.open("deit_tiny_distilled_patch16_224", **size)
    tokens, theirs, y = torch.randn(3, 2, 24), torch.randn(3, 4), torch.tensor([0, 3, 1])
    seen, now = Seen(torch.zeros(3, 4), prefix=tokens), Now(student, teach=lambda *_: Seen(theirs))
    found = vt.learn.SpecificDistillation(student, alpha=0.2)(seen, Batch(torch.zeros(3, 3, 16, 16), y, torch.arange(3)), now)
    torch.testing.assert_close(found["cls"], 0.8 * F.cross_entropy(student.head(tokens[:, 0]), y))
    torch.testing.assert_close(found["dist"], 0.2 * F.cross_entropy(student.head_dist(tokens[:, 1]), theirs.argmax(1)))
