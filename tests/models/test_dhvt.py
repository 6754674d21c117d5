from __future__ import annotations

import torch

from vitreous.models.dhvt import DAFF, HeadInteractedAttention


def test_the_class_token_gathers_the_head_tokens() -> None:
    """The patches see the head tokens through attention alone; the class token also has their mean."""
    torch.manual_seed(0)
    attention, x = HeadInteractedAttention(12, 3).eval(), torch.randn(2, 5, 12)
    assert attention.head_tokens(x).shape == (2, 3, 12)
    seen: list[torch.Tensor] = []
    attention.proj.register_forward_hook(lambda *a: seen.append(a[2]))
    y = attention(x)
    assert seen[0].shape == (2, 8, 12)
    torch.testing.assert_close(y[:, 1:], seen[0][:, 1:5])
    torch.testing.assert_close(y[:, 0], seen[0][:, 0] + seen[0][:, 5:].mean(1))


def test_the_patches_weigh_the_class_token() -> None:
    torch.manual_seed(0)
    feed, x = DAFF(8, 16).eval(), torch.randn(1, 5, 8)
    y = feed(x, (2, 2))
    doubled = torch.cat([2 * x[:, :1], x[:, 1:]], 1)
    torch.testing.assert_close(feed(doubled, (2, 2)), torch.cat([2 * y[:, :1], y[:, 1:]], 1))
    changed = torch.cat([x[:, :1], x[:, 1:] + 1], 1)
    assert not torch.allclose(feed(changed, (2, 2))[:, 0], y[:, 0])
