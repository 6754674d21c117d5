"""SSMPruning: what the released code chooses, memories that fade on, and what is saved."""

from __future__ import annotations

import copy
import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from small_models import SMALL
from support import GOLDENS, small_vit
from torch import Tensor, nn

from vitreous import VitreousError, slim
from vitreous.macs import CountMacs
from vitreous.mixers import state_space_dual
from vitreous.mixers.mamba import CausalMixer
from vitreous.tokens import SSMPruning
from vitreous.tokens.ssm_pruning import PruningBlock, fading, importance, select_around_class

SMALLEST = SMALL["patch-scaling adventurer"]


def test_official_choice() -> None:
    with np.load(GOLDENS / "ssm-token-pruning--select_08.npz") as z:
        keep = json.loads(bytes(z["info"]))["kwargs"]["keep"]
        given = {k: torch.from_numpy(z[k]) for k in z.files if k != "info"}
    score = importance(given["out_b"].mT, "signed")
    torch.testing.assert_close(score * given["out_b"].shape[1], given["score"])  # a mean here, there a sum
    kept = select_around_class(score, keep)
    assert torch.equal(kept, given["kept"])
    half, middle = kept.shape[1] // 2, score.shape[1] // 2
    around = torch.cat([kept[:, :half], torch.full_like(kept[:, :1], middle), kept[:, half:]], 1)[..., None]
    for name in ("hidden", "residual"):
        assert torch.equal(given[name].gather(1, around.expand(-1, -1, given[name].shape[2])), given[f"{name}_kept"])


@pytest.mark.parametrize("chunk", [3, 64])
def test_a_state_fades_through_what_is_gone(chunk: int) -> None:
    """The same as the whole sequence whose dropped tokens put nothing in."""
    g = torch.Generator().manual_seed(0)
    x, delta = torch.randn(2, 11, 3, 4, generator=g), torch.rand(2, 11, 3, generator=g)
    B, C, A, D = (
        torch.randn(2, 11, 5, generator=g),
        torch.randn(2, 11, 5, generator=g),
        -torch.rand(3, generator=g),
        torch.ones(3),
    )
    stay = torch.tensor([0, 3, 4, 8, 10])
    there = torch.zeros(11).index_fill(0, stay, 1)
    whole = state_space_dual(x * there[:, None, None], delta, A, B, C, D)[:, stay]
    sums = (delta.cumsum(1) - delta)[:, stay]  # before each token that stays
    passed = torch.diff(sums, dim=1, prepend=torch.zeros(2, 1, 3)) - torch.cat([torch.zeros(2, 1, 3), delta[:, stay[:-1]]], 1)
    left = x[:, stay], delta[:, stay], A, B[:, stay], C[:, stay], D
    torch.testing.assert_close(state_space_dual(*left, chunk=chunk, passed=passed), whole)
    assert (state_space_dual(*left, chunk=chunk) - whole).abs().max() > 0.1


@pytest.mark.parametrize("flip", [False, True])
def test_each_token_counts_the_gap_before_it_as_it_is_read(flip: bool) -> None:
    torch.manual_seed(0)
    mixer = CausalMixer(64, flip)
    place, gone_place = torch.tensor([[0, 3, 4, 6]]), torch.tensor([[1, 2, 5, 7, 8]])
    gone = torch.randn(1, 5, 64)
    d = mixer.delta(gone)[0]
    none = torch.zeros_like(d[0])
    gaps = [none, d[0] + d[1], none, d[2], d[3] + d[4]]  # before 0, 3, 4, 6 and behind all
    wanted = [*gaps[1:], gaps[0]] if flip else gaps
    torch.testing.assert_close(fading(mixer, place, gone, gone_place)[0], torch.stack(wanted))
    torch.testing.assert_close(mixer.in_proj(gone)[..., -2:].add(mixer.dt_bias).exp().log1p(), mixer.delta(gone))


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    for block in cast(Any, model).blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[1]))
    with torch.no_grad():
        model(x)
    return seen


def test_what_says_most_stays_where_it_stood() -> None:
    model, x = SMALLEST.make(), SMALLEST.images()
    small = slim(model, SSMPruning(keep=0.25, at=(0, 1)))
    scans: list[Tensor] = []
    mixer = cast(Any, model).blocks[0].attn
    with torch.no_grad():
        tokens = cast(Any, model).patch_embed(x) + cast(Any, model).pos_embed
        first = torch.cat([tokens, (cast(Any, model).cls_token + cast(Any, model).cls_pos_embed).expand(2, -1, -1)], 1)
        scans.append(mixer.read(cast(Any, model).blocks[0].norm1(first))[1][:, :-1])
    wanted = scans[0].clamp(min=0).sum(-1).topk(16, 1).indices.sort(1).values
    places = outputs(small, x)
    assert torch.equal(places[0], wanted) and places[1].shape == (2, 4)
    assert all(set(after.tolist()) < set(before.tolist()) for before, after in zip(places[0], places[1], strict=True))
    changed = slim(model, SSMPruning(keep=0.25, at=(0, 1), align=False))
    with torch.no_grad():
        assert not torch.allclose(changed(x), small(x), atol=1e-5)


def test_random_places_are_the_same_for_all_images_and_other_with_another_seed() -> None:
    model, x = SMALLEST.make(), SMALLEST.images()
    first, second = (outputs(slim(model, SSMPruning(0.5, (0,), score="random", seed=s)), x)[0] for s in (0, 1))
    assert torch.equal(first[0], first[1]) and not torch.equal(first, second)


def test_keeping_all_is_the_identity() -> None:
    model, x = SMALLEST.make(), SMALLEST.images()
    with torch.no_grad():
        torch.testing.assert_close(slim(model, SSMPruning(keep=1.0))(x), model(x))


def test_edges() -> None:
    """One patch left, one image among others, and half precision."""
    model, x = SMALLEST.make(img_size=32, depth=2), SMALLEST.images(4, side=32)
    assert outputs(slim(model, SSMPruning(keep=0.01, at=(0,))), x)[0].shape == (4, 1)
    small = slim(model, SSMPruning(keep=0.5, at=(0,)))
    with torch.no_grad():
        together, half = small(x), copy.deepcopy(small).bfloat16()(x.bfloat16()).float()
        torch.testing.assert_close(torch.cat([small(one) for one in x.split(1)]), together)
    assert ((half - together).norm(dim=1) / together.norm(dim=1)).median() < 0.05


def test_it_trains_with_recomputation() -> None:
    model = slim(SMALLEST.make(), SSMPruning(keep=0.5, at=(0, 1))).train()
    assert cast(Any, model).grad_checkpointing
    model(SMALLEST.images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_graph_that_runs_is_smaller() -> None:
    """`tests/test_steps.py` exports it."""
    model, x = SMALLEST.make(), SMALLEST.images(4)
    small = slim(model, SSMPruning(keep=0.5, at=(0, 1)))
    counts = []
    for m in (model, small):
        with torch.no_grad(), CountMacs() as counter:
            m(x)
        counts.append(counter.total)
    assert counts[1] < 0.75 * counts[0]


def test_what_it_refuses() -> None:
    with pytest.raises(VitreousError, match="read tokens in a row"):
        slim(small_vit(), SSMPruning())
    with pytest.raises(VitreousError, match="already drops"):
        slim(SMALLEST.make(), [SSMPruning(), SSMPruning()])
    with pytest.raises(VitreousError, match="there is no block 9"):
        slim(SMALLEST.make(), SSMPruning(at=(9,)))
    with pytest.raises(VitreousError, match="score must be one of"):
        SSMPruning(score="norm")
    with pytest.raises(VitreousError, match="keep must lie"):
        SSMPruning(keep=0.0)
    assert all(isinstance(b, PruningBlock) for b in cast(Any, slim(SMALLEST.make(), SSMPruning())).blocks)
