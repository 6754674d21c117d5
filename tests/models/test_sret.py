from __future__ import annotations

import torch

from vitreous.models.sret import RecursiveBlock


def block(*groups: int) -> RecursiveBlock:
    torch.manual_seed(0)
    return RecursiveBlock(8, 2, 2.0, 1.0, groups, 0.0).eval()


def test_a_block_runs_twice_with_the_same_weights() -> None:
    calls: list[int] = []
    twice, x = block(1, 1), torch.randn(1, 6, 8)
    twice.attn.register_forward_hook(lambda *_: calls.append(1))
    y = twice(x)
    assert len(calls) == 2
    once = block(1)
    once.load_state_dict({k: v for k, v in twice.state_dict().items() if "projections.1" not in k})
    z = once(x)
    once.projections[0] = twice.projections[1]
    torch.testing.assert_close(once(z), y)


def test_tokens_attend_within_their_slice() -> None:
    sliced, x = block(2), torch.randn(1, 6, 8)
    y = sliced(x)
    x[:, 3:] += 1
    torch.testing.assert_close(sliced(x)[:, :3], y[:, :3])
    assert not torch.allclose(block(1)(x)[:, :3], y[:, :3])


def test_the_order_is_random_in_training_alone() -> None:
    sliced, x = block(1, 3), torch.randn(1, 6, 8)
    assert torch.equal(sliced(x), sliced(x))
    sliced.train()
    assert any(not torch.allclose(sliced(x), sliced(x), atol=1e-6) for _ in range(5))
