"""Quantizers on models as people hold them: in another precision, compiled, under autocast, with answers of every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous.outputs import answer

# One of each kind of calculation: ranges, second-order rounding with balance, gradients, relevance, integers alone.
STEPS = [
    "RepQ()",
    "Auto()",
    "WeightOnly(bits=4, rounding='second-order')",
    "GradientPTQ(weights=6, activations=6, iterations=2)",
    "LRPQViT(weights=6, activations=6)",
    "ISViT(weights=6, activations=6, iterations=1)",
    "IViT()",
    "QHyViT()",
]


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def whole(x: Tensor) -> tuple[nn.Module, dict[str, nn.Module]]:
    model = small_vit(depth=2)
    return model, {step: vt.slim(model, vt.Recipe.parse(step), x) for step in STEPS}


def off(model: nn.Module, x: Tensor, whole: Any) -> float:
    """How far the answers are from those of the float model."""
    with torch.no_grad():
        exact = whole[0](x.float())
        return float((model(x).float() - exact).norm() / exact.norm())


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = model, kind

    def forward(self, x: Tensor) -> Any:
        if self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)
        y = self.inner(x)
        return {"logits": y, "hidden": x} if self.kind == "dict" else (y, x)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["half", "bf16", "double"])
def test_another_precision(kind: str, step: str, x: Tensor, whole: Any, tmp_path: Path) -> None:
    dtype = {"half": torch.half, "bf16": torch.bfloat16, "double": torch.double}[kind]
    model = small_vit(depth=2).to(dtype)
    small = vt.slim(model, vt.Recipe.parse(step), x)
    assert off(small, x.to(dtype), whole) < 2 * off(whole[1][step], x, whole) + 0.03
    with torch.no_grad():
        again = vt.load(vt.save(small, tmp_path / "small.safetensors"), base=small_vit(depth=2))
        assert torch.equal(again(x.to(dtype)), small(x.to(dtype)))
    kept = {n for n, p in small.named_parameters() if p.is_floating_point() and p.dtype != dtype}
    assert not kept or step == "IViT()", f"parameters left in float32: {kept}"


@pytest.mark.parametrize("step", STEPS)
def test_compiled_and_spread_models(step: str, x: Tensor, whole: Any) -> None:
    model = small_vit(depth=2)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    small = vt.slim(torch.compile(nn.DataParallel(model), backend="eager"), vt.Recipe.parse(step), x)
    assert small.state_dict().keys() == whole[1][step].state_dict().keys()
    with torch.no_grad():
        assert torch.equal(small(x), whole[1][step](x))


@pytest.mark.parametrize("step", STEPS)
def test_answers_of_other_forms(step: str, x: Tensor, whole: Any) -> None:
    if step.startswith("LRPQViT"):
        pytest.skip("relevance begins at scores [B, classes]")
    small = vt.slim(Wrapped(small_vit(depth=2), "dict"), vt.Recipe.parse(step), x)
    with torch.no_grad():
        torch.testing.assert_close(answer(small(x)), whole[1][step](x))


@pytest.mark.parametrize("step", ["Auto()", "WeightOnly(bits=4, rounding='second-order')", "LRPQViT(weights=6, activations=6)"])
def test_under_autocast(step: str, x: Tensor, whole: Any) -> None:
    model = Wrapped(small_vit(depth=2), "autocast")
    recipe = vt.Recipe.parse(step)
    if step.startswith("LRPQViT"):
        with pytest.raises(vt.VitreousError, match="set mixed=False"):
            vt.slim(model, recipe, x)
    else:
        assert off(vt.slim(model, recipe, x), x, whole) < 2 * off(whole[1][step], x, whole) + 0.03
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():  # the caller's own
        small = vt.slim(whole[0], recipe, x)
    with torch.no_grad():
        assert torch.equal(small(x), whole[1][step](x))


def test_the_integers_of_ivit_are_all_in_its_state(x: Tensor, whole: Any) -> None:
    small = whole[1]["IViT()"]
    other = vt.slim(whole[0], vt.quant.IViT(), x * 0.3)  # other ranges
    other.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), small(x))
    tokens = vt.slim(vt.slim(whole[0], vt.tokens.ToMe(r=2), x), vt.quant.IViT(), x)
    others = vt.slim(vt.slim(whole[0], vt.tokens.ToMe(r=2), x), vt.quant.IViT(), x * 0.3)
    others.load_state_dict(tokens.state_dict())
    with torch.no_grad():
        assert torch.equal(others(x), tokens(x))
