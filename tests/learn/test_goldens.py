"""Losses and optimisers hold the official implementations' outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import fill, official_state
from support import golden as of_a_model

import vitreous as vt
from vitreous.learn.align import alignment
from vitreous.learn.arbex import ReliabilityBalance, anchor_loss, centre_loss
from vitreous.learn.compressed import FrozenNorm, Gelu, Linear, Mix
from vitreous.learn.g2sd import generic
from vitreous.learn.long_tail import deit_lt, effective_weights, exponential_counts
from vitreous.learn.merging import Kitchen
from vitreous.learn.nkd import nkd, uskd
from vitreous.learn.ph_reg import denoised, farthest, losses, make_views
from vitreous.learn.pleas import joined, least_squares, match, similarity, split, together
from vitreous.learn.sam import ascend
from vitreous.learn.scalekd import CrossAttentionProjector, mimic, without_dc
from vitreous.learn.semantic_proxies import SmallGRU, accumulate, proxy_loss
from vitreous.learn.sgd_sai import SGDSaIOptimizer
from vitreous.learn.slimfit import active, change
from vitreous.models import load_official
from vitreous.models.masked_autoencoder import sine_cosine

FOLDER = Path(__file__).parents[1] / "goldens"


def golden(name: str):
    held = np.load(FOLDER / f"{name}.npz")
    arrays = {k: torch.from_numpy(np.atleast_1d(held[k]).reshape(held[k].shape)) for k in held if k != "info"}
    return json.loads(held["info"].tobytes()), arrays


def near(ours, theirs, tolerance):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-12)


def test_nkd():
    info, g = golden("nkd--nkd_t1_g15")
    student = g["student"].requires_grad_()
    loss = nkd(student, g["teacher"], g["label"], info["kwargs"]["gamma"], info["kwargs"]["temp"])
    loss.backward()
    near(loss.detach(), g["loss"], 1e-10)
    near(student.grad, g["grad_student"], 1e-9)


def test_uskd():
    info, g = golden("nkd--uskd_default")
    leaves = [g[k].requires_grad_() for k in ("student", "mid", "fc_weight", "fc_bias")]
    student, mid, w, b = leaves
    shares = F.one_hot(g["label"], student.shape[1]).double()
    loss = uskd(student, F.linear(mid, w, b), shares, *(info["kwargs"][k] for k in ("alpha", "beta", "mu")))
    loss.backward()
    near(loss.detach(), g["loss"], 1e-10)
    for leaf, name in zip(leaves, ("student", "mid", "fc_weight", "fc_bias"), strict=True):
        near(leaf.grad, g[f"grad_{name}"], 1e-9)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("lion--default_betas", lambda groups, k: vt.learn.Lion(betas=tuple(k["betas"]))._make(groups)),
        ("sgd-sai--default", lambda groups, k: SGDSaIOptimizer(groups, momentum=k["momentum"], eps=k["eps"])),
    ],
)
def test_optimisers(name, make):
    info, g = golden(name)
    keys = [k.removeprefix("p0_") for k in g if k.startswith("p0_")]
    params = {k: torch.nn.Parameter(g[f"p0_{k}"].clone()) for k in keys}
    opt = make([{"params": [p], "weight_decay": info["kwargs"]["weight_decay"]} for p in params.values()], info["kwargs"])
    for t, lr in enumerate(info["lrs"]):
        for group in opt.param_groups:
            group["lr"] = lr
        for k, p in params.items():
            p.grad = g[f"g_{k}"][t].clone()
        opt.step()
        for k, p in params.items():
            near(p.detach(), g[f"p_{k}"][t].view_as(p), 1e-12)


def test_sam():
    info, g = golden("sam-vit--sgd_rho005")
    k = info["kwargs"]
    p = {n: torch.nn.Parameter(g[f"p0_{n}"].clone()) for n in ("W1", "b1", "W2", "b2")}
    groups = [
        {"params": [p["W1"], p["W2"]], "weight_decay": k["weight_decay"]},
        {"params": [p["b1"], p["b2"]], "weight_decay": 0.0},
    ]
    opt = torch.optim.SGD(groups, lr=k["lr"], momentum=k["momentum"])

    def loss():
        return F.cross_entropy(F.linear(torch.tanh(F.linear(g["X"], p["W1"], p["b1"])), p["W2"], p["b2"]), g["y"])

    for t in range(10):
        opt.zero_grad()
        first = loss()
        first.backward()
        near(first.detach(), g["loss"][t], 1e-10)
        was = {n: x.detach().clone() for n, x in p.items()}
        restore = ascend(p.values(), k["rho"], k["adaptive"])
        opt.zero_grad()
        second = loss()
        second.backward()
        near(second.detach(), g["loss_perturbed"][t], 1e-10)
        restore()
        assert all(torch.equal(x, was[n]) for n, x in p.items())
        opt.step()
        for n, x in p.items():
            near(x.detach(), g[f"p_{n}"][t], 1e-10)


@pytest.mark.parametrize("name", ["opcm--paper_alpha05_4tasks", "opcm--zerodiag_alpha05_4tasks"])
def test_opcm(name):
    info, g = golden(name)
    k = info["kwargs"]
    names = [n.removeprefix("pre_") for n in g if n.startswith("pre_")]
    start = {n: g[f"pre_{n}"] for n in names}
    states = [{n: g[f"task{i}_{n}"] for n in names} for i in k["order"]]
    rule = vt.learn.OPCM(k["alpha"], zero_diagonal="zerodiag" in name, skip_roots=True)
    roots = frozenset(n for n in names if n.split(".")[0] not in k["leaf_modules"])
    kitchen = Kitchen(frozenset(f"{n}.weight" for n in k["linear"]), start, roots)
    merged = rule(states, kitchen)
    for n in names:
        near(merged[n], g[f"merged_{n}"], 1e-12)


def test_greedy_soup():
    _, g = golden("model-soups--linear8")
    states = [{"weight": w, "bias": b} for w, b in zip(g["weights"], g["biases"], strict=True)]
    tried = []

    def judge(state):
        right = (F.linear(g["X_val"], state["weight"], state["bias"]).argmax(1) == g["y_val"]).double().mean()
        tried.append(float(right))
        return float(right)

    soup = vt.learn.GreedySoup()(states, Kitchen(frozenset(), judge=judge))
    near(soup["weight"], g["greedy_weight"], 1e-12)
    near(soup["bias"], g["greedy_bias"], 1e-12)
    assert tried[8:] == g["trace"].tolist()
    alike = vt.learn.GreedySoup()(states, Kitchen(frozenset(), judge=lambda _: 0.5))
    near(alike["weight"], states[-1]["weight"], 0), "none that is only as good joins the last of the best"
    uniform = vt.learn.UniformSoup()(states, Kitchen(frozenset()))
    near(uniform["weight"], g["uniform_weight"], 1e-12)


def test_deit_lt():
    info, g = golden("deit-lt--c10_if100_drw")
    k = info["kwargs"]
    assert exponential_counts(5000, k["classes"], k["imb_factor"]) == g["counts"].tolist()
    weights = effective_weights(g["counts"], k["beta"])
    near(weights, g["weights"], 1e-10)
    cls, dist = g["cls"].requires_grad_(), g["dist"].requires_grad_()
    ours, taught = deit_lt(cls, dist, g["teacher"], g["label"], weights, k["alpha"])
    near(ours.detach(), g["loss_base"], 1e-10)
    near(taught.detach(), g["loss_dist"], 1e-10)
    (ours + taught).backward()
    near(cls.grad, g["grad_cls"], 1e-9)
    near(dist.grad, g["grad_dist"], 1e-9)


@pytest.mark.parametrize(("form", "name"), [("clip", "clip"), ("infonce", "contrastive"), ("byol", "byol")])
def test_gpt4image(form, name):
    info, g = golden("gpt4image--tau005")
    image = g["image"].requires_grad_()
    loss = alignment(image, g["text"], info["kwargs"]["tau"], form)
    loss.backward()
    near(loss.detach(), g[f"loss_{name}"], 1e-10)
    near(image.grad, g[f"grad_{name}"], 1e-9)


def test_g2sd_losses():
    info, g = golden("g2sd--losses")
    student, cls, dist = (g[k].requires_grad_() for k in ("student", "cls", "dist"))
    loss = generic(student, g["teacher"], info["kwargs"]["beta"])
    loss.backward()
    near(loss.detach(), g["loss_generic"], 1e-10)
    near(student.grad, g["grad_student"], 1e-9)
    ours, taught = deit_lt(cls, dist, g["teacher_logits"], g["label"])
    (ours + taught).backward()
    near((ours + taught).detach(), g["loss_specific"], 1e-10)
    near(cls.grad, g["grad_cls"], 1e-9)
    near(dist.grad, g["grad_dist"], 1e-9)


def test_g2sd_student():
    """The released student's own names, strictly; its parameters; what it predicts of the teacher's decoder."""
    info, expected, x = of_a_model("g2sd--student_small")
    # the released positions are computed by the constructor
    tables = {"pos_embed": sine_cosine(384, (14, 14)), "decoder_pos_embed": sine_cosine(256, (14, 14))}
    model = load_official(info["entry"], official_state(info) | tables)
    assert sum(p.numel() for p in model.parameters()) == info["params"]
    noise = torch.from_numpy(np.random.default_rng(7).random((2, 196), np.float32))
    with torch.no_grad():
        out = model.masked(x, noise)
    assert list(out.flatten(1).shape) == info["out_shape"]
    near(out.flatten(1)[:, : expected.shape[1]], torch.as_tensor(expected), 1e-4)


def test_scalekd():
    info, g = golden("scalekd--cap_query")
    k, student = info["kwargs"], g["student"].requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for i, (view, see) in enumerate((("spatial", lambda x: x), ("frequency", without_dc))):
        grid, heads = (k["hw"], k["hw"]), k["num_heads"]
        made = CrossAttentionProjector(
            k["student_dims"], k["teacher_dims"], grid, k["hw"] ** 2, heads, k["softmax_scale"][i]
        )  # fmt: skip
        start = f"projector_{i}."
        named = {n: tuple(shape) for n, shape in info["state"] if n.startswith(start) and not n.endswith("tracked")}
        state = {n.removeprefix(start): torch.from_numpy(fill(n, shape)) for n, shape in named.items()}
        counted = {"proj_student.1.num_batches_tracked": torch.tensor(0)}
        made.load_state_dict(state | counted)
        out = made.double().eval()(student)
        near(out.detach(), g[f"projected_{view}"], 1e-10)
        term = k["alpha"][i] * mimic(see(out.mT.unflatten(2, (k["hw"], k["hw"]))), see(g["teacher"]))
        near(term.detach(), g[f"loss_{view}"], 1e-10)
        loss = loss + term
    loss.backward()
    near(student.grad, g["grad_student"], 1e-9)


def test_arbex():
    """The released balancing, where the images of a batch attend to each other."""
    info, g = golden("arbex--balance_8c10a")
    k = info["kwargs"]
    balance = ReliabilityBalance(k["dim"], k["classes"], k["n_anchors"], 1, "batch", k["temperature"], k["delta"]).double()
    state = {n.removeprefix("attn__").replace("__", "."): v for n, v in g.items() if n.startswith("attn__")}
    balance.load_state_dict(state | {"anchors": g["anchors"], "trust": torch.tensor(k["trust"], dtype=torch.float64)})
    e, z = g["embeddings"].requires_grad_(), g["logits"].requires_grad_()
    found = balance(e, z)
    for name in ("prob", "confidence", "distances", "similarities", "attention", "correction"):
        near(getattr(found, name).detach(), g[name], 1e-10)
    near(found.final.detach(), g["corrected"], 1e-10)
    ce = F.nll_loss(found.final.log(), g["label"], g["class_weight"])
    apart, centre = anchor_loss(balance.anchors), centre_loss(found.distances, g["label"], found.confidence, k["dim"])
    for ours, name in ((ce, "ce"), (apart, "anchor"), (centre, "center")):
        near(ours.detach(), g[f"loss_{name}"], 1e-10)
    (ce + k["trust"] * (k["lambda_mu"] * apart + k["lambda_center"] * centre)).backward()
    for leaf, name in ((e, "embeddings"), (z, "logits"), (balance.anchors, "anchors")):
        near(leaf.grad, g[f"grad_{name}"], 1e-9)


def test_ph_reg():
    info, g = golden("ph-reg--views6_grid8")
    k = info["kwargs"]
    chosen = farthest(g["pool"], k["views"], int(g["chosen"][0]))
    assert torch.equal(chosen, g["chosen"])
    offsets, flips = g["pool"][chosen].int(), g["flips"].bool()
    offsets[0] = 0
    assert torch.equal(offsets, g["offsets"])
    white = torch.tensor([(1 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))], dtype=torch.float64)
    assert (make_views(g["image"], offsets, flips, (k["patch"],) * 2, white) - g["views"]).abs().max() < 1e-6
    near(denoised(g["features"], offsets, flips).flatten(0, 1), g["target"], 1e-10)
    student = g["student"].requires_grad_()
    cosine, error = losses(student, g["target"][None])
    (cosine + error).backward()
    near(cosine.detach(), g["loss_cosine"], 1e-8)  # theirs has a small number under its division
    near(error.detach(), g["loss_mse"], 1e-10)
    near(student.grad, g["grad_student"], 1e-7)


def test_semantic_proxies():
    info, g = golden("vpt-metric--anchor_gru_relu")
    k = info["kwargs"]
    cell = SmallGRU(8).double()
    with torch.no_grad():
        for name, p in cell.named_parameters():
            p.copy_(g[f"gru_{name}"])
    embeddings, free = g["embeddings"].requires_grad_(), g["bias"].requires_grad_()
    container = accumulate(cell, g["container"], g["semantic"], g["label"])
    near(container.detach(), g["container_after"], 1e-10)
    proxies = k["proxy_bias_ratio"] * free + (1 - k["proxy_bias_ratio"]) * container
    near(proxies.detach(), g["proxies_all"], 1e-10)
    loss = proxy_loss(embeddings, proxies, g["label"], k["alpha"], k["pos_delta"])
    loss.backward()
    near(loss.detach(), g["loss"], 1e-10)
    near(embeddings.grad, g["grad_embeddings"], 1e-9)
    near(free.grad, g["grad_bias"], 1e-9)
    for name, p in cell.named_parameters():
        near(p.grad, g[f"grad_gru_{name}"], 1e-9)


def test_slimfit_backward():
    _, g = golden("slimfit--backward_and_schedule")
    leaf = lambda name: g[name].clone().requires_grad_()
    x = leaf("x")
    y = Gelu.apply(x, False)
    near(y.detach(), g["gelu"], 1e-12)
    near(torch.autograd.grad(y, x, g["grad_out"])[0], g["gelu_grad"], 1e-9)
    bias = leaf("ln_bias")
    y = FrozenNorm.apply(x, g["ln_weight"], bias, 1e-6)
    near(y.detach(), g["ln_frozen"], 1e-5)
    grads = torch.autograd.grad(y, (x, bias), g["grad_out"])
    near(grads[0], g["ln_frozen_grad"], 1e-9)
    near(grads[1], g["ln_frozen_grad_bias"], 1e-9)
    scores, values = leaf("scores"), leaf("values")
    y = Mix.apply(scores, values, False)
    near(y.detach(), g["context"], 1e-12)
    for ours, name in zip(torch.autograd.grad(y, (scores, values), g["grad_context"]), ("scores", "values"), strict=True):
        near(ours, g[f"grad_{name}"], 1e-9)
    weight = leaf("lin_weight")
    y = Linear.apply(x, weight, g["lin_bias"], False)
    near(y.detach(), g["lin"], 1e-12)
    for ours, name in zip(torch.autograd.grad(y, (x, weight), g["grad_lin"]), ("x", "weight"), strict=True):
        near(ours, g[f"lin_grad_{name}"], 1e-9)


def test_slimfit_schedule():
    info, g = golden("slimfit--backward_and_schedule")
    sizes = [int(np.prod(shape)) for shape in info["kwargs"]["layers"]]
    weights, scores = list(g["sched_w0"].clone().split(sizes)), g["sched_scores"][0].clone()
    for t, deltas in enumerate(g["sched_delta"]):
        chosen = active(scores, info["kwargs"]["frozen"])
        assert chosen.tolist() == sorted(g["sched_active"][t].tolist())
        for i in chosen.tolist():
            moved = weights[i] + deltas.split(sizes)[i]
            scores[i] = change(weights[i], moved)
            weights[i] = moved
        near(scores, g["sched_scores"][t + 1], 1e-9)


@pytest.mark.parametrize("name", ["pleas--mlp_act_ratio0", "pleas--mlp_act_ratio05"])
def test_pleas(name):
    info, g = golden(name)
    acts, given = {}, {}
    for m in ("m1", "m2"):
        z1 = F.linear(g["X"], g[f"{m}_fc1.weight"], g[f"{m}_fc1.bias"])
        z2 = F.linear(z1.relu(), g[f"{m}_fc2.weight"], g[f"{m}_fc2.bias"])
        acts[m], given[m] = {"fc1": z1, "fc2": z2}, {"fc1": z1.relu(), "fc2": z2.relu()}
    splits = {}
    for layer in ("fc1", "fc2"):
        alike = sum(similarity(t["m1"][layer], t["m2"][layer]) for t in (acts, given))  # before and after the activation
        near(alike, g[f"cost_{layer}.weight:0"], 1e-9)
        units = match(alike)
        assert torch.equal(units, g[f"perm_{layer}.weight:0"])
        splits[layer] = split(alike, units, info["kwargs"]["ratio"])
        for part in ("merged1", "merged2", "own1", "own2"):
            assert torch.equal(getattr(splits[layer], part), g[f"block_{layer}.weight:0_{part}"])
    sides = {"fc1": ("fc1", None), "fc2": ("fc2", "fc1"), "fc3": (None, "fc2")}
    for layer, (out, into) in sides.items():
        out, into = splits.get(out), splits.get(into)
        weight = joined(g[f"m1_{layer}.weight"], g[f"m2_{layer}.weight"], out, into)
        bias = joined(g[f"m1_{layer}.bias"], g[f"m2_{layer}.bias"], out)
        theirs = g[f"merged_{layer}.weight"].clone()
        if layer == "fc3":  # which they add up without halving, and whose bias is the first model's
            theirs[:, len(into.merged1) :] /= 2
        near(weight, theirs, 1e-12)
        near(bias if layer != "fc3" else g["m1_fc3.bias"], g[f"merged_{layer}.bias"], 1e-12)
        x, z = g[f"ls_in_{layer}"], g[f"ls_out_{layer}"]
        if into is not None:
            near(together(given["m1"][sides[layer][1]], given["m2"][sides[layer][1]], into), x, 1e-9)
        fitted = least_squares(x, z, weight, bias)
        error = (F.linear(x, fitted["weight"], fitted["bias"]) - z).square().mean()
        assert abs(error - g[f"ls_loss_opt_{layer}"]) <= 1e-6 * g[f"ls_loss_opt_{layer}"] + 1e-12
