"""Token slimming and semantic tokens on plain models, and feature recalibration distillation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from support import fill, golden, small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous import VitreousError, slim
from vitreous.blocks import traced
from vitreous.learn.frd import frd, reverse_modules
from vitreous.models import sit
from vitreous.prove.cost import macs
from vitreous.ship import ship_all
from vitreous.steps import Step
from vitreous.tokens.semantic import SemanticTokens, arrange, deal
from vitreous.tokens.slimming import TokenSlimming

STEPS = [TokenSlimming(keep=0.5, at=(0, 1)), SemanticTokens(tokens=4, at=1)]


def official_state(info: dict[str, Any]) -> dict[str, Tensor]:
    """The golden's weights under the official names; what constructors compute is zero."""
    return {
        name: torch.zeros(shape, dtype=torch.long) if kind == "fixed" else torch.from_numpy(np.asarray(fill(name, tuple(shape))))
        for name, shape, kind in info["state"]
    }


def leaving(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What leaves each block."""
    seen: list[Tensor] = []
    blocks: Any = model.get_submodule("blocks")
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in blocks]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def part(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


class TestTokenSlimming:
    def test_is_the_published_model_on_its_teacher(self) -> None:
        """SiT-T is this step on LV-ViT-T: the golden's weights, loaded into the slimmed teacher, give the golden's output."""
        info, expected, x = golden("sit--tiny")
        state = sit.convert(official_state(info), sit.SIZES["tiny"]["stage_blocks"])
        model = slim(timm.create_model("lvvit_tiny"), TokenSlimming(keep=0.5, at=(0, 1, 2)))
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("rtsm")})
        with torch.no_grad():
            out = model(x)[:, : expected.shape[1]].numpy()
        assert abs(out - expected).max() <= 1e-4 * abs(expected).max()

    def test_tokens_are_softmax_means_of_the_patches(self, vit: nn.Module, images: Tensor) -> None:
        small = slim(vit, TokenSlimming(keep=0.25, at=(1,)))
        module = part(small, "blocks.1").reducers[0]
        for p in module.parameters():
            nn.init.normal_(p)
        before = leaving(vit, images)[1]
        after = leaving(small, images)[1]
        layers = module.weight
        score = F.linear(F.gelu(F.linear(layers[0](before[:, 1:]), layers[1].weight, layers[1].bias)), layers[3].weight)
        shares = ((score + layers[3].bias) * module.scale).exp()
        shares = shares / shares.sum(1, keepdim=True)
        assert after.shape == (6, 1 + 4, 48)
        torch.testing.assert_close(after[:, 0], before[:, 0])
        torch.testing.assert_close(after[:, 1:], torch.einsum("bnk,bnc->bkc", shares, before[:, 1:]), atol=1e-4, rtol=1e-4)
        with torch.no_grad(), traced(small) as trace:
            small(images)
        torch.testing.assert_close(trace[0].matrix()[:, 1:, 1:], shares.mT, atol=1e-4, rtol=1e-4)
        assert torch.equal(trace[0].into[:, 1:], shares.argmax(-1) + 1)

    def test_default_is_sit_s(self) -> None:
        small = slim(small_vit(depth=16), TokenSlimming())
        assert [t.shape[1] - 1 for t in leaving(small, torch.zeros(1, 3, 32, 32))] == [16] * 8 + [8] * 3 + [4] * 2 + [2] * 3

    def test_keep_one_is_the_identity(self, vit: nn.Module, images: Tensor) -> None:
        with torch.no_grad():
            torch.testing.assert_close(slim(vit, TokenSlimming(keep=1.0))(images), vit(images), atol=1e-5, rtol=1e-5)

    def test_one_token_stays(self, vit: nn.Module, images: Tensor) -> None:
        assert [t.shape[1] for t in leaving(slim(vit, TokenSlimming(keep=0.01, at=(0, 1))), images)] == [2] * 4

    def test_rollout_goes_through_the_shares(self, vit: nn.Module, images: Tensor) -> None:
        small = slim(vit, TokenSlimming(keep=0.5, at=(1,)))
        nn.init.normal_(part(small, "blocks.1.reducers.0.weight.3").weight, std=2.0)
        heat = vt.see.rollout(small, images)
        assert heat.shape == (6, 4, 4) and torch.isfinite(heat).all()
        assert (heat - vt.see.rollout(vit, images)).abs().max() > 1e-3

    def test_refusals(self, vit: nn.Module) -> None:
        with pytest.raises(VitreousError, match="there is no block 4"):
            slim(vit, TokenSlimming(at=(4,)))
        with pytest.raises(VitreousError, match="keep must lie"):
            TokenSlimming(keep=0.0)
        with pytest.raises(VitreousError, match="block 0 already shortens"):
            slim(slim(vit, vt.tokens.EViT(at=(0,))), TokenSlimming(at=(1,)))
        slim(slim(vit, TokenSlimming(at=(1,))), vt.tokens.EViT(at=(2,)))


class TestSemanticTokens:
    def test_two_blocks_make_the_tokens(self, vit: nn.Module, images: Tensor) -> None:
        """Both blocks again, by hand: masked softmax pooling, then attention of few queries over all patches, twice."""
        small = slim(vit, SemanticTokens(tokens=4, at=1))
        for name in ("blocks.1.reducers.0", "blocks.2.reducers.0"):
            for p in part(small, name).parameters():
                nn.init.normal_(p, std=0.5)
        entering = leaving(vit, images)[0]
        cls, x = entering[:, :1], entering[:, 1:]

        score = part(small, "blocks.1.reducers.0.score")(x.mT.unflatten(-1, (4, 4)))
        windows = score.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 3, 5, 1).reshape(6, 4, 4).softmax(-1)
        cells = x.unflatten(1, (2, 2, 2, 2)).permute(0, 1, 3, 2, 4, 5).reshape(6, 4, 4, 48)
        tokens = torch.cat([cls, torch.einsum("bwn,bwnc->bwc", windows, cells)], 1)

        def run(i: int, query: Tensor, tokens: Tensor) -> Tensor:
            block = part(vit, f"blocks.{i}")
            q, _, _ = block.attn.qkv(block.norm1(query)).chunk(3, -1)
            _, k, v = block.attn.qkv(block.norm1(torch.cat([tokens, x], 1))).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (3, 16)).transpose(1, 2) for t in (q, k, v))
            mixed = (q @ k.mT / 4).softmax(-1) @ v
            query = query + block.attn.proj(mixed.transpose(1, 2).flatten(2))
            return query + block.mlp(block.norm2(query))

        with torch.no_grad():
            tokens = run(1, tokens, tokens)
            centers = F.pad(part(small, "blocks.2.reducers.0").weight, (0, 0, 1, 0))
            tokens = run(2, tokens + centers, tokens)
        left = leaving(small, images)
        assert [t.shape[1] for t in left] == [17, 5 + 16, 5, 5]
        torch.testing.assert_close(left[2], tokens, atol=1e-4, rtol=1e-4)

    def test_costs_what_was_published(self) -> None:
        model = timm.create_model("deit_small_patch16_224")
        x = torch.zeros(1, 3, 224, 224)
        ratio = macs(slim(model, SemanticTokens()), x) / macs(model, x)
        assert 0.40 < ratio < 0.45  # "nearly 60 % FLOPs reduction"

    def test_traces_windows(self, vit: nn.Module, images: Tensor) -> None:
        small = slim(vit, SemanticTokens(tokens=4, at=0))
        with torch.no_grad(), traced(small) as trace:
            small(images)
        assert trace[0].tokens == 5
        assert trace[0].into[0].tolist() == [0, 1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4]
        torch.testing.assert_close(trace[0].matrix().sum(-1), torch.ones(6, 5))
        ((layer, places),) = vt.see.survival(small, images)
        assert layer == "blocks.0" and len({int(p) for p in places[0].flatten()}) == 4

    def test_windows(self) -> None:
        assert deal(14, 4) == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 3
        assert set(deal(5, 4)) == {0, 1, 2, 3}
        assert arrange(16, (14, 14)) == (4, 4) and arrange(6, (4, 6)) == (2, 3) and arrange(2, (8, 4)) == (2, 1)

    def test_rollout_says_why_not(self, vit: nn.Module, images: Tensor) -> None:
        with pytest.raises(VitreousError, match="rollout"):
            vt.see.rollout(slim(vit, SemanticTokens(tokens=4)), images)

    def test_refusals(self, vit: nn.Module, images: Tensor) -> None:
        with pytest.raises(VitreousError, match="needs two blocks"):
            slim(vit, SemanticTokens(tokens=4, at=3))
        with pytest.raises(VitreousError, match="17 windows do not fit"):
            slim(vit, SemanticTokens(tokens=17))
        with pytest.raises(VitreousError, match="1 or more"):
            SemanticTokens(tokens=0)
        with pytest.raises(VitreousError, match="already shortens"):
            slim(slim(vit, vt.tokens.ToMe()), SemanticTokens(tokens=4))
        with pytest.raises(VitreousError, match="no patches to choose from"):
            slim(slim(vit, SemanticTokens(tokens=4)), vt.tokens.ToMe())


@pytest.mark.parametrize("step", STEPS, ids=str)
class TestBoth:
    def test_every_learned_part_learns(self, step: Step, images: Tensor) -> None:
        small = slim(small_vit(depth=4), step).train()
        small(images).square().sum().backward()
        # A softmax ignores what is added to all its inputs: the last bias of a slimming module has no slope by construction.
        for name, p in small.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all(), name
            assert name.endswith("weight.3.bias") or p.grad.abs().max() > 0, name

    @pytest.mark.parametrize(
        ("name", "prefix"),
        [
            ("vit_tiny_patch16_224", 1),
            ("deit_tiny_distilled_patch16_224", 2),
            ("vit_small_patch14_reg4_dinov2", 5),
            ("vit_base_patch16_siglip_224", 0),
        ],
    )
    def test_prefix_tokens_and_grids(self, step: Step, name: str, prefix: int) -> None:
        patch = 14 if "dinov2" in name else 16
        model = timm.create_model(name, img_size=(4 * patch, 6 * patch), embed_dim=48, depth=4, num_heads=3, num_classes=5)
        small = slim(model, step)
        with torch.no_grad(), traced(small) as trace:
            assert torch.isfinite(small(torch.randn(1, 3, 4 * patch, 6 * patch))).all()
        assert trace
        for reduction in trace:
            assert torch.equal(reduction.into[0, :prefix], torch.arange(prefix))
            torch.testing.assert_close(reduction.matrix().sum(-1), torch.ones(1, reduction.tokens))

    def test_exports(self, step: Step, images: Tensor, tmp_path: Path) -> None:
        small = slim(small_vit(depth=3), step)
        for made in ship_all(small, [tmp_path / "m.onnx", tmp_path / "m.xml"], example=images, tolerance=1e-3):
            assert made.parity.agreement == 1

    def test_low_precision_and_compile(self, step: Step, images: Tensor) -> None:
        small = slim(small_vit(depth=3), step)
        with torch.no_grad():
            for dtype in (torch.bfloat16, torch.float16):
                assert torch.isfinite(copy.deepcopy(small).to(dtype)(images.to(dtype))).all()
            torch.testing.assert_close(torch.compile(small, backend="aot_eager")(images), small(images), atol=1e-4, rtol=1e-4)

    def test_quantizes(self, step: Step, vit: nn.Module, images: Tensor) -> None:
        small = slim(vit, [step, vt.quant.RepQ()], images)
        with torch.no_grad():
            exact, ours = slim(vit, step)(images), small(images)
        assert F.cosine_similarity(exact, ours).min() > 0.95

    def test_saves_and_loads(self, step: Step, vit: nn.Module, images: Tensor, tmp_path: Path) -> None:
        small = slim(vit, step)
        with torch.no_grad():
            for p in small.parameters():
                p += 0.01
            vt.save(small, tmp_path / "m.safetensors")
            assert torch.equal(vt.load(tmp_path / "m.safetensors", base=vit)(images), small(images))


class TestDistillation:
    def test_loss_is_the_published_one(self, vit: nn.Module, images: Tensor) -> None:
        student = slim(vit, TokenSlimming(keep=0.5, at=(1,)))
        reverse = reverse_modules(student)
        assert [isinstance(r, nn.Identity) for r in reverse] == [True, False, False, False]
        with torch.no_grad():
            out, loss = frd(student, vit, images, reverse, tokens=3.0, logits=0.5, tau=2.0)
            theirs, ours = leaving(vit, images), leaving(student, images)
            error = sum(((r(a[:, 1:]) - b[:, 1:]) ** 2).mean() for r, a, b in zip(reverse, ours, theirs, strict=True)) / 4
            p, q = (vit(images) / 2).softmax(1), (student(images) / 2).softmax(1)
            divergence = (p * (p / q).log()).sum(1).mean() * 4
        torch.testing.assert_close(out, student(images))
        torch.testing.assert_close(loss, 3 * error + 0.5 * divergence, atol=1e-4, rtol=1e-4)

    def test_it_teaches(self, images: Tensor) -> None:
        """A few steps on the loss alone bring the student's answers nearer to the teacher's."""
        teacher = small_vit(depth=3)
        student = slim(teacher, TokenSlimming(keep=0.5, at=(0,))).train()
        reverse = reverse_modules(student)
        optimizer = torch.optim.AdamW([*student.parameters(), *reverse.parameters()], lr=5e-3)

        def apart() -> float:
            with torch.no_grad():
                return float(F.kl_div(student(images).log_softmax(1), teacher(images).softmax(1), reduction="batchmean"))

        before, losses = apart(), []
        for _ in range(30):
            _, loss = frd(student, teacher, images, reverse)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < 0.85 * losses[0] and apart() < 0.5 * before
        assert all(p.grad is None for p in teacher.parameters())
        assert all(p.grad is not None for p in reverse.parameters())

    def test_uses_the_models_own_reverse_modules(self) -> None:
        small: dict[str, Any] = dict(img_size=64, embed_dim=48, depth=3, num_heads=3, stage_blocks=(1, 2), num_classes=5)
        student, teacher = sit.SiT(**small), sit.SiT(**small, distillation_type=None).eval()
        reverse = reverse_modules(student)
        assert reverse is student.rtsm
        _, loss = frd(student, teacher, torch.randn(2, 3, 64, 64), reverse)
        loss.backward()
        unused = {n for n, p in student.named_parameters() if p.grad is None}
        assert unused == {"aux_head.weight", "aux_head.bias"}

    def test_refusals(self, vit: nn.Module, images: Tensor) -> None:
        with pytest.raises(VitreousError, match="has no token slimming module"):
            reverse_modules(vit)
        student = slim(vit, TokenSlimming(keep=0.5, at=(1,)))
        with pytest.raises(VitreousError, match="4 blocks and 4 reverse modules, the teacher 3"):
            frd(student, small_vit(depth=3), images, reverse_modules(student))
        with pytest.raises(VitreousError, match="the teacher must be the model"):
            frd(student, student, images, reverse_modules(student))
