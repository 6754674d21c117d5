"""What every architecture of `vitreous.models` must do, whatever its paper."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from shapes import macs, on_paper
from small_models import SMALL
from support import GOLDENS, golden, official_state
from torch import Tensor, nn

from vitreous import VitreousError, glass
from vitreous.cli.systems import listed
from vitreous.models import load_official, variants
from vitreous.ship import ship_all

EVERY = pytest.mark.parametrize("system", SMALL)
PYRAMIDS = [system for system, small in SMALL.items() if hasattr(small.make(), "forward_intermediates")]
PUBLISHED = {name: figures for row in listed() for name, figures in row.get("variants", {}).items()}


# ---- what was published


@pytest.mark.parametrize(
    "name", sorted(v for v in variants() if v.partition("--")[0] in SMALL and (GOLDENS / f"{v}.npz").exists())
)
def test_official_output(name: str) -> None:
    """The official checkpoint's own names, strictly; the official output; the exact parameter count."""
    info, expected, x = golden(name)
    state, kwargs = official_state(info), {k: v for k, v in info["kwargs"].items() if k in ("list_num_channels",)}
    model = load_official(name, state)
    assert sum(p.numel() for p in model.parameters()) == info["params"]
    with torch.no_grad():
        out = model(x, **kwargs).flatten(1)[:, : expected.shape[1]].numpy()
    rounding = info.get("f64_diff") or 0.0
    assert abs(out - expected).max() <= (1e-4 if rounding <= 1e-5 else 10 * rounding) * abs(expected).max()
    computed = {k for k, _, kind in info["state"] if kind == "fixed"} - info.get("fixed_values", {}).keys()
    load_official(name, {k: v for k, v in state.items() if k not in computed})
    with pytest.raises(VitreousError, match="do not fit"):
        load_official(name, {**state, "left.over": torch.zeros(1)})
    first = next(k for k, _, kind in info["state"] if kind == "param")
    with pytest.raises(VitreousError, match="do not fit"):
        load_official(name, {k: v for k, v in state.items() if k != first})


@EVERY
def test_its_variants_are_known_under_their_official_names(system: str) -> None:
    slug = system.partition(" ")[0]
    assert any(v.partition("--")[0] == slug for v in variants())
    assert any(row["slug"] == slug for row in listed())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size_and_cost(name: str) -> None:
    """Within 1 % in parameters and 3 % in MACs, or within the rounding of the figure; a `note` says why one is not."""
    figures = PUBLISHED[name]
    model = on_paper(name)
    measured = {"params": sum(p.numel() for p in model.parameters()) / 1e6, "gmacs": macs(model) / 1e9}
    off = {}
    for what, part in (("params", 0.01), ("gmacs", 0.03)):
        if what in figures:
            said = figures[what]
            rounding = 0.5 * 10.0 ** cast(int, Decimal(str(said)).as_tuple().exponent)
            if abs(measured[what] - said) > max(part * said, rounding) * 1.001:
                off[what] = (measured[what], said)
    assert bool(off) == ("note" in figures), off


# ---- what timm's users expect


@EVERY
def test_gradient_reaches_every_parameter(system: str) -> None:
    small = SMALL[system]
    model = small.make().train()
    model(small.images(4)).square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all() and p.grad.any()}
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learned - reached == {n for n in learned if n.startswith(small.unused)}


@EVERY
def test_the_classifier_can_be_changed(system: str) -> None:
    small = SMALL[system]
    model, x = small.make(), small.images()
    features, logits = cast(Any, model.forward_features)(x), model(x)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(cast(Any, model.forward_head)(features), logits)
    read = cast(Any, model.forward_head)(features, pre_logits=True)
    cast(Any, model.reset_classifier)(3)
    assert model(x).shape == (2, 3)
    cast(Any, model.reset_classifier)(0)
    torch.testing.assert_close(model(x), read)
    assert read.shape == small.make(num_classes=0)(x).shape == (2, model.num_features)
    assert isinstance(cast(Any, small.make()).get_classifier(), nn.Module)


@pytest.mark.parametrize("system", PYRAMIDS)
def test_pyramids_give_their_maps(system: str) -> None:
    small = SMALL[system]
    pyramid, x = small.make(features_only=True), small.images()
    maps, info = pyramid(x), pyramid.feature_info
    assert [m.shape[1] for m in maps] == info.channels()
    assert [tuple(m.shape[2:]) for m in maps] == [(small.side // r, small.side // r) for r in info.reduction()]
    whole = cast(Any, small.make())
    last, others = whole.forward_intermediates(x)
    torch.testing.assert_close(whole.forward_head(last), whole(x))
    torch.testing.assert_close(others[-1], maps[-1])
    if last.ndim == 4:  # else it is tokens, perhaps with a class token among them
        torch.testing.assert_close(whole.forward_intermediates(x, norm=True)[1][-1], last)
    [first] = small.make(features_only=True, out_indices=(0,))(x)
    torch.testing.assert_close(first, maps[0])


@pytest.mark.parametrize("system, given", [("gmm-attention", dict(depth=2)), ("msvmamba", dict(depths=(1, 1)))])
def test_a_pyramid_of_fewer_stages_gives_fewer_maps(system: str, given: dict[str, Any]) -> None:
    assert len(SMALL[system].make(features_only=True, **given)(SMALL[system].images())) == 2


@EVERY
def test_other_sizes_of_images(system: str) -> None:
    small = SMALL[system]
    if small.other_side:
        assert small.make()(small.images(side=small.other_side)).shape == (2, 7)
    elif small.resized is not None:
        assert small.make(**small.resized)(small.images(side=small.side * 3 // 2)).shape == (2, 7)
    else:
        with pytest.raises((VitreousError, AssertionError), match=r"\d"):
            small.make()(small.images(side=small.side * 3 // 2))


@EVERY
def test_other_channels(system: str) -> None:
    small = SMALL[system]
    x = torch.randn(2, 5, small.side, small.side)
    assert small.make(in_chans=5)(x).shape == (2, 7)


# ---- where it goes


@EVERY
def test_bfloat16(system: str) -> None:
    small = SMALL[system]
    model, x = small.make(), small.images()
    wanted = model(x)
    off = model.bfloat16()(x.bfloat16()).float() - wanted
    assert off.norm() < 0.1 * wanted.norm()


@EVERY
def test_torch_compile_sees_one_graph(system: str) -> None:
    small = SMALL[system]
    model, x = small.make(), small.images()
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@EVERY
def test_export(system: str, tmp_path: Path) -> None:
    """ONNX and OpenVINO, any batch, within 1e-3 of torch."""
    small = SMALL[system]
    for shipment in ship_all(small.make(), [tmp_path / "model.onnx", tmp_path / "model.xml"], example=small.images(8)):
        assert shipment.parity.worst <= 1e-3


@EVERY
def test_glass_sees_its_attention(system: str) -> None:
    small = SMALL[system]
    model, x = small.make(), small.images()
    with torch.no_grad(), glass(model) as g:
        seen = model(x)
    torch.testing.assert_close(seen, model(x), rtol=1e-4, atol=1e-5)
    assert bool(g.attention) == small.attention
    maps: list[Tensor] = list(g.attention)
    assert all(m.ndim >= 3 and m.isfinite().all() for m in maps)
