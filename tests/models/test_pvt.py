"""PVT's spatial reduction, its class token and its positions."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from small_models import SMALL

from vitreous import glass, read


def test_keys_and_values_come_from_a_smaller_map() -> None:
    """Stage i has (8 · 2⁻ⁱ)² times fewer keys than queries; the class token joins in the last stage alone."""
    small = SMALL["pvt"]
    model = small.make(depths=(1, 1, 1, 1))
    with torch.no_grad(), glass(model) as g:
        model(small.images())
    assert [tuple(a.shape[2:]) for a in g.attention] == [(256, 4), (64, 4), (16, 4), (5, 5)]


def test_the_head_reads_what_the_class_token_gathered() -> None:
    small = SMALL["pvt"]
    model: Any = small.make()
    tokens = model.forward_features(small.images())
    assert tokens.shape == (2, 1 + 2 * 2, 32)
    torch.testing.assert_close(model.forward_head(tokens), model.head(tokens[:, 0]))


def test_positions_follow_the_size_of_the_image() -> None:
    """A model built for 96 pixels whose positions are those of one built for 64, interpolated, gives the same at 96."""
    small = SMALL["pvt"]
    built, other = small.make(), small.make(img_size=96)
    state, wanted = built.state_dict(), other.state_dict()
    for name in [n for n in state if n.endswith("pos_embed")]:
        positions, n = state[name], wanted[name].shape[1]
        first = int(name.startswith("stages.3"))
        side, new = round((positions.shape[1] - first) ** 0.5), round((n - first) ** 0.5)
        table = positions[:, first:].mT.unflatten(2, (side, side))
        table = torch.nn.functional.interpolate(table, size=(new, new), mode="bilinear").flatten(2).mT
        state[name] = torch.cat([positions[:, :first], table], 1)
    other.load_state_dict(state)
    x = small.images(side=96)
    torch.testing.assert_close(other(x), built(x))


def test_its_anatomy_names_four_stages() -> None:
    stages = read(timm.create_model("pvt_tiny", **cast(Any, SMALL["pvt"].arguments | {"depths": (1, 1, 1, 1)}))).stages
    assert [(s.reduction, len(s.blocks)) for s in stages] == [(4, 1), (8, 1), (16, 1), (32, 1)]
