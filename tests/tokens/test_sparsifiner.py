"""Sparsifiner: the connections, their training, the edges, and the company of other steps."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import small_vit
from torch import Tensor, nn

from vitreous import VitreousError, slim
from vitreous.learn.sparsifiner import connectivity_loss, predictor_parameters, sparsifiner_distillation
from vitreous.ship import Runtime, ship_all
from vitreous.steps import history_of
from vitreous.tokens import EViT
from vitreous.tokens.sparsifiner import ConnectivityPredictor, SparseAttention, Sparsifiner


def predictor(tokens: int = 48, prefix: int = 1, keep: int = 12, scale: float = 1.0) -> ConnectivityPredictor:
    torch.manual_seed(0)
    made = ConnectivityPredictor(tokens, 16, 3, prefix, keep)
    for p in made.parameters():
        nn.init.normal_(p, std=scale if p.ndim > 1 else 0.0)
    return made


def test_connections_are_the_predicted_best() -> None:
    p = predictor(tokens=72, scale=0.3)  # 12 basis vectors, of which 8 count
    q, k = torch.randn(2, 3, 72, 16), torch.randn(2, 3, 72, 16)
    with torch.no_grad():
        mask = p(q, k)
        coefficients = (p.down_q(q) / math.sqrt(3) @ (p.down_k(k).mT @ p.down)).softmax(-1)
        for row in ((0, 0, 5), (1, 2, 71)):
            c = coefficients[row].clone()
            c[c.argsort()[:4]] = 0
            basis = p.up.abs() * (p.up.abs() > 0.02)
            score = basis @ c - torch.arange(72) * 1e-6
            assert set(mask[row].nonzero()[:, 0].tolist()) == set(score.argsort(descending=True)[:12].tolist())
    assert mask.dtype == torch.bool and (mask[:, :, 1:].sum(-1) == 12).all() and p.heads == 3
    assert (mask[0] != mask[1]).any() and (mask[:, 0] != mask[:, 1]).any()  # by image, and by head
    assert mask[:, :, 0].all() and not mask[..., 0].all()  # the class token attends to all, and is a key like the others


@pytest.mark.parametrize("kwargs", [dict(), dict(class_token=False, global_pool="avg"), dict(reg_tokens=4)])
def test_attention_goes_nowhere_else(kwargs: dict[str, object], images: Tensor) -> None:
    vit = small_vit(depth=2, **kwargs)
    sparse = slim(vit, Sparsifiner(budget=0.5))
    attn = sparse.blocks[1].attn
    assert isinstance(attn, SparseAttention)
    tokens = attn.predictor.tokens
    h = torch.randn(2, tokens, 48)
    with torch.no_grad():
        y, q, k = attn(h, look=True)
        v = attn.qkv(h).unflatten(-1, (3, 3, 16))[:, :, 2].transpose(1, 2)
        scores = q @ k.mT / 4
        probs = scores.masked_fill(~attn.predictor(q, k), -math.inf).softmax(-1)
        assert ((probs > 0).sum(-1)[..., attn.predictor.prefix :] <= math.ceil(0.5 * tokens)).all()
        assert torch.allclose(y, attn.proj((probs @ v).transpose(1, 2).flatten(2)), atol=1e-5)
        assert (sparse(images) - vit(images)).abs().max() > 1e-3


def test_full_budget_is_the_identity(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        assert (slim(vit, Sparsifiner(budget=1.0))(images) - vit(images)).abs().max() < 1e-6
        assert slim(vit, Sparsifiner(budget=0.01))(images[:1]).isfinite().all()
        vit.set_input_size((32, 24))
        assert slim(vit, Sparsifiner(budget=0.3))(images[..., :24]).shape == (6, 7)


def test_predictor_is_seeded_and_restored(vit: nn.Module, images: Tensor) -> None:
    torch.manual_seed(1)
    first = slim(vit, Sparsifiner())
    torch.manual_seed(2)
    second = slim(vit, Sparsifiner())
    step, plan = history_of(first).done[0]
    rebuilt = copy.deepcopy(vit)
    step.build(rebuilt, plan)
    rebuilt.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(first(images), second(images))
        assert torch.equal(first(images), rebuilt.eval()(images))


def test_first_stage_teaches_the_predictor_alone(images: Tensor) -> None:
    vit = small_vit(depth=2)
    sparse = slim(vit, Sparsifiner())
    loss = connectivity_loss(sparse, images)
    loss.backward()
    own = {id(p) for p in predictor_parameters(sparse)}
    assert len(own) == 2 * 6
    for p in sparse.parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (id(p) in own)
    optimizer = torch.optim.Adam(predictor_parameters(sparse), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        connectivity_loss(sparse, images).backward()
        optimizer.step()
    after = connectivity_loss(sparse, images)
    assert after < 0.7 * loss
    assert all(m.watched is None for m in sparse.modules() if isinstance(m, SparseAttention))

    def held(model: nn.Module) -> float:
        """The share of full attention that the connections of the first block hold."""
        attn = model.blocks[0].attn
        seen: list[Tensor] = []
        hook = attn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with torch.no_grad():
            model(images)
            _, q, k = attn(seen[0], look=True)
            hook.remove()
            return float(((q @ k.mT / 4).softmax(-1) * attn.predictor(q, k))[:, :, 1:].sum(-1).mean())

    assert held(sparse) > held(slim(vit, Sparsifiner())) + 0.05
    with pytest.raises(VitreousError, match="Sparsifiner"):
        connectivity_loss(vit, images)


def test_first_stage_is_the_distance_at_the_queries_of_patches(images: Tensor) -> None:
    vit, each = small_vit(depth=2), []
    sparse, entering = slim(vit, Sparsifiner()), []
    for block in vit.blocks:
        block.attn.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
    with torch.no_grad():
        vit(images)
        for block, x in zip(sparse.blocks, entering, strict=True):
            _, q, k = block.attn(x, look=True)
            apart = block.attn.predictor.approximation(q, k) - (q @ k.mT / 4).softmax(-1)
            each.append(sum(float(apart[:, :, i].square().sum()) for i in range(1, 17)) / len(images))
        assert float(connectivity_loss(sparse, images)) == pytest.approx(sum(each) / 2, rel=1e-4)


def test_second_stage(images: Tensor) -> None:
    vit, labels = small_vit(depth=2), torch.arange(6)
    same = slim(vit, Sparsifiner(budget=1.0))
    assert torch.allclose(sparsifiner_distillation(same, vit, images, labels), F.cross_entropy(vit(images), labels), atol=1e-5)
    for steps in ([Sparsifiner()], [EViT(keep=0.5, at=(0,)), Sparsifiner()]):
        sparse = slim(vit, steps)
        loss = sparsifiner_distillation(sparse, vit, images, labels)
        p, q = vit(images).softmax(1), sparse(images).softmax(1)
        theirs, ours = vit.forward_features(images), sparse.forward_features(images)
        if theirs.shape != ours.shape:  # of what is left the class token alone has its like
            theirs, ours = theirs[:, :1], ours[:, :1]
        expected = (p * (p / q).log()).sum(1).mean() / 2 + (theirs - ours).square().mean() / 2
        torch.testing.assert_close(loss, F.cross_entropy(sparse(images), labels) + expected)
        assert expected > 1e-4
        loss.backward()
        own = {id(p) for p in predictor_parameters(sparse)}
        assert not [n for n, p in sparse.named_parameters() if id(p) not in own and p.grad is None]


def test_with_token_sparsity(vit: nn.Module, images: Tensor) -> None:
    both = slim(vit, [EViT(keep=0.5), Sparsifiner(budget=0.5)])
    assert [m.predictor.tokens for m in both.modules() if isinstance(m, SparseAttention)] == [17, 17, 10, 7]
    with torch.no_grad():
        assert both(images).shape == (6, 7)
        only = slim(vit, [EViT(keep=0.5), Sparsifiner(budget=1.0)])
        assert (only(images) - slim(vit, EViT(keep=0.5))(images)).abs().max() < 1e-6
        assert both.bfloat16()(images.bfloat16()).isfinite().all()
    with pytest.raises(VitreousError, match="shorten the sequence before"):
        slim(vit, [Sparsifiner(), EViT(keep=0.5)])


def test_refusals(vit: nn.Module) -> None:
    for budget in (0.0, 1.5):
        with pytest.raises(VitreousError, match="budget"):
            Sparsifiner(budget=budget)
    with pytest.raises(VitreousError, match="know each token by its place"):
        slim(vit, [Sparsifiner(), Sparsifiner()])


def test_exports(images: Tensor, tmp_path: Path) -> None:
    sparse = slim(small_vit(depth=2), [EViT(keep=0.7, at=(0,)), Sparsifiner(budget=0.3)])
    for shipment in ship_all(sparse, [tmp_path / "m.onnx", tmp_path / "m.xml"]):
        runtime = Runtime(shipment.path)
        for n in (1, 6):
            with torch.no_grad():
                assert (runtime(images[:n]) - sparse(images[:n])).abs().max() < 1e-3
