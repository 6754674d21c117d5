"""What travels along the blocks belongs to one pass: passes of one model that run at once, or twice, do not meet."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from support import small_vit
from torch import Tensor, nn

from vitreous import slim
from vitreous.blocks import Tokens, traced
from vitreous.steps import Step
from vitreous.tokens import MCTF, EViT, ToMe, UniformPooling

STEPS: list[list[Step]] = [[ToMe(r=3)], [MCTF(r=3)], [UniformPooling(at=(1,)), EViT(keep=0.5, at=(2,))]]
EACH = pytest.mark.parametrize("steps", STEPS, ids=["ToMe", "MCTF", "pooled, then EViT"])


def pictures(seed: int) -> Tensor:
    return torch.randn(1 + seed % 3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def losses(model: nn.Module) -> list[Tensor]:
    """The gradient of each parameter."""
    model.zero_grad()
    model(pictures(2)).square().sum().backward()
    return [cast(Tensor, p.grad).clone() for p in model.parameters()]


@EACH
def test_threads_get_the_answers_of_one_after_another(steps: list[Step]) -> None:
    small = slim(small_vit(depth=3), steps)

    def passed(seed: int) -> tuple[Tensor, list[int]]:
        with torch.no_grad(), traced(small) as trace:
            return small(pictures(seed)), [len(r.into) for r in trace]

    expected = [passed(seed) for seed in range(20)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(passed, [i % 20 for i in range(160)]))
    for i, (answer, noted) in enumerate(found):
        torch.testing.assert_close(answer, expected[i % 20][0], atol=1e-5, rtol=1e-5)
        assert noted == expected[i % 20][1], "what one pass does is written down for it alone"


@EACH
def test_a_pass_begun_within_another_leaves_it_alone(steps: list[Step]) -> None:
    small, within = cast(Any, slim(small_vit(), steps)), []
    with torch.no_grad():
        expected, other = small(pictures(1)), small(pictures(2))

        def begin(*_: Any) -> None:
            handle.remove()
            within.append(small(pictures(2)))

        handle = small.blocks[2].register_forward_pre_hook(begin)
        torch.testing.assert_close(small(pictures(1)), expected)
    torch.testing.assert_close(within[0], other)


@EACH
def test_gradient_checkpointing_changes_no_gradient(steps: list[Step]) -> None:
    small: Any = slim(small_vit(), steps).train()
    plain = losses(small)
    small.set_grad_checkpointing(True)
    for a, b in zip(losses(small), plain, strict=True):
        torch.testing.assert_close(a, b)


@EACH
def test_replicas_of_one_model(steps: list[Step]) -> None:
    """What DataParallel does: shallow copies run in threads of their own, all on the same submodules."""
    small = slim(small_vit(), steps)
    with torch.no_grad():
        expected = [small(pictures(seed)) for seed in range(2)]
        torch.testing.assert_close(nn.DataParallel(small)(pictures(0)), expected[0])
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda seed: copy.copy(small)(pictures(seed)), [0, 1] * 8))
    for i, answer in enumerate(found):
        torch.testing.assert_close(answer, expected[i % 2], atol=1e-5, rtol=1e-5)


def test_distributed(tmp_path: Any) -> None:
    small = slim(small_vit(), STEPS[0]).train()
    expected = losses(small)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for a, b in zip(losses(nn.parallel.DistributedDataParallel(small)), expected, strict=True):
            torch.testing.assert_close(a, b)
    finally:
        dist.destroy_process_group()


def test_compiled_models_are_traced(images: Tensor) -> None:
    small = slim(small_vit(depth=2), STEPS[0])
    with torch.no_grad():
        compiled = cast(nn.Module, torch.compile(small, backend="eager", fullgraph=True))
        out = compiled(images)
        with traced(compiled) as trace:
            torch.testing.assert_close(compiled(images), out)
    assert len(trace) == 2
    torch.testing.assert_close(out, small(images))


def test_hooks_that_pack_what_they_change(images: Tensor) -> None:
    """A hook that gives back a plain tuple, as many tools do, loses nothing."""
    small: Any = slim(small_vit(), STEPS[0])
    with torch.no_grad():
        expected = small(images)
        seen = []
        for block in small.blocks[:-1]:
            block.register_forward_hook(lambda _, __, out: (seen.append(Tokens.of(out).size), tuple(out))[1])
        torch.testing.assert_close(small(images), expected)
    assert [cast(Tensor, s).shape[1] for s in seen] == [14, 11, 8]
