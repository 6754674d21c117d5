"""Masks, targets, losses and whole methods hold the reference implementations' outputs."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from support import official_state

from vitreous.learn import AdamW
from vitreous.learn import pretrain as p
from vitreous.learn.objective import Batch, Now, Seen
from vitreous.learn.pretrain import masks
from vitreous.learn.pretrain.simmim import hidden_l1
from vitreous.models.masked_autoencoder import sine_cosine

FOLDER = Path(__file__).parents[1] / "goldens"


def golden(name: str):
    held = np.load(FOLDER / f"{name}.npz")
    return json.loads(bytes(held["info"])), {k: torch.from_numpy(held[k]) for k in held if k != "info" and held[k].ndim} | {
        k: float(held[k]) for k in held if k != "info" and not held[k].ndim
    }


def noise(seed: int, shape) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def near(ours, theirs, tolerance=1e-4) -> None:
    """Scalars, or the first values of each sample."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    if theirs.ndim == 2 and ours.ndim > 1:
        ours = ours.flatten(1)[:, : theirs.shape[1]]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_aligned_masks() -> None:
    info, g = golden("simmim--mask")
    for name, k in info["kwargs"].items():
        rng, side = np.random.RandomState(7), k["input_size"] // k["model_patch_size"]
        for theirs in g[f"mask_{name}"]:
            ours = masks.aligned((side, side), k["mask_patch_size"] // k["model_patch_size"], k["mask_ratio"], rng)
            assert torch.equal(ours.byte(), theirs)


def test_block_wise_masks() -> None:
    info, g = golden("eva--mask")
    for name, k in info["kwargs"].items():
        for seed, theirs in enumerate(g[f"mask_{name}"]):
            given = k["num_masking_patches"], k["min_num_patches"], k["max_num_patches"]
            ours = masks.blocks(tuple(k["input_size"]), *given, rng=random.Random(seed))
            assert torch.equal(ours.byte(), theirs)


def test_rectangles() -> None:
    info, g = golden("gmml--mask")
    for name, k in info["kwargs"].items():
        for seed in (0, 1):
            ours = masks.rectangles((224, 224), k["max_replace"], k["align"], rng=np.random.RandomState(seed))
            theirs = np.unpackbits(g[f"mask_{name}_{seed}"].numpy()).reshape(224, 224)
            assert (ours.numpy() == theirs).all()


def test_masks_of_clips() -> None:
    _, g = golden("videomae-v2--mask")
    for seed in range(3):
        assert torch.equal(masks.tube(8, 196, 0.9, np.random.RandomState(seed)).byte(), g[f"tube_{seed}"])
    for start in range(4):
        assert torch.equal(masks.running_cell(8, (14, 14), 0.5, start).byte(), g["cell_all_50"][start])
        assert torch.equal(masks.running_cell(8, (8, 6), 0.75, start).byte(), g["cell_all_75"][start])
    rng = np.random.RandomState(0)
    assert torch.equal(torch.stack([masks.running_cell(8, (14, 14), rng=rng) for _ in range(4)]).byte(), g["cell_draws"])


def test_clusters() -> None:
    _, g = golden("ssast--mask")
    for seed in range(3):
        for count in (400, 100):
            assert torch.equal(masks.clusters((8, 64), count, rng=random.Random(seed)).int(), g[f"patch_{count}_{seed}"])


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5])
def test_facial_regions(seed: int) -> None:
    """Of theirs every count is held; which patches of a group are drawn is left to each generator."""
    info, g = golden("fsfm--mask_crfrp")
    torch.manual_seed(seed)
    ours, region = masks.facial_regions(g[f"parsing_{seed}"], 16, 0.75, random.Random(seed))
    theirs, whole = g[f"img_mask_{seed}"].bool(), g[f"region_mask_{seed}"].bool()
    assert masks.GROUPS[random.Random(seed).choice(range(6))] in (None, tuple(info["regions"][str(seed)]))
    assert (ours.sum(1) == theirs.sum(1)).all() and (region.sum(1) == whole.sum(1)).all()
    for i, parsing in enumerate(g[f"parsing_{seed}"]):
        if whole[i].sum() < 147:
            assert torch.equal(region[i], whole[i])
        assert (ours[i] & region[i]).sum() == region[i].sum()
        met = region[i].clone()
        for group in masks.facial_groups(parsing, 16):
            new = group & ~met
            met |= group
            assert abs(int((ours[i] & new).sum()) - int((theirs[i] & new).sum())) <= 6


def test_gradient_target() -> None:
    _, g = golden("uni4eye--gradient")
    image = g["image"].permute(2, 0, 1)[None].double()
    along, down = p.patches.sobel(image)
    assert torch.equal(along[0].permute(1, 2, 0), g["gx5"].double()) and torch.equal(down[0].permute(1, 2, 0), g["gy5"].double())
    assert torch.equal(p.patches.gradients(image)[0].permute(1, 2, 0), g["grad5"].double())


@torch.no_grad()
def test_simmim() -> None:
    info, g = golden("simmim--vit_base_224")
    shared = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1, use_rel_pos_bias=False)
    model = timm.create_model("beit_base_patch16_224", num_classes=0, global_pool="token", **shared).eval()
    objective = p.SimMIM()
    parts = p.load_reference(model, objective, official_state(info))
    x, mask = noise(0, info["x_shape"]), g["in_mask"].bool()
    near(objective.predict(model, parts, x, mask), g["out"])
    near(hidden_l1(x, objective.predict(model, parts, x, mask), mask), g["loss"], 1e-5)


@torch.no_grad()
def test_mae_thorax() -> None:
    info, g = golden("mae-thorax--small_dec512d2b_r90")
    model = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    objective = p.MAE(mask=0.9, normalise=False, depth=2)
    state = official_state(info) | {"pos_embed": sine_cosine(384, (14, 14)), "decoder_pos_embed": sine_cosine(512, (14, 14))}
    parts = p.load_reference(model, objective, state)
    assert sum(v.numel() for m in (model, parts) for v in m.parameters()) == info["params"]
    x, mask = noise(0, info["x_shape"]), objective.hidden(g["in_noise"])
    assert torch.equal(mask.float(), g["mask"])
    pixels = objective.predict(model, parts, x, g["in_noise"])
    near(pixels, g["out"])
    near(objective.loss(x, pixels, mask, (16, 16)), g["loss"], 1e-5)


def test_layer_decay() -> None:
    info, g = golden("mae-thorax--layer_decay")
    model = timm.create_model("vit_small_patch16_224", num_classes=14)
    made = AdamW(lr=1.0, weight_decay=0.05, layer_decay=0.55).make(model, torch.nn.Identity()).param_groups
    names = {id(v): k for k, v in model.named_parameters()}
    ours = {names[id(v)]: (group["lr_scale"], group["weight_decay"]) for group in made for v in group["params"]}
    for name, scale, decay in zip(info["names"], g["lr_scale"], g["weight_decay"], strict=True):
        assert ours[name] == pytest.approx((scale.item(), decay.item()))


@torch.no_grad()
def test_gmml() -> None:
    info, g = golden("gmml--tiny_r6-8-10-12")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    parts = p.load_reference(model, p.GMML(), official_state(info))
    clean = torch.cat([noise(seed, shape) for seed, shape in zip(info["x_seed"], info["x_shape"], strict=True)])
    mask = torch.from_numpy(np.unpackbits(torch.cat([g["mask0"], g["mask1"]]).numpy(), axis=-1)).bool()[:, None]
    pixels = p.GMML().predict(model, parts, clean.masked_fill(mask, 0.0))
    near(pixels, g["out"])
    near(p.gmml.changed_l1(clean, pixels, mask), g["loss"], 1e-5)


@torch.no_grad()
def test_eva() -> None:
    info, g = golden("eva--tiny_abs")
    k = {k: info["kwargs"][k] for k in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    model = timm.models.beit.Beit(patch_size=14, num_classes=0, global_pool="token", **k).eval()
    teacher = timm.create_model("vit_tiny_patch16_224", patch_size=14, embed_dim=96, depth=1, num_heads=3)
    objective = p.EVA(teacher)
    parts = p.load_reference(model, objective, official_state(info))
    x, mask = noise(0, info["x_shape"]), g["in_mask"].bool()
    ours = objective.predict(model, parts, x, mask)
    near(ours, g["out"])
    now = Now(model, parts=parts, teach=lambda *_: Seen(x, patches=noise(9, (2, 256, 96))))
    objective = p.EVA(teacher)
    object.__setattr__(objective, "draw", lambda *_: mask)
    near(objective(Seen(x), Batch(x, None, torch.arange(2)), now)["cosine"], g["loss"], 1e-4)


@torch.no_grad()
def test_semaim() -> None:
    info, g = golden("semaim--tiny_pixel")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    state = official_state(info) | {"pos_embed": sine_cosine(192, (14, 14))}
    parts = p.load_reference(model, p.SemAIM(), state)
    x, rank = noise(0, info["x_shape"]), g["in_permutation"]
    pixels = p.SemAIM().predict(model, parts, x, rank)
    near(pixels, g["out"])
    near((pixels[:, 1:] - p.SemAIM().target(model, x)).square().mean(), g["loss"], 1e-5)
    near(p.semaim.nearness(model.forward_features(x)), g["feature_attention"])


def test_order() -> None:
    _, g = golden("semaim--order")
    near(p.semaim.from_centre(g["in_attention"], (14, 14)), g["perm_attention_center"], 1e-6)
    r = np.random.default_rng(0)
    r.random((3, 196), np.float32)
    near(p.semaim.nearness(torch.from_numpy(r.standard_normal((2, 197, 32)))), g["att_cls"], 1e-9)
    assert torch.allclose(p.patches.blurred(noise(4, (1, 3, 32, 32))), g["blur"], atol=1e-5)


@torch.no_grad()
def test_ssast() -> None:
    info, g = golden("ssast--tiny_patch16")
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=(128, 1024), in_chans=1, num_classes=1000).eval()
    objective = p.SSAST(over="predictions")
    parts = p.load_reference(model, objective, official_state(info))
    x = info["x_factor"] * noise(0, info["x_shape"]).mT[:, None]
    near(model.forward_features(x), g["out"])
    nce, mse = objective.losses(model, parts, x, (g["in_index"], g["in_index"]))
    near(nce, g["nce"], 1e-5)
    near(mse, g["mse"], 1e-5)


@torch.no_grad()
def test_videomae_v2() -> None:
    info, g = golden("videomae-v2--small_d4")
    model, objective = p.VideoViT().eval(), p.VideoMAEv2()
    parts = p.load_reference(model, objective, official_state(info))
    assert sum(v.numel() for m in (model, parts) for v in m.parameters()) == info["params"]
    x, hidden, skipped = noise(0, info["x_shape"]), g["in_mask"].bool().flatten(1), g["in_decode_mask"].bool().flatten(1)
    near(objective.predict(model, parts, x, hidden, ~skipped), g["out"])
    near(objective.target(model, x)[~skipped][None], g["target"])
    near(objective.loss(model, parts, x, hidden, ~skipped), g["loss"], 1e-5)
    near(objective.loss(model, parts, x, hidden, hidden), g["loss_without_decoder_mask"], 1e-5)


def test_selfpatch_loss() -> None:
    info, g = golden("selfpatch--loss")
    objective = p.SelfPatch(local=2)
    centres = [torch.zeros(1, 1, 40).double(), torch.zeros(1, 24).double()]

    def views(who: str) -> list[list[torch.Tensor]]:
        made = [(g[f"{who}_{size}_cls"].chunk(2), g[f"{who}_{size}_patch"].chunk(2)) for size in ("global", "local")]
        return [[c, q] for cs, qs in made for c, q in zip(cs, qs, strict=True)]

    for row, epoch in enumerate((0, 1, 5)):
        leaves = [g[n].clone().requires_grad_() for n in ("student_global_cls", "student_local_patch")]
        student, teacher = views("student"), views("teacher")
        for i in (0, 1):
            student[i][0], student[2 + i][1] = leaves[0].chunk(2)[i], leaves[1].chunk(2)[i]
        cls, patch = objective.loss(student, teacher, centres, p.dino.warm(0.04, 0.07, epoch, 3))
        total = cls + info["kwargs"]["patch_weight"] * patch
        total.backward()
        near(torch.stack([total, cls, patch]).detach(), g["losses"][row], 1e-9)
        for leaf, name in zip(leaves, ("student_global_cls", "student_local_patch"), strict=True):
            near(leaf.grad.flatten(), g[f"grad_{name}_{epoch}"].flatten(), 1e-9)
        p.selfpatch.recentred(*centres, teacher)
        near(centres[0].flatten(), g[f"center_{epoch}"].flatten(), 1e-9)
        near(centres[1].flatten(), g[f"patch_center_{epoch}"].flatten(), 1e-9)


@torch.no_grad()
def test_selfpatch() -> None:
    info, g = golden("selfpatch--tiny_k4")
    size = dict(embed_dim=192, num_heads=3, num_classes=0, class_token=False, global_pool="", final_norm=False)
    model = timm.models.vision_transformer.VisionTransformer(**size).eval()
    objective = p.SelfPatch(prototypes=512, patch_prototypes=256, local=2)
    ones = {k: torch.ones(s) for k, s, kind in info["state"] if kind == "fixed"}
    centres = {"parts.center": torch.zeros(1, 1, 512), "parts.patch_center": torch.zeros(1, 256)}
    parts = p.load_reference(model, objective, official_state(info) | ones | centres).eval()
    x, y = noise(0, info["x_shape"]), noise(1, info["y_shape"])
    tokens = p.encode.patch_tokens(parts["backbone"], x, norm=False)
    near(tokens, g["tokens"])
    near(parts["teacher"].ca_head(tokens, (14, 14)), g["head_teacher"])
    near(parts["student"].ca_head(p.encode.patch_tokens(model, x, norm=False)), g["head_student"])
    views = [*x.chunk(2), *y.chunk(2)]
    student = [objective.outputs(model, parts["student"], v, None, False) for v in views]
    teacher = [objective.outputs(parts["backbone"], parts["teacher"], v, (v.shape[2] // 16,) * 2, False) for v in views]
    near(torch.cat([s[1] for s in student[:2]]), g["out"])
    cls, patches = objective.loss(student, teacher, (parts.center, parts.patch_center), 0.04)
    near(cls, g["loss_cls"], 1e-5)
    near(patches, g["loss_patch"], 1e-5)


def test_poa_networks() -> None:
    _, g = golden("poa--networks")
    assert p.elastic.networks(range(384, 1025, 64), range(12, 25)) == [tuple(n) for n in g["networks_a"].tolist()]
    assert p.elastic.networks(range(192, 449, 64), range(6, 13, 2), 2) == [tuple(n) for n in g["networks_b"].tolist()]
    for depth in range(12, 25):
        assert p.elastic.kept_blocks(depth, 24) == g[f"block_idx_{depth}"].tolist()


def test_poa_loss() -> None:
    info, g = golden("poa--loss")
    masks, k = g["masks"], info["kwargs"]
    weights = (1 / masks.sum(1).clamp_min(1)).double()[:, None].expand_as(masks)[masks] / len(masks)
    total = 0.0
    for i in (0, 1):
        assert torch.allclose(p.dino.sinkhorn(g[f"t_cls_{i}"], k["teacher_temp"]).view(2, 4, -1), g[f"q_cls_{i}"], atol=1e-12)
        assert torch.allclose(p.dino.sinkhorn(g[f"t_pat_{i}"], k["teacher_temp"]), g[f"q_pat_{i}"], atol=1e-12)
        told = [
            p.poa.Told(g[f"{n}_loc_{i}"].unflatten(0, (3, 4)), g[f"{n}_glo_{i}"].unflatten(0, (2, 4)), g[f"{n}_pat_{i}"])
            for n in ("intact", "elastic")
        ]
        found = p.poa.terms(told[0], told[1], g[f"q_cls_{i}"], g[f"q_pat_{i}"], weights, k["lambda_ie"])
        for ours, theirs in (("local", "dino_local"), ("global", "dino_global"), ("patches", "ibot")):
            near(found[ours], g[f"{theirs}_{i}"], 1e-7)
        for where in ("local", "global"):
            near(found[f"distil_{where}"] / (1 - k["lambda_ie"]), g[f"distill_{where}_{i}"], 1e-7)
        total = total + sum(found.values()) / 2
    crops = [c for n in ("intact", "elastic") for c in g[f"{n}_tok"].unflatten(0, (2, 4))]
    spread = k["koleo_weight"] * torch.stack([p.dino.koleo(c) for c in crops]).sum() / 2
    near(spread, g["koleo"], 1e-7)
    near(total + spread, g["total"], 1e-7)


@torch.no_grad()
def test_poa() -> None:
    info, g = golden("poa--vit_192-384_d6-12")
    model = timm.create_model("vit_small_patch16_224", img_size=112, init_values=1e-5, num_classes=0).eval()
    state = {re.sub(r"\.(?:linear|norm)\.(weight|bias)$", r".\1", k): v for k, v in official_state(info).items()}
    token = state.pop("backbone.mask_token")
    model.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
    heads = []
    for i, count in enumerate(info["kwargs"]["out_dims"]):
        named = {k.replace(f"head.mlp{i}.", "mlp.").replace(f"head.last_layer{i}.", "last_layer."): v for k, v in state.items()}
        heads.append(p.dino.DINOHead(384, count, 256, 64))
        named |= {"last_layer.weight_g": torch.ones(count, 1)}
        heads[i].load_state_dict({k: v for k, v in named.items() if k.startswith(("mlp.", "last_layer."))})
    x, mask = noise(0, info["x_shape"]), g["in_mask"].bool()
    for width, depth in info["kwargs"]["networks"]:
        tokens = p.POA().tokens(model, x, None if width == 384 else (width, depth), mask, token)
        near(tokens[:, 0], g[f"cls_{width}_{depth}"])
        near(tokens[:, 1:], g[f"patch_{width}_{depth}"])
        near(torch.cat([h(tokens[:, 0]) for h in heads], 1), g[f"head_{width}_{depth}"])
        small = p.extract(model, width, depth)
        near(small.forward_features(x), p.POA().tokens(model, x, (width, depth), None, token), 1e-5)


@torch.no_grad()
def test_fsfm() -> None:
    info, g = golden("fsfm--small")
    model = timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0).eval()
    objective = p.FSFM(normalise=False, positions=False)
    tables = {"pos_embed": sine_cosine(384, (14, 14)), "decoder_pos_embed": sine_cosine(512, (14, 14))}
    tables["rep_decoder_pos_embed"] = torch.zeros(1, 197, 384)
    state = official_state(info) | {k: tables[k.split(".")[1]] for k, _, kind in info["state"] if kind == "fixed"}
    parts = p.load_reference(model, objective, state).eval()
    assert sum(v.numel() for m in (model, parts) for v in m.parameters()) == info["params"]
    x, mask, region = noise(0, info["x_shape"]), g["in_mask"].bool(), g["in_region"].bool()
    found = objective.losses(model, parts, x, mask, region)
    near(found["pixels"], g["loss_rec_all"], 1e-5)
    near(found["region"], g["loss_rec_region"], 1e-5)
    near(found["identity"], g["loss_simsiam"], 1e-4)
    tokens, place = objective.seen_by(model, x, mask)
    near(parts["online"].pixels(tokens, place), g["out"])
    near(F.normalize(parts["online"].predictor(parts["online"].projected(tokens, place)), dim=1), g["online"])


@torch.no_grad()
def test_unified_embedding() -> None:
    info, g = golden("uni4eye--embed")
    embed = p.uni4eye.UnifiedEmbed(16, 16, (1, 1), 48)
    embed.load_state_dict(official_state(info))
    near(embed(noise(0, info["x_shape"])), g["out"])
    near(embed(noise(1, info["v_shape"])), g["out3"])


def test_tov_vicreg_loss() -> None:
    info, g = golden("tov-vicreg--loss")
    parts, state = p.tov_vicreg.Parts(48, 32).double(), official_state(info)
    parts.projector = torch.nn.Sequential(torch.nn.Linear(48, 32, bias=False)).double()
    parts.load_state_dict(state)
    found = p.TOVVICReg().losses(parts, *(g[k] for k in "xyzw"), g["labels"])
    for ours, theirs in (
        ("invariance", "invariance"),
        ("variance", "variance"),
        ("covariance", "covariance"),
        ("order", "temporal"),
    ):
        near(found[ours].detach(), g[f"{theirs}_loss"], 1e-6)
    total = sum(w * found[k] for k, w in (("invariance", 10), ("variance", 10), ("covariance", 10), ("order", 0.1)))
    total.backward()
    near(parts.projector[0].weight.grad.flatten(), g["grad_projector"].flatten(), 1e-6)
    near(parts.temporal_order_predictor[0].weight.grad.flatten(), g["grad_order"].flatten(), 1e-6)


@torch.no_grad()
def test_tov_vicreg() -> None:
    info, g = golden("tov-vicreg--vit_tiny_p8")
    model = timm.create_model("vit_tiny_patch16_224", patch_size=8, num_classes=0).eval()
    objective = p.TOVVICReg(frames="unused", hidden=256)
    parts = p.load_reference(model, objective, official_state(info))
    views = [torch.from_numpy(np.random.default_rng(i).random(info["x_shape"], np.float32)) for i in range(4)]
    told = [objective.represent(model, v) for v in views]
    near(told[0], g["repr"])
    found = objective.losses(parts.train(), *told, g["in_labels"])
    for ours, theirs in (
        ("invariance", "invariance"),
        ("variance", "variance"),
        ("covariance", "covariance"),
        ("order", "temporal"),
    ):
        near(found[ours], g[f"{theirs}_loss"], 1e-4)


@torch.no_grad()
def test_softcon() -> None:
    info, g = golden("softcon--vits14_ms13")
    rgb = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0, init_values=1e-5)
    model = p.with_channels(rgb, 13).eval()
    state = official_state(info)
    model.load_state_dict({k: v for k, v in state.items() if k != "mask_token"})
    tokens = model.forward_features(noise(0, info["x_shape"]))
    near(tokens[:, 0], g["out"])
    near(tokens[:, 1:], g["patch"])
