"""Steps, objectives and optimisers as people write them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vitreous.calls import checked
from vitreous.errors import VitreousError


@dataclass(frozen=True)
class Kind:
    rate: float = 1.0
    pair: tuple[float, float] = (1.0, 1.0)
    some: tuple[float, ...] | None = None
    mixed: tuple[int, float] = (1, 1.0)


def test_whole_numbers_are_floats_where_floats_are_wanted() -> None:
    made = checked(Kind, "Kind", {"rate": 2, "pair": (0, 1), "some": [1, 2.5], "mixed": (3, 4)})
    assert made == Kind(2.0, (0.0, 1.0), (1.0, 2.5), (3, 4.0))
    assert [type(v) for v in (made.rate, *made.pair, *(made.some or ()), *made.mixed)] == [float] * 5 + [int, float]


@pytest.mark.parametrize("wrong", [{"rate": True}, {"rate": 2**60}, {"pair": (0, 1, 2)}, {"pair": ("0", 1)}, {"mixed": (1.5, 1)}])
def test_what_does_not_fit_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(VitreousError, match=f"'{next(iter(wrong))}' must be"):
        checked(Kind, "Kind", wrong)
