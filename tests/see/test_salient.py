"""Salient relevance: areas, not pixels, and those unlike the rest."""

from __future__ import annotations

import torch
from support import small_vit
from torch import Tensor

from vitreous import see
from vitreous.see.salient import context_aware


def test_what_is_unlike_its_surroundings_is_salient() -> None:
    """Bars all over the picture are alike, a square among them is not, though it is no brighter."""
    picture = torch.zeros(1, 40, 40)
    picture[:, :, ::4] = 1
    picture[:, 14:24, 14:24] = 1
    found = context_aware(picture)
    inside = found[15:23, 15:23].mean()
    assert found.min() >= 0 and found.max() <= 1
    assert inside > 2 * found[2:10, 2:38].mean() and inside > 2 * found[30:38, 2:38].mean()


def test_what_lies_near_a_focus_counts_more() -> None:
    picture = torch.zeros(1, 40, 40)
    picture[:, 2:10, 2:10] = 1
    for corner in (slice(12, 14), slice(34, 36)):  # two equal spots, one near the square
        picture[:, corner, corner] = 0.4
    found = context_aware(picture)
    assert found[12:14, 12:14].mean() > 1.2 * found[34:36, 34:36].mean()


def test_a_picture_without_anything_has_nothing_salient() -> None:
    assert context_aware(torch.zeros(1, 12, 20)).abs().max() < 1e-6


def test_of_a_model(images: Tensor) -> None:
    model = small_vit()
    found = see.salient_relevance(model, images[:3], 2)
    assert found.shape == (3, 4, 4) and (found >= 0).all() and (found <= 1).all()
    torch.testing.assert_close(see.salient_relevance(model, images[1:2], 2)[0], found[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, see.salient_relevance(model, images[:3], 4), rtol=1e-2)


def test_the_factor_for_what_is_near_cannot_be_left_out() -> None:
    """Two faint spots, equal but for their places: the one beside the bright spot is the more salient (eq. 4)."""
    picture = torch.zeros(1, 48, 48)
    picture[:, 8:11, 8:11] = 1.0  # the focus
    for at in (16, 38):
        picture[:, at : at + 3, at : at + 3] = 0.4
    found = context_aware(picture)
    near, far = (float(found[at - 1 : at + 4, at - 1 : at + 4].mean()) for at in (16, 38))
    assert near > 3 * far  # 7 times; without the factor for what is near 1.8
