"""Patch scaling: more tokens, the same blocks, no N × N scores kept."""

from __future__ import annotations

import timm
import torch
from small_models import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from vitreous.models.patch_scaling import PatchScalingViT


def test_patches_of_one_pixel_make_50176_tokens() -> None:
    with torch.device("meta"):
        models = {p: timm.create_model(f"patch_scaling_small_patch{p}_224") for p in (16, 1)}
    assert models[1].patch_embed.num_patches == 50_176
    blocks = [sum(p.numel() for p in m.blocks.parameters()) for m in models.values()]
    assert blocks[0] == blocks[1]
    assert models[1].grad_checkpointing and not models[16].grad_checkpointing


class Largest(TorchDispatchMode):
    """The most numbers that one tensor had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.most = max(self.most, t.numel())
        return out


def test_no_tensor_has_a_number_for_each_pair_of_tokens() -> None:
    model = PatchScalingViT(img_size=48, patch_size=1, embed_dim=16, depth=1, num_heads=2).eval()
    with torch.no_grad(), Largest() as seen:
        model(torch.zeros(1, 3, 48, 48))
    assert seen.most < 2305**2


def test_recomputing_changes_no_gradient() -> None:
    small = SMALL["patch-scaling"]
    gradients = []
    for tokens in (1, 10**9):
        model = small.make(checkpoint_tokens=tokens).train()
        model(small.images()).square().sum().backward()
        gradients.append(model.patch_embed.proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
