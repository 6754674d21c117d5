"""What each method of pretraining has of its own: the test fails where its idea is taken out."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from learning import pictures, vit

import vitreous as vt
from vitreous.learn import pretrain as p
from vitreous.learn.objective import Batch, Now, Seen, look
from vitreous.learn.pretrain.encode import at_size

QUICK = dict(batch=16, augment=None)


def small(**kwargs):
    return vit(**{"patch_size": 4, "classes": 0} | kwargs)


def loss(objective, model, x, parts=None, labels=None, seed=0, share=0.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    now = Now(model, share=share, parts=objective.parts(model) if parts is None else parts)
    now.teach = lambda teacher, images, wants=("logits",), *_: look(teacher, images, wants)
    torch.manual_seed(seed)
    return objective(Seen(x), Batch(x, labels, torch.arange(len(x))), now)


def test_images_of_another_size_leave_the_model_as_it_was() -> None:
    model, views = small(), torch.randn(2, 3, 8, 8)
    held, order = model.pos_embed, [name for name, _ in model.named_parameters()]
    at_size(model, type(model).forward_features, views).square().sum().backward()
    assert held.grad is not None and held.grad.abs().sum() > 0
    with pytest.raises(ZeroDivisionError):
        at_size(model, lambda net, x: 1 / 0, views)
    assert model.pos_embed is held and [name for name, _ in model.named_parameters()] == order
    assert model.patch_embed.strict_img_size


# ---- SimMIM and MAE


def test_simmim_hides_what_it_predicts() -> None:
    model, x = small(), pictures(4)[0]
    objective = p.SimMIM(mask=0.6, cell=4)
    torch.manual_seed(0)
    parts = objective.parts(model)
    mask = objective.draw(model, 4)
    assert (mask.flatten(1).sum(1) == 10).all()  # ⌈0.6 · 16⌉
    with torch.no_grad():
        cover = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        other = objective.predict(model, parts, torch.where(cover, 9.0, x), mask)
        torch.testing.assert_close(objective.predict(model, parts, x, mask), other)
        assert not torch.allclose(objective.predict(model, parts, torch.where(cover, x, 9.0), mask), other)
        shown = p.simmim.hidden_l1(torch.where(cover, x, 9.0), other, mask)
        torch.testing.assert_close(shown, p.simmim.hidden_l1(x, other, mask))  # only what is hidden counts


def test_mae_without_a_class_token() -> None:
    model, x = small(class_token=False, global_pool="avg"), pictures(4)[0]
    assert loss(p.MAE(width=16, depth=1, heads=2), model, x)["mae"].isfinite()


def test_patches_of_one_colour_are_zero() -> None:
    flat = torch.ones(2, 3, 8, 8)
    assert p.patches.normalised(p.patches.patchify(flat, (4, 4))).abs().max() == 0
    assert loss(p.MAE(width=16, depth=1, heads=2), small(), torch.ones(4, 3, 16, 16))["mae"].isfinite()


def test_patchify_and_back() -> None:
    for sides, patch in (((8, 12), (4, 3)), ((4, 8, 6), (2, 4, 3))):
        x = torch.randn(2, 3, *sides)
        cut = p.patches.patchify(x, patch)
        grid = [s // n for s, n in zip(sides, patch, strict=True)]
        assert torch.equal(p.patches.unpatchify(cut, patch, grid), x)
    assert torch.equal(p.patches.patchify(torch.arange(12.0).view(1, 3, 2, 2), (1, 2))[0, 0], torch.tensor([0.0, 4, 8, 1, 5, 9]))


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("SimMIM(mask=0.99)", "leave some"),
        ("SimMIM(mask=0.0)", "hide some"),
        ("SimMIM(mask=1.5)", "between 0 and 1"),
        ("SimMIM(cell=6)", "no multiple of the patch"),
        ("MAE(mask=0.99)", "must show some"),
        ("MAE(width=30)", "cannot have 16 heads"),
        ("SimMIM(), MAE()", "one method"),
        ("NoSuch()", "unknown objective"),
    ],
)
def test_refusals(method: str, match: str) -> None:
    with pytest.raises(vt.VitreousError, match=match):
        vt.pretrain(small(), (pictures(16)[0], None), method, epochs=1, **QUICK)


# ---- GMML


def test_gmml_counts_only_what_was_changed() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 32, 32)
    corrupted, mask = p.GMML(align=4).corrupt(x)
    assert torch.equal(torch.where(mask, x, corrupted), x)
    shares = mask.float().flatten(1).mean(1)
    foreign = shares < 0.5
    assert 0 < foreign.sum() < 8 and (shares >= 0.3).all()
    for i in foreign.nonzero()[:, 0].tolist():  # the same place of one other picture
        assert any(torch.equal(corrupted[i][:, mask[i, 0]], x[j][:, mask[i, 0]]) for j in range(8) if j != i)
    pixels = torch.randn_like(x)
    assert torch.equal(p.gmml.changed_l1(x, pixels, mask), p.gmml.changed_l1(x, torch.where(mask, pixels, 9.0), mask))


def test_gmml_decodes_the_mean_of_blocks() -> None:
    model, x = small(depth=3), pictures(4)[0]
    ours, last = p.GMML(align=1, after=(1, 3)), p.GMML(align=1, after=(3,))
    parts = ours.parts(model)
    with torch.no_grad():
        assert not torch.allclose(ours.predict(model, parts, x), last.predict(model, parts, x))
        got = model.norm(sum(model.forward_intermediates(x, intermediates_only=True, indices=[0, 2], output_fmt="NLC")) / 2)
        torch.testing.assert_close(ours.predict(model, parts, x), parts(got, (4, 4)))


def test_rectangles_that_can_never_hide_enough_are_refused() -> None:
    with pytest.raises(vt.VitreousError, match="cannot hide"):  # those of 16 do not start in the last 16 of 64 pixels
        p.masks.rectangles((64, 64), 0.75, 16)


# ---- EVA


def test_eva_learns_the_teachers_features_at_hidden_places() -> None:
    model, teacher, x = small(), vit(patch_size=4, depth=1), pictures(8)[0]
    objective = p.EVA(teacher, mask=0.4)
    before = loss(objective, model, x)["cosine"]
    taught = vt.pretrain(model, (x, None), objective, vt.learn.AdamW(lr=3e-3), epochs=15, batch=8, augment=None)
    assert abs(float(before)) < 0.3
    assert not torch.equal(taught.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    torch.manual_seed(0)
    mask = objective.draw((4, 4), 32)
    assert (mask.flatten(1).sum(1) <= 6).all() and mask.flatten(1).any(1).all()
    with torch.no_grad():
        parts = objective.parts(model)
        cover = mask[:8].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        same = objective.predict(model, parts, torch.where(cover, 9.0, x), mask[:8])
        torch.testing.assert_close(objective.predict(model, parts, x, mask[:8]), same)


def test_eva_resizes_for_the_teacher() -> None:
    teacher = vit(img_size=32, patch_size=8)
    assert loss(p.EVA(teacher), small(), pictures(4)[0])["cosine"].isfinite()
    assert loss(p.EVA(teacher, project=True), small(), pictures(4)[0])["cosine"].isfinite()
    with pytest.raises(vt.VitreousError, match=r"grid of \(2, 2\) patches and the student \(4, 4\)"):
        loss(p.EVA(vit(patch_size=8)), small(), pictures(4)[0])


# ---- SemAIM


def test_semaim_predicts_from_what_came_before() -> None:
    model, x = small(), pictures(2)[0]
    objective = p.SemAIM(order="raster")
    parts = objective.parts(model)
    rank = objective.rank(model, x)
    with torch.no_grad():
        whole = objective.predict(model, parts, x, rank)
        later = x.clone()
        later[:, :, 8:] = 9.0  # patches 8 to 15
        got = objective.predict(model, parts, later, rank)
    torch.testing.assert_close(got[:, : 1 + 9], whole[:, : 1 + 9])  # patch 8 too: it does not see itself
    assert not torch.allclose(got[:, 10:], whole[:, 10:])


def test_semaim_begins_where_the_class_token_looks() -> None:
    model, x = small(), pictures(4)[0]
    rank = p.SemAIM().rank(model, x)
    near = p.semaim.nearness(model.forward_features(x))
    assert torch.equal(rank.argmin(1), near.argmax(1)) and not model.training


# ---- SSAST


def test_ssast_finds_patches_within_one_clip() -> None:
    import timm

    size = dict(img_size=(32, 64), patch_size=4, embed_dim=24, depth=1, num_heads=3, in_chans=1, num_classes=0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", **size).eval()
    x = torch.randn(2, 1, 32, 64)
    found = loss(p.SSAST(mask=0.5), model, x)
    assert found["nce"] > 3 and found["mse"] > 0
    right, wrong = torch.eye(6)[None] * 20, torch.eye(6)[None].flip(1) * 20
    assert p.ssast.info_nce(right, torch.eye(6)[None]) < 1e-3 < p.ssast.info_nce(wrong, torch.eye(6)[None])
    a, b = torch.randn(2, 1, 6, 4)
    assert not torch.allclose(p.ssast.info_nce(a, b), p.ssast.info_nce(a, b, "predictions"))
    torch.testing.assert_close(p.ssast.info_nce(a, b), p.ssast.info_nce(b, a, "predictions"))


# ---- VideoMAE V2


def clips():
    torch.manual_seed(0)
    model = p.VideoViT((4, 16, 16), (2, 4, 4), width=24, depth=2, heads=3)
    return model, torch.randn(4, 3, 4, 16, 16)


def test_videomae_decodes_half_and_counts_what_is_hidden() -> None:
    model, x = clips()
    objective = p.VideoMAEv2(mask=0.75, width=12, depth=1)
    torch.manual_seed(0)
    parts = objective.parts(model)
    hidden, asked = objective.draw(model.patch_embed, 4)
    assert (hidden.sum(1) == 24).all() and (asked.sum(1) == 16).all()
    assert torch.equal(hidden[:, :16], hidden[:, 16:]) and not torch.equal(asked[:, :16], asked[:, 16:])
    with torch.no_grad():
        assert objective.predict(model, parts, x, hidden, asked).shape == (4, 16, 96)
        value = objective.loss(model, parts, x, hidden, asked)
        counted = (hidden & asked).view(4, 2, 4, 4).repeat_interleave(2, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        shown = ~hidden.view(4, 2, 4, 4).repeat_interleave(2, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        other = torch.where((counted | shown)[:, None], x, 9.0)
        torch.testing.assert_close(objective.loss(model, parts, other, hidden, asked), value)
    taught = vt.pretrain(model, (x, None), objective, epochs=1, batch=4, augment=None)
    assert taught(x).shape == (4, 24)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: (small(), p.VideoMAEv2()), "VideoViT"),
        (lambda: (clips()[0], p.VideoMAEv2(mask=0.01)), "hide some"),
        (lambda: (p.VideoViT((4, 15, 16), (2, 4, 4)), None), "cannot be cut"),
        (lambda: (small(), p.SSAST(mask=0.001)), "hide some"),
        (lambda: (small(class_token=False, global_pool="avg"), p.SemAIM()), "class token"),
        (lambda: (small(), p.SemAIM(order="spiral")), "no order"),
        (lambda: (small(), p.GMML(after=(3,))), "no block 3"),
    ],
)
def test_more_refusals(make, match: str) -> None:
    with pytest.raises(vt.VitreousError, match=match):
        model, objective = make()
        vt.pretrain(model, (pictures(16)[0], None), objective, epochs=1, **QUICK)


# ---- SelfPatch


def test_the_target_of_a_patch_is_its_neighbours() -> None:
    around = p.selfpatch.neighbours((3, 4))
    assert sorted(around[5].tolist()) == [0, 1, 2, 4, 6, 8, 9, 10]
    assert 11 in around[0].tolist() and not (around == torch.arange(12)[:, None]).any()  # beyond the border; never itself
    torch.manual_seed(0)
    gather, tokens = p.selfpatch.Aggregate(24, 3), torch.randn(2, 16, 24)
    with torch.no_grad():
        before = gather(tokens, (4, 4), k=8)
        tokens[:, 5] = torch.randn(2, 24)
        moved = ((gather(tokens, (4, 4), k=8) - before).abs().amax((0, 2)) > 1e-6)[1:]
        assert not moved[5] and moved[[0, 1, 2, 4, 6, 8, 9, 10]].all() and moved.sum() == 8
        assert not torch.allclose(gather(tokens, (4, 4), k=1), gather(tokens, (4, 4), k=8))


def test_selfpatch_teaches_and_the_teacher_follows() -> None:
    model, x = small(img_size=32), torch.randn(8, 3, 32, 32)
    objective = p.SelfPatch(local=1, prototypes=32, patch_prototypes=16)
    torch.manual_seed(0)
    parts = objective.parts(model)
    found = loss(objective, model, x, parts)
    assert set(found) == {"class", "patches"} and parts.center.abs().max() == 0  # in eval mode nothing is kept
    sum(found.values()).backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None and parts["student"].p_head.last_layer.weight_v.grad is None
    assert all(v.grad is None for v in parts["backbone"].parameters())
    before = parts["backbone"].pos_embed.clone()
    torch.nn.init.ones_(model.pos_embed)
    objective.after_step(Now(model, parts=parts))
    torch.testing.assert_close(parts["backbone"].pos_embed, 0.996 * before + 0.004)


# ---- POA


def test_poa_teaches_its_parts() -> None:
    model = small(img_size=32)
    objective = p.POA(local=1, prototypes=(16, 32), ibot=0.0)
    assert set(objective.sizes(model)) == {(16, 1), (16, 2), (24, 1)}
    taught = vt.pretrain(model, (torch.randn(16, 3, 32, 32), None), objective, epochs=2, batch=8, augment=None)
    part, x = p.extract(taught, 16, 1), torch.randn(2, 3, 32, 32)
    assert part(x).shape == (2, 16) and part.blocks[0].attn.num_heads == 2
    whole = p.extract(taught, 24, 2)
    torch.testing.assert_close(whole(x), taught(x))
    with pytest.raises(vt.VitreousError, match="widths up to 24 in steps of 8"):
        p.extract(taught, 20, 1)


def test_poa_without_an_elastic_student_is_dino() -> None:
    model, x = small(), pictures(4)[0]
    both, alone = (loss(p.POA(local=0, prototypes=(8,), smallest=n), model, x) for n in (0.5, 1.0))
    assert both.keys() - alone.keys() == {"distil_global"}
    intact = p.poa.Told(torch.zeros(0, 3, 8), torch.randn(2, 3, 8), torch.zeros(0, 8))
    shares, none = torch.rand(2, 3, 8).softmax(-1), torch.zeros(0, 8)
    twice = p.poa.terms(intact, intact, shares, none, torch.zeros(0))
    torch.testing.assert_close(p.poa.terms(intact, None, shares, none, torch.zeros(0))["global"], twice["global"])


def test_poa_gives_its_elastic_part_gradient() -> None:
    """Channels inside of the part learn from it; those outside only from the intact student."""
    model = small(img_size=32)
    size, x = (8, 1), torch.randn(4, 3, 32, 32)
    p.POA().tokens(model, x, size, None, torch.zeros(1, 24)).square().sum().backward()
    gradient = model.blocks[0].mlp.fc1.weight.grad
    assert gradient[:32, :8].abs().max() > 0 and gradient[32:].abs().max() == 0 and gradient[:, 8:].abs().max() == 0


def test_an_extracted_size_is_an_ordinary_model(tmp_path) -> None:
    kwargs = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0)
    model = vt.open("vit_tiny_patch16_224", **kwargs)
    part = p.extract(model, 8, 1)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vt.load(vt.save(part, tmp_path / "part.safetensors"))(x), part(x))


# ---- FSFM


def faces() -> torch.Tensor:
    """Parsings of 32 × 32: skin on background, eyes and mouth in their places."""
    face = torch.zeros(8, 32, 32, dtype=torch.uint8)
    face[:, 4:28, 4:28] = 1
    face[:, 8:12, 8:24], face[:, 20:24, 12:20], face[:, 0:4] = 4, 7, 10
    return face


def test_fsfm_hides_a_region_whole(tmp_path) -> None:
    np.save(tmp_path / "faces.npy", faces().numpy())
    model, x = small(img_size=32), torch.randn(8, 3, 32, 32)
    objective = p.FSFM(parsings=str(tmp_path / "faces.npy"), width=16, depth=1)
    groups = p.masks.facial_groups(faces()[0], 4)
    random.seed(1)  # eyes
    mask, region = objective.draw(model, torch.arange(8), 8)
    assert (mask.sum(1) == 48).all() and torch.equal(region[0], groups[1]) and not (region & ~mask).any()
    torch.manual_seed(0)
    random.seed(1)
    parts = objective.parts(model)
    found = loss(objective, model, x, parts)
    assert set(found) == {"pixels", "region", "identity"}
    sum(found.values()).backward()
    assert parts["online"].predictor.projection_head[0].weight.grad is not None
    assert all(v.grad is None for name in ("target", "backbone") for v in parts[name].parameters())
    with torch.no_grad():  # the target sees what is hidden
        other = torch.where(mask.view(8, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3), 9.0, x)
        a, b = (objective.losses(model, parts, v, mask, region)["identity"] for v in (x, other))
        assert not torch.allclose(a, b)
    with pytest.raises(vt.VitreousError, match="must have all"):
        objective.draw(model, torch.tensor([9]), 1)


# ---- Uni4Eye


def test_uni4eye_learns_pictures_and_volumes_with_the_same_blocks(tmp_path) -> None:
    torch.manual_seed(0)
    model = p.UnifiedViT(16, (16, 16, 6), patch=4, width=24, depth=1, heads=3)
    objective = p.Uni4Eye(width=16, depth=1, heads=2)
    parts = objective.parts(model)
    flat, deep = torch.randn(2, 3, 16, 16), torch.rand(2, 1, 16, 16, 6)
    for x, n, other in ((flat, 16, "proj3"), (deep, 32, "proj2")):
        model.zero_grad()
        found = objective.losses(model, parts, x, torch.rand(2, n))
        assert set(found) == {"picture", "edges"}
        sum(found.values()).backward()
        assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
        assert (
            getattr(model.patch_embed, other).weight.grad is None
            or getattr(model.patch_embed, other).weight.grad.abs().max() == 0
        )
    assert parts["edges"].pred2.weight.grad.abs().max() > 0
    np.save(tmp_path / "volumes.npy", deep.numpy())
    both = p.Uni4Eye(width=16, depth=1, heads=2, volumes=str(tmp_path / "volumes.npy"))
    taught = vt.pretrain(model, (torch.randn(16, 3, 16, 16), None), both, epochs=2, batch=16, augment=None)
    assert all((taught.get_parameter(f"patch_embed.{n}.weight") != model.get_parameter(f"patch_embed.{n}.weight")).any()
               for n in ("proj2", "proj3"))  # fmt: skip
    released = p.UnifiedViT(16, (16, 16, 6), patch=4, width=24, depth=1, heads=3, positions3=False)
    assert released.table(5, 24).abs().max() == 0 < model.table(5, 24).abs().max()


# ---- TOV-VICReg


def test_order_is_told_by_place_alone() -> None:
    a, b, c = (torch.full((6, 2), v) for v in (1.0, 2.0, 3.0))
    told = p.tov_vicreg.in_order(a, b, c, torch.arange(6))
    assert told[0].tolist() == [1, 1, 2, 2, 3, 3] and told[3].tolist() == [2, 2, 3, 3, 1, 1]


def test_vicreg_terms() -> None:
    z = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    same, variance, covariance = p.tov_vicreg.vicreg(z, z)
    assert same == 0 and covariance == 0 and variance == pytest.approx(1 - (2 / 3 + 1e-4) ** 0.5)
    assert p.tov_vicreg.vicreg(z, 0 * z)[1] == pytest.approx((2 - (2 / 3 + 1e-4) ** 0.5 - 0.01) / 2)
    assert p.tov_vicreg.vicreg(z[:, :1].expand(-1, 2), z)[2] > 0.1


def test_tov_vicreg_from_frames(tmp_path) -> None:
    frames = torch.randn(16, 3, 16, 16)
    np.save(tmp_path / "frames.npy", frames.numpy())
    objective = p.TOVVICReg(frames=str(tmp_path / "frames.npy"), hidden=16)
    found = loss(objective, small(), frames)
    assert set(found) == {"invariance", "variance", "covariance", "order"} and all(t.isfinite() for t in found.values())
    with pytest.raises(vt.VitreousError, match="order of time"):
        loss(p.TOVVICReg(), small(), frames)
    with pytest.raises(vt.VitreousError, match="that can be read"):
        loss(p.TOVVICReg(frames=str(tmp_path / "none.npy")), small(), frames)
    with pytest.raises(vt.VitreousError, match="must be the same"):
        loss(objective, small(img_size=8), frames[..., :8, :8])


# ---- SoftCon


def test_soft_labels_are_cosines() -> None:
    labels = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]])
    alike = p.softcon.alike(labels)
    assert alike[0, 1] == pytest.approx(0.5**0.5) and alike[0, 2] == 0 and (alike.diagonal() == 1).all()
    rows = torch.randn(4, 8)
    both = torch.tensor([10.0, -5.0])
    one = p.softcon.soft_contrast(rows, rows, labels, 0.1, 0.5, both)[1]
    assert not torch.allclose(one, p.softcon.soft_contrast(rows, rows, labels.flip(0), 0.1, 0.5, both)[1])
    assert p.softcon.soft_contrast(rows, rows, 0 * labels, 0.1, 0.5, both)[1] == 0


def test_softcon_learns_many_channels() -> None:
    model = p.with_channels(small(), 5)
    data = torch.randn(8, 5, 16, 16), torch.randint(0, 2, (8, 3))
    taught = vt.pretrain(model, data, p.SoftCon(width=8), epochs=1, batch=8, augment=None)
    assert taught.patch_embed.proj.in_channels == 5
    with pytest.raises(vt.VitreousError, match="needs labels"):
        vt.pretrain(model, (data[0], None), p.SoftCon(width=8), epochs=1, batch=8, augment=None)
    wide, x = p.with_channels(small(), 5, inflate=True), torch.randn(2, 3, 16, 16)
    kernels = small().patch_embed.proj.weight
    torch.testing.assert_close(wide.patch_embed.proj.weight[:, 2], kernels[:, 2] * 3 / 5)
    torch.testing.assert_close(wide.patch_embed.proj.weight[:, 4], kernels.mean(1) * 3 / 5)
    assert x.shape[1] == 3


# ---- Mask & Match


def test_the_mask_grows_and_places_match() -> None:
    model, x = small(), pictures(8)[0]
    objective = p.MaskAndMatch()
    now = Now(model, share=0.0)
    assert objective.masked(now) == pytest.approx(0.1)
    now.share = 1.0
    assert objective.masked(now) == pytest.approx(0.6)
    found = loss(objective, model, x)
    assert set(found) == {"global", "local", "match", "budget"} and all(t.isfinite() for t in found.values())
    rows = torch.eye(6)
    assert p.mask_and_match.info_nce(rows, rows, 0.1) < 0.01 < p.mask_and_match.info_nce(rows, rows.roll(1, 0), 0.1)
