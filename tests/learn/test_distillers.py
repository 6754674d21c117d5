"""G2SD, ScaleKD and ARBEx: what each has of its own; goldens hold their losses."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from learning import pictures, vit
from torch import nn

import vitreous as vt
from vitreous.learn.arbex import ReliabilityBalance
from vitreous.learn.g2sd import generic
from vitreous.learn.maps import as_map, last_stages
from vitreous.learn.objective import look
from vitreous.learn.scalekd import TeacherEnd, without_dc
from vitreous.models.masked_autoencoder import MaskedAutoencoder, encode_visible, masked_order

QUICK = dict(batch=16, augment=None)


def autoencoder(**kwargs) -> MaskedAutoencoder:
    torch.manual_seed(1)
    size = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=4)
    return MaskedAutoencoder(decoder_width=16, decoder_depth=3, decoder_heads=2, **size | kwargs).eval()


def losses(objective, model, data, **settings):
    """Its losses at each step, and the model."""
    kept: list[float] = []

    class Watched(type(objective)):
        def __call__(self, seen, batch, now):
            terms = super().__call__(seen, batch, now)
            kept.append(float(sum(t.detach() for t in terms.values())))
            return terms

    taught = vt.train(model, data, Watched(**vars(objective)), vt.learn.AdamW(lr=3e-3), **{**QUICK, "warmup": 0.0, **settings})
    return kept, taught


# ---- G2SD


def test_what_is_hidden_is_not_seen():
    model, x = autoencoder(), pictures(4)[0]
    noise = torch.rand(4, 16)
    seen, place = masked_order(noise, 0.75)
    assert seen.shape == (4, 4) and torch.equal(place.argsort(1)[:, :4], seen)
    with torch.no_grad():
        before = model.masked(x, noise)
        grid = (place >= 4).view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        torch.testing.assert_close(model.masked(torch.where(grid, 9.0, x), noise), before)
        assert not torch.allclose(model.masked(torch.where(grid, x, 9.0), noise), before)
        everything = torch.arange(16).expand(4, -1)
        torch.testing.assert_close(encode_visible(model, x, everything), model.forward_features(x))


def test_the_generic_stage_predicts_the_teachers_decoder_at_every_place():
    teacher, student = autoencoder(), vit(patch_size=4)
    stage = vt.learn.GenericDistillation(teacher, layer=2, width=8, depth=1, heads=2)
    x = pictures(8)[0]
    now = vt.learn.Now(student, parts=stage.parts(student))
    torch.manual_seed(5)
    with torch.no_grad():
        loss = stage(vt.learn.Seen(x), vt.learn.Batch(x, None, torch.arange(8)), now)["generic"]
        torch.manual_seed(5)
        noise = torch.rand(8, 16)
        target = teacher.masked(x, noise, depth=2)
        assert not torch.allclose(target, teacher.masked(x, noise))  # its second block, not its last
        seen, place = masked_order(noise, 0.75)
        ours = now.parts["predict"](now.parts["decoder"](encode_visible(student, x, seen), place))
        torch.testing.assert_close(loss, generic(ours, target))
        apart = F.smooth_l1_loss(ours[0, 0], F.layer_norm(target[0, 0], (16,), eps=1e-6), beta=2.0)
        assert apart > 0  # the class token counts


def test_both_stages_of_g2sd_from_pixels_to_classes():
    x, y = pictures(32)
    seen, teacher = losses(vt.learn.MAE(), autoencoder(depth=1), (x, None), epochs=6)
    assert min(seen[-3:]) < 0.95 * max(seen[:3])
    torch.manual_seed(0)
    size = dict(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=4)
    student = timm.create_model("deit_tiny_distilled_patch16_224", **size)
    stage = vt.learn.GenericDistillation(teacher, layer=3, width=8, depth=1, heads=2)
    seen, taught = losses(stage, student, (x, None), epochs=6)
    assert min(seen[-3:]) < 0.95 * max(seen[:3])
    apart = {n: (p - student.get_parameter(n)).abs().max() for n, p in taught.named_parameters()}
    assert apart["blocks.0.attn.qkv.weight"] > 1e-3
    assert apart["dist_token"] < 1e-3 < apart["cls_token"]  # it stayed out: weight decay alone
    answer = vt.train(taught, (x, y), vt.learn.SpecificDistillation(autoencoder()), epochs=1, **QUICK)
    assert (answer.dist_token - taught.dist_token).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("objective", "model", "match"),
    [
        (lambda: vt.learn.GenericDistillation(vit()), vit, "the teacher needs a masked autoencoder"),
        (lambda: vt.learn.GenericDistillation(autoencoder()), vit, "grid"),
        (lambda: vt.learn.GenericDistillation(autoencoder(), layer=4), lambda: vit(patch_size=4), "no layer 4"),
        (lambda: vt.learn.GenericDistillation(autoencoder(), layer=1, mask=0.99), lambda: vit(patch_size=4), "must show some"),
        (lambda: vt.learn.SpecificDistillation(vit()), vit, "distillation token"),
        (lambda: vt.learn.ScaleKD(vit(), last=1), lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), "stages of Sequential"),
        (lambda: vt.learn.ScaleKD(vit(), last=2), vit, "cannot be its last stage"),
        (lambda: vt.learn.ScaleKD(vit(), last=1, heads=(5, 3)), vit, "heads= that do"),
        (lambda: vt.learn.ScaleKD(vit(7), last=1, heads=(2, 3)), vit, "teacher of the same classes"),
        (lambda: vt.learn.ARBEx(), lambda: nn.Sequential(nn.Flatten()), "linear classifier"),
        (lambda: vt.learn.ARBEx(heads=5), vit, "5 heads do not divide"),
    ],
)
def test_refusals(objective, model, match):
    with pytest.raises(vt.VitreousError, match=match):
        vt.train(model(), pictures(), objective(), epochs=1, **QUICK)


# ---- ScaleKD


def swin():
    torch.manual_seed(2)
    size = dict(img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), num_classes=4)
    return timm.create_model("swin_tiny_patch4_window7_224", **size).eval()


def cnn():
    torch.manual_seed(3)
    return timm.create_model("resnet18", num_classes=4, channels=(8, 8, 8, 16)).eval()


def bigger(n=32):
    x, y = pictures(n)
    return F.interpolate(x, scale_factor=2), y


@pytest.mark.parametrize("make", [swin, lambda: vit(depth=4, img_size=32)], ids=["pyramid", "plain"])
def test_the_teachers_last_stage_gives_its_own_feature(make):
    teacher, (x, _) = make(), bigger(2)
    end = TeacherEnd.of(teacher, 2)
    with torch.no_grad():
        seen = look(teacher, x, ("logits",), (), (end.before, end.after))
        entering, leaving = seen.layers[end.before], seen.layers[end.after]
        tokens = as_map(entering, end.prefix).flatten(2).mT
        torch.testing.assert_close(end(tokens, entering), leaving)
        assert not torch.allclose(end(tokens.flip(1), entering), leaving)
        want = teacher.forward_features(x)
        torch.testing.assert_close(leaving, want)


def test_gradients_pass_through_the_teacher_and_leave_it_alone():
    teacher, (x, _) = swin(), bigger(2)
    end = TeacherEnd.of(teacher, 2)
    with torch.no_grad():
        entering = look(teacher, x, ("logits",), (), (end.before, end.after)).layers[end.before]
    tokens = as_map(entering).flatten(2).mT.requires_grad_()
    end(tokens, entering).square().sum().backward()
    assert tokens.grad is not None and tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_the_mean_is_the_coefficient_of_frequency_zero():
    """By the discrete cosine transform itself, written out."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    k, n = torch.arange(4.0, dtype=torch.float64), 4
    basis = torch.cos(torch.pi / n * (k[None] + 0.5) * k[:, None])
    basis = basis / basis.norm(dim=1, keepdim=True)
    coefficients = basis @ x @ basis.T
    coefficients[..., 0, 0] = 0
    torch.testing.assert_close(basis.T @ coefficients @ basis, without_dc(x))


@pytest.mark.parametrize(
    ("student", "teacher", "settings"),
    [
        (cnn, swin, dict(heads=(4, 4), size=32)),
        (lambda: vit(img_size=32), swin, dict(heads=(4, 4))),
        (cnn, lambda: vit(depth=3, img_size=32), dict(heads=(3, 3), last=1, size=32)),
    ],
    ids=["cnn of a pyramid", "vit of a pyramid", "cnn of a vit"],
)
def test_a_student_comes_nearer_in_four_views(student, teacher, settings):
    objective = vt.learn.ScaleKD(teacher(), **settings)
    seen, taught = losses(objective, student(), bigger(16), epochs=5)
    assert min(seen[-2:]) < seen[0]
    assert taught.state_dict().keys() == student().state_dict().keys()
    model = student()
    with torch.no_grad():
        x, y = bigger(4)
        now = vt.learn.Now(model, parts=objective.parts(model), teach=lambda t, *given: look(t, *given))
        terms = objective(look(model, x, ("logits",), (), objective.layers(model)), vt.learn.Batch(x, y, y), now)
    assert terms.keys() == {"spatial 3", "spatial 4", "frequency 3", "frequency 4", "kd", "cls"}


def test_stages():
    assert last_stages(cnn(), "x") == ("layer3", "layer4")
    assert last_stages(swin(), "x") == ("layers.2", "layers.3")
    assert last_stages(vit(depth=4), "x") == ("blocks.2", "blocks.3")


# ---- ARBEx


def test_a_prediction_does_not_depend_on_the_other_images():
    e, z = torch.randn(6, 12), torch.randn(6, 4)
    for over, same in (("anchors", True), ("batch", False)):
        torch.manual_seed(0)
        balance = ReliabilityBalance(12, 4, over=over).eval()
        balance.trust.fill_(1.0)
        with torch.no_grad():
            together, alone = balance(e, z).final, torch.cat([balance(e[i : i + 1], z[i : i + 1]).final for i in range(6)])
        assert torch.allclose(together, alone, atol=1e-6) == same, over
        assert torch.allclose(together.sum(1), torch.ones(6), atol=1e-5)


def test_the_unsure_are_corrected_and_the_sure_are_not():
    balance = ReliabilityBalance(4, 3, anchors=2)
    with torch.no_grad():
        balance.trust.fill_(1.0)
        balance.anchors.copy_(torch.arange(3.0)[:, None, None].expand(3, 2, 4) * 5)
        e = torch.full((2, 4), 10.0)  # at the anchors of the last class
        found = balance(e, torch.tensor([[30.0, 0, 0], [0.1, 0, 0]]))
    assert found.similarities[0, 2] > 0.99
    assert found.final[0, 0] > 0.99 and found.final[1].argmax() == 2


def test_arbex_keeps_its_balance_or_throws_it_away(tmp_path):
    data = pictures()
    plain = vt.train(vit(), data, vt.learn.ARBEx(anchors=2), epochs=1, **QUICK)
    assert plain.state_dict().keys() == vit().state_dict().keys()
    start = vt.learn.with_balance(vit(), anchors=2)
    kept = vt.train(start, data, vt.learn.ARBEx(), epochs=8, **QUICK)
    balance = kept.head.balance
    assert float(balance.trust) == pytest.approx(31 / 32)
    assert not torch.equal(balance.anchors, start.head.balance.anchors)
    x, y = data
    assert torch.allclose(kept(x).exp().sum(1), torch.ones(64), atol=1e-5)
    assert (kept(x).argmax(1) == y).float().mean() > 0.9
    vt.save(kept, tmp_path / "kept.safetensors")
    with torch.no_grad():
        assert torch.equal(vt.load(tmp_path / "kept.safetensors", base=start)(x), kept(x))
