"""What each adapter has of its own; the contract of all steps is in tests/test_steps.py."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from learning import pictures, vit
from support import from_timm, golden, official_state, pooled, small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous.anatomy import read
from vitreous.blocks import plain_blocks, traced
from vitreous.learn.measure import accuracy_on
from vitreous.learn.objective import look

QUICK = dict(batch=16, augment=None)


def learning(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


# ---- VPT


@pytest.mark.parametrize("make", [small_vit, lambda: from_timm("vit_small_patch16_dinov3")], ids=["absolute", "rotary"])
def test_prompts_are_what_the_paper_computes(make, images: Tensor) -> None:
    """Prepended, run through the block with the others, dropped: every token's answer is the same."""
    model = vt.adapt.VPT(prompts=3).apply(make())
    blocks = plain_blocks(model, "test")
    prompts = blocks[1].prompts
    assert prompts is not None
    x = torch.randn(2, 17 if make is small_vit else 21, 48, generator=torch.Generator().manual_seed(0))
    given = {} if make is small_vit else {"rope": model.rope.get_embed((4, 4)) if hasattr(model.rope, "get_embed") else None}
    with torch.no_grad():
        ours = blocks[1](x, **given)
        blocks[1].prompts = None
        theirs = blocks[1](torch.cat([prompts.expand(2, -1, -1), x], 1), **given)[:, 3:]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_prompts_learn_and_the_backbone_does_not() -> None:
    model = vt.adapt.VPT(prompts=4, biases=True).apply(vit())
    assert learning(model) == {n for n, _ in model.named_parameters() if "prompts" in n or "bias" in n or n.startswith("head.")}
    taught = vt.train(model, pictures(), epochs=8, optimiser=vt.learn.AdamW(lr=2e-2), **QUICK)
    changed = {n for n, p in taught.state_dict().items() if not torch.equal(p, model.state_dict()[n])}
    assert changed == learning(model)
    x, y = pictures()
    with torch.no_grad():
        assert nn.functional.cross_entropy(taught(x), y) < nn.functional.cross_entropy(model(x), y) - 0.01


def test_prompts_go_on_beside_fused_and_merged_tokens(images: Tensor) -> None:
    for following in (vt.tokens.MCTF(r=2), vt.tokens.ToMe(r=2), vt.tokens.EViT(keep=0.5)):
        model = vt.slim(small_vit(), [vt.adapt.VPT(prompts=3), following])
        with traced(model) as trace, torch.no_grad():
            ours = model(images)
            for block in model.blocks:
                block.prompts.zero_()
            assert trace and not torch.allclose(ours, model(images))  # the prompts still say something


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ("RepQ(), VPT()", "adapt first"),
        ("VPT(), VPT()", "has its prompts already"),
        ("VPT(), Sparsifiner()", "would not see the prompts"),
        ("SemanticTokens(), VPT()", "would not see prompts"),
        ("EViT(), Registers()", "registers first"),
        ("HST(), ToMe(r=2)", "none may go or join"),
        ("VPT(), HST()", "alone"),
        ("VPT(), IViT()", "tokens that it learnt"),
        ("HST(), IViT()", "tokens that it learnt"),
        ("Registers(), IViT()", "tokens that it learnt"),
        ("Embed(), Embed()", "replaced already"),
    ],
)
def test_orders_that_make_no_sense(steps: str, match: str, images: Tensor) -> None:
    with pytest.raises(vt.VitreousError, match=match):
        vt.slim(small_vit(), vt.Recipe.parse(steps), images)


# ---- Embed, and finding


def test_retrieval_of_known_features() -> None:
    features = torch.tensor([[1.0, 0.0], [0.95, 0.1], [0.9, 0.4], [0.0, 1.0], [0.1, 1.0]])
    found = vt.learn.retrieval(features, torch.tensor([0, 0, 1, 1, 0]), (1, 2))
    # nearest: 0→1 (right, then 2), 1→0 (right, then 2), 2→1 (wrong, then 0), 3→4 (wrong, then 2), 4→3 (wrong, then 2)
    assert found["recall@1"] == pytest.approx(2 / 5) and found["recall@2"] == pytest.approx(3 / 5)
    # others of the class: R = 2, 2, 1, 1, 2; average precisions 1/2, 1/2, 0, 0, 0
    assert found["map@r"] == pytest.approx(1 / 5)
    with pytest.raises(vt.VitreousError, match="two pictures"):
        vt.learn.retrieval(features, torch.arange(5))


def test_features_of_unit_norm_are_found_by_what_was_learnt() -> None:
    x, y = pictures(96)
    model = vt.slim(vit(), [vt.adapt.VPT(prompts=4, biases=True), vt.adapt.Embed(dims=8)])
    with torch.no_grad():
        assert torch.allclose(model(x).norm(dim=1), torch.ones(96))
    unseen = lambda m: vt.learn.retrieval(m(x[64:]).detach(), y[64:])["map@r"]
    objective = vt.learn.SemanticProxies(classes=4)
    taught = vt.train(model, (x[:64], y[:64]), objective, vt.learn.AdamW(lr=1e-2), epochs=5, **QUICK)
    assert taught.state_dict().keys() == model.state_dict().keys()  # nothing of the proxies is left behind
    assert unseen(taught) > unseen(model) + 0.1
    assert accuracy_on(taught, (x, y)) == vt.learn.retrieval(taught(x), y)["recall@1"]  # not a share of classes
    for refused, match in (
        (lambda: vt.train(vit(), (x, y), objective, **QUICK), "adapt.Embed"),
        (lambda: vt.train(vt.adapt.Embed(8).apply(vit()), (x, y), objective, **QUICK), "adapt.VPT"),
        (lambda: vt.train(model, (x, y + 1), objective, **QUICK), "0 to 3"),
        (lambda: vt.train(model, (x, y), vt.learn.SemanticProxies(), **QUICK), "classes="),
    ):
        with pytest.raises(vt.VitreousError, match=match):
            refused()


# ---- Registers


@pytest.mark.parametrize("make", [small_vit, pooled, lambda: small_vit(global_pool="avg")], ids=["class", "patches", "both"])
def test_registers_join_once_and_are_read_by_nobody(make, images: Tensor) -> None:
    plain = make()
    model, first = vt.adapt.Registers(count=5).apply(plain), read(plain).prefix
    assert read(model).prefix == first + 5 and read(model).grid == read(plain).grid
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))

    def disturb(_, __, out: Tensor) -> Tensor:
        return torch.cat([out[:, :first], out[:, first : first + 5] + 100, out[:, first + 5 :]], 1)

    with torch.no_grad():
        before = model(images)
        assert seen == [first + 5 + 16] * 4
        model.blocks[-1].register_forward_hook(disturb)
        torch.testing.assert_close(model(images), before)


def test_what_registers_unfreeze() -> None:
    names = learning(vt.adapt.Registers().apply(small_vit()))
    last = {n for n, _ in vt.adapt.Registers().apply(small_vit()).named_parameters() if n.startswith("blocks.3.")}
    assert names == {"blocks.0.registers", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"} | last


def test_registers_and_glass_see_the_same_patches(images: Tensor) -> None:
    model = vt.adapt.Registers(count=4).apply(small_vit())
    assert vt.see.rollout(model, images).shape == (len(images), 4, 4)
    found = vt.see.artifacts(small_vit(), images).versus(vt.see.artifacts(model, images))
    assert len(found) == 4 and all(r["on_prefix_other"] > r["on_prefix"] for r in found)


# ---- HST


RENAMED = (
    (r"^m_patch_embed(\d)\.(.*)", lambda m: f"side.stages.{int(m[1]) - 1}.entry.{m[2]}"),
    (r"^m_block(\d)\.(\d)\.(.*)", lambda m: f"side.stages.{int(m[1]) - 1}.blocks.{m[2]}.{inner(m[3])}"),
    (r"^m_norm(\d)\.(.*)", lambda m: f"side.stages.{int(m[1]) - 1}.norm.{m[2]}"),
    (r"^T_Bridge_(\d)\.(.*)", lambda m: f"side.stages.{int(m[1]) - 1}.bridge.{m[2]}"),
    (r"^m_proj_norm(\d+)\.(.*)", lambda m: f"side.stages.{(int(m[1]) - 1) // 3}.meta_norms.{(int(m[1]) - 1) % 3}.{m[2]}"),
    (r"^m_embeddings\.(\d+)$", lambda m: f"blocks.{m[1]}.meta"),
    (r"^(fc_norm|head)\.(.*)", lambda m: f"side.{m[1]}.{m[2]}"),
)


def inner(name: str) -> str:
    return re.sub(r"^mlp\.fc(\d)", lambda m: f"mlp.{2 * (int(m[1]) - 1)}", name.replace("attn.", "read."))


def test_hst_is_the_official_one() -> None:
    info, out, x = golden("hst--vit_base_100")
    model = vt.adapt.HST().apply(timm.create_model("vit_base_patch16_224", num_classes=100))
    state = {}
    for name, tensor in official_state(info).items():
        for pattern, new in RENAMED:
            name, done = re.subn(pattern, new, name)
            if done:
                break
        state[name] = tensor
    model.load_state_dict(state)
    with torch.no_grad():
        ours = model.eval()(x)
    assert (ours - torch.from_numpy(out)).abs().max() <= 1e-4 * abs(out).max()
    assert sum(p.numel() for p in model.parameters()) == info["params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == info["trainable"]


def test_the_side_network_learns_beside_a_frozen_backbone(tmp_path) -> None:
    model = vt.adapt.HST().apply(vit(depth=5))
    taught = vt.train(model, pictures(), epochs=4, optimiser=vt.learn.AdamW(lr=1e-2), **QUICK)
    moved = {n for n, p in taught.named_parameters() if not torch.equal(p, model.state_dict()[n])}
    assert all(n.startswith("side.") or n.endswith("meta") or ".norm" in n for n in moved) and "side.head.weight" in moved
    assert accuracy_on(taught, pictures()) > 0.4
    vt.save(taught, tmp_path / "m.safetensors")
    again = vt.load(tmp_path / "m.safetensors", base=vit(depth=5))
    with torch.no_grad():
        assert torch.equal(again(pictures()[0]), taught(pictures()[0]))
        one, two = taught(pictures()[0][:3]), taught(pictures()[0][3:5])  # passes do not meet
        torch.testing.assert_close(torch.cat([one, two]), taught(pictures()[0][:5]), rtol=1e-4, atol=1e-5)


def test_models_that_adapters_refuse() -> None:
    for step, model, match in (
        (vt.adapt.HST(), vit(depth=3), "4 stages, and VisionTransformer has 3"),
        (vt.adapt.HST(), vit(classes=0, depth=4), "classes="),
        (vt.adapt.VPT(), timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, embed_dim=12), "plain"),
        (vt.adapt.Registers(), vit(dynamic_img_size=True), "dynamic_img_size=False"),
    ):
        with pytest.raises(vt.VitreousError, match=match):
            step.apply(model)
    for make in (lambda: vt.adapt.VPT(prompts=0), lambda: vt.adapt.Registers(count=-1), lambda: vt.adapt.Embed(dims=0)):
        with pytest.raises(vt.VitreousError, match="must lie in"):
            make()


def test_registers_learn_what_many_views_see() -> None:
    """Nearer to the mean over views on pictures that were not trained on, in one pass; the teacher's answer is where it was."""
    torch.manual_seed(0)
    base = small_vit(depth=2)
    x = nn.functional.interpolate(torch.randn(40, 3, 5, 5, generator=torch.Generator().manual_seed(4)), 32, mode="bilinear")
    objective = vt.learn.PHReg(base, views=4, shift=0.25)
    now = vt.learn.Now(base, teach=look)
    torch.manual_seed(1)
    target = vt.learn.PHReg(base, views=20, shift=0.25).targets(x[32:], now)
    apart = lambda m: float((look(m, x[32:], ("patches",)).patches - target).square().mean())
    student = vt.train(
        vt.adapt.Registers(count=4).apply(base), (x[:32], None), objective, vt.learn.AdamW(lr=1e-3), epochs=6, **QUICK
    )
    with torch.no_grad():
        assert apart(student) < 0.9 * apart(base)
    with pytest.raises(vt.VitreousError, match="needs a teacher"):
        vt.train(vt.adapt.Registers().apply(base), (x, None), vt.learn.PHReg(), epochs=1, **QUICK)
