"""What each method of pretraining has of its own: the test fails where its idea is taken out."""

from __future__ import annotations

import pytest
import torch
from learning import pictures, vit

import vitreous as vt
from vitreous.learn import pretrain as p
from vitreous.learn.objective import Batch, Now, Seen

QUICK = dict(batch=16, augment=None)


def small(**kwargs):
    return vit(**{"patch_size": 4, "classes": 0} | kwargs)


def loss(objective, model, x, parts=None, labels=None, seed=0, share=0.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    now = Now(model, share=share, parts=objective.parts(model) if parts is None else parts)
    now.teach = lambda teacher, images, wants=("logits",), *_: vt.learn.objective.look(teacher, images, wants)
    torch.manual_seed(seed)
    return objective(Seen(x), Batch(x, labels, torch.arange(len(x))), now)


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


def test_simmim_of_a_pyramid() -> None:
    import timm

    kwargs = dict(img_size=64, patch_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=0)
    model = timm.create_model("swin_tiny_patch4_window7_224", **kwargs).eval()
    taught = vt.pretrain(model, (torch.randn(8, 3, 64, 64), None), "SimMIM(cell=16)", epochs=1, batch=8, augment=None)
    assert not torch.equal(taught.patch_embed.proj.weight, model.patch_embed.proj.weight)


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
