"""Patch scaling: more tokens, the same blocks, no N × N scores kept; and what lets Mamba read images in one direction."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from small_models import SMALL
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitreous import VitreousError
from vitreous.macs import CountMacs
from vitreous.models.adventurer import Adventurer, CausalMixer, Mamba2
from vitreous.models.patch_scaling import PatchScalingViT


@pytest.mark.parametrize("name", ["patch_scaling", "adventurer"])
def test_patches_of_one_pixel_make_50176_tokens(name: str) -> None:
    with torch.device("meta"):
        models = {p: timm.create_model(f"{name}_small_patch{p}_224") for p in (16, 1)}
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: PatchScalingViT(img_size=48, patch_size=1, embed_dim=16, depth=1, num_heads=2),
        lambda: Adventurer(img_size=48, patch_size=1, embed_dim=64, depth=1),
    ],
    ids=["vit", "adventurer"],
)
def test_no_tensor_has_a_number_for_each_pair_of_tokens(make: Any) -> None:
    model: nn.Module = make().eval()
    with torch.no_grad(), Largest() as seen:
        model(torch.zeros(1, 3, 48, 48))
    assert seen.most < 2305**2


@pytest.mark.parametrize("system", ["patch-scaling", "patch-scaling adventurer"])
def test_recomputing_changes_no_gradient(system: str) -> None:
    small = SMALL[system]
    gradients = []
    for tokens in (1, 10**9):
        model = small.make(checkpoint_tokens=tokens).train()
        model(small.images()).square().sum().backward()
        gradients.append(cast(Any, model).patch_embed.proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


# ---- Adventurer


def reach(mixer: nn.Module, at: int) -> list[int]:
    """Which of 9 tokens change what the mixer gives at the token `at`."""
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mixer(x)[0, at].square().sum().backward()
    return cast(Tensor, x.grad).abs().sum((0, 2)).nonzero().flatten().tolist()


def swaps(mixer: nn.Module, at: int) -> list[int]:
    """Where a swap of a token with the next, which leaves the mean of all as it is, changes what is given at `at`."""
    x, changed = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(1)), []
    with torch.no_grad():
        for i in range(8):
            order = list(range(9))
            order[i : i + 2] = i + 1, i
            if (mixer(x[:, order]) - mixer(x))[0, at].abs().max() > 1e-5:
                changed.append(i)
    return changed


def test_a_token_reads_itself_and_those_before() -> None:
    torch.manual_seed(0)
    assert reach(Mamba2(64), 5) == list(range(6))


def test_the_heading_average_tells_the_first_token_of_all_others() -> None:
    torch.manual_seed(0)
    mixer = CausalMixer(64, flip=False)
    assert reach(mixer, 0) == list(range(9))
    assert swaps(mixer, 4) == [0, 1, 2, 3, 4]


def test_flipped_blocks_read_from_the_last_patch_to_the_first() -> None:
    """The class token, the last, reads all patches either way, and no patch reads it but for the mean."""
    torch.manual_seed(0)
    mixer = CausalMixer(64, flip=True)
    assert swaps(mixer, 4) == [3, 4, 5, 6, 7]
    assert swaps(mixer, 8) == list(range(8))
    assert [b.attn.flip for b in timm.create_model("adventurer_tiny_patch16_64").blocks] == [False] * 2 + [True] * 2 + [False] * 8


def test_work_of_adventurer_is_linear_in_the_number_of_patches() -> None:
    counted = []
    for side in (64, 128):
        with torch.device("meta"):
            model, x = timm.create_model("adventurer_tiny_patch1_64", img_size=side, depth=1), torch.zeros(1, 3, side, side)
        with torch.no_grad(), CountMacs() as counter:
            model(x)
        counted.append(counter.total)
    assert counted[1] == pytest.approx(4 * counted[0], rel=0.01)


def test_another_size_of_images_is_refused() -> None:
    small = SMALL["patch-scaling adventurer"]
    with pytest.raises(VitreousError, match="64 × 64, not 96 × 96"):
        small.make()(small.images(side=96))
    with pytest.raises(VitreousError, match="does not divide"):
        small.make(img_size=60)
