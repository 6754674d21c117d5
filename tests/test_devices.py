"""On a GPU as on the processor: the same answers from the same weights, and nothing left on the wrong device.

Where there is no GPU it is pretended (`pretended.py`), which refuses what a GPU would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from learn.test_every_learner import WITHOUT_LOSS, made, student
from learning import pictures
from pretended import pretended
from support import small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous.learn.measure import LATE
from vitreous.learn.merging import RULES
from vitreous.learn.objective import REGISTRY
from vitreous.prune.subnet import Space, Subnet, sort_units
from vitreous.steps import REGISTRY as STEPS_BY_NAME

Pair = tuple[Tensor, Tensor]


def some(names: Iterable[str], *few: str) -> list[str]:
    """All where there is a GPU; where it is pretended, which is slow, those that differ in kind."""
    return list(names) if torch.cuda.is_available() else list(few)


@pytest.fixture
def gpu() -> Iterator[str]:
    if torch.cuda.is_available():
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield "cuda"
        torch.backends.cudnn.allow_tf32 = before
    else:
        with pretended():
            yield "cuda"


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def alike(ours: Any, theirs: Any, close: float = 1e-3) -> None:
    """Tensors, numbers, and mappings and rows of them."""
    if isinstance(ours, Tensor):
        assert torch.allclose(
            ours.detach().cpu().double(), theirs.detach().cpu().double(), atol=close, rtol=close, equal_nan=True
        )
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        alike(list(ours.values()), list(theirs.values()), close)
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            alike(a, b, close)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, abs=close, nan_ok=True)
    else:
        assert ours == theirs


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def masked(model: nn.Module, x: Tensor) -> Any:
    with vt.glass(model) as g:
        g.mask_heads(1, [0])
        y = model(x)
    return y, list(g.attention)


LOOKS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    **{name: lambda m, x, f=f: f(m, x, target=3) for name, f in vt.see.METHODS.items()},
    "glass": masked,
}


@pytest.mark.parametrize("name", some(LOOKS, "grad_rollout", "lrp", "glass"))
def test_looking(name: str, gpu: str) -> None:
    alike(LOOKS[name](small_vit().to(gpu), images().to(gpu)), LOOKS[name](small_vit(), images()))


HEADS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "importance": lambda m, d: vt.see.head_importance(m, d),
    "distance": lambda m, d: vt.see.distance(m, d),
    "artifacts": lambda m, d: vt.see.artifacts(m, d),
    "patterns": lambda m, d: vt.see.patterns(m, d),
    "paths": lambda m, d: vt.see.paths(m, d),
}


@pytest.mark.parametrize("name", some(HEADS, "distance", "paths"))
def test_heads(name: str, gpu: str) -> None:
    ours, theirs = (vars(HEADS[name](m, images(8))) for m in (small_vit().to(gpu), small_vit()))
    for key, value in theirs.items():
        if isinstance(value, Tensor):
            alike(ours[key], value)


STEPS: dict[str, Any] = {
    "EViT": vt.tokens.EViT(keep=0.7, at=(1, 2)),
    "ToMe": vt.tokens.ToMe(r=2),
    "MCTF": vt.tokens.MCTF(r=2),
    "TokenSlimming": vt.tokens.TokenSlimming(keep=0.5, at=(1,)),
    "SemanticTokens": vt.tokens.SemanticTokens(tokens=4),
    "Sparsifiner": vt.tokens.Sparsifiner(budget=0.5),
    "Heads": vt.prune.Heads(),
    "NViT": vt.prune.NViT(),
    "Divergence": vt.prune.Divergence(),
    "LPViT": vt.prune.LPViT(),
    "TwoFour": vt.prune.TwoFour(),
    "VPT": vt.adapt.VPT(prompts=2),
    "Registers": vt.adapt.Registers(count=2),
    "HST": vt.adapt.HST(),
    **{name.split(".")[1]: step() for name, step in STEPS_BY_NAME.items() if name.startswith("quant.")},
}


@pytest.mark.parametrize("where", some(["cpu", "cuda"], "cpu"))
@pytest.mark.parametrize("name", some(STEPS, "ToMe", "Heads", "TwoFour", "HST"))
def test_steps(name: str, where: str, gpu: str) -> None:
    """Calibrated by images that lie beside the model, or on the processor."""
    made = []
    for device, place in (("cpu", "cpu"), (gpu, where)):
        torch.manual_seed(0)
        made.append(vt.slim(small_vit().to(device), STEPS[name], images(8).to(place)))
    assert {p.device.type for p in (*made[1].parameters(), *made[1].buffers())} == {"cuda"}
    alike(made[1](images().to(gpu)), made[0](images()), 2e-2)


@pytest.mark.parametrize("name", some(["uniform", "subnet", "sorted"], "sorted"))
def test_subnets(name: str, gpu: str) -> None:
    def cut(model: nn.Module, x: Tensor) -> Tensor:
        model = sort_units(model) if name == "sorted" else model
        return Subnet.of(Space.of(model, 2, width=0.5 if name == "subnet" else 1.0).smallest).apply(model)(x)

    alike(cut(small_vit().to(gpu), images().to(gpu)), cut(small_vit(), images()))


LESSONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro": {"micro": 8},
    "ema": {"ema": 0.9},
    "mixup": {"mixup": 0.8, "cutmix": 1.0},
    "patch mixing": {"mix": vt.learn.PatchMixing(7, grid=4)},
    "shift": {"augment": "shift"},
    "SAM": {"optimiser": vt.learn.SAM(vt.learn.SGD(1e-3))},
    "Lion": {"optimiser": vt.learn.Lion()},
    "SGD-SaI": {"optimiser": vt.learn.SGDSaI()},
}


def data(n: int = 32) -> Pair:
    return images(n), torch.arange(n) % 7


@pytest.mark.parametrize("name", some(LESSONS, "patch mixing", "SAM"))
@pytest.mark.parametrize("where", some(["cpu", "cuda"], "cpu"))
def test_training(name: str, where: str, gpu: str) -> None:
    """With the pictures there already, or on the processor."""
    given = dict(epochs=2, batch=16, augment=None) | LESSONS[name]
    x, y = data()
    ours = vt.train(small_vit(), (x.to(where), y.to(where)), accelerator=gpu, **given)
    alike(weights(ours), weights(vt.train(small_vit(), data(), **given)))


def test_training_stops_at_what_is_not_finite(gpu: str) -> None:
    """A GPU is asked late, and the step and its images are still those."""
    x, y = data(8 * (LATE + 8))
    x[8 * 5 : 8 * 6] = torch.nan
    told = []
    for device in ("cpu", gpu):
        with pytest.raises(vt.VitreousError, match="not finite at step") as error:
            vt.train(small_vit(), (x, y), epochs=1, batch=8, augment=None, accelerator=device)
        told.append(str(error.value))
    assert told[0] == told[1]


def test_opened_and_proven(gpu: str) -> None:
    model = vt.open(small_vit(depth=2), device=gpu)
    small = vt.slim(model, vt.tokens.EViT(keep=0.7, at=(1,)))
    proof = vt.prove({"before": model, "after": small}, data(8), batches=(2,), rounds=5)
    assert all(m.latency[0].median > 0 for m in proof.models) and proof.models[1].latency[0].ratio is not None


@pytest.mark.parametrize("name", some([n for n in REGISTRY if n != "PHReg"], "NKD", "FeatureMatch"))
def test_objectives(name: str, gpu: str) -> None:
    both = lambda: [made(name), vt.learn.CrossEntropy()] if name in WITHOUT_LOSS else [made(name)]
    sgd = vt.learn.SGD(0.1)  # which makes nothing of a gradient of nothing, as of a teacher that is the student
    given = dict(epochs=0.5, batch=32, augment=None, optimiser=sgd)
    try:
        theirs = vt.train(student(name), pictures(), both(), **given)
    except vt.VitreousError:  # for other models than a plain ViT
        return
    alike(weights(vt.train(student(name), pictures(), both(), accelerator=gpu, **given)), weights(theirs))


@pytest.mark.parametrize("rule", some(RULES, "OPCM"))
def test_merging(rule: str, gpu: str) -> None:
    def merged(device: str) -> nn.Module:
        models = [small_vit(seed=i).to(device) for i in range(2)]
        base = small_vit(seed=2).to(device) if RULES[rule].needs_base else None
        return vt.merge(models, RULES[rule](), base=base, data=data() if RULES[rule].needs_data else None)

    alike(weights(merged(gpu)), weights(merged("cpu")))


def test_healing_and_probing(gpu: str) -> None:
    def through(device: str) -> Any:
        model = small_vit().to(device)
        small = vt.slim(model, vt.tokens.EViT(keep=0.7, at=(1,)))
        healed = vt.heal(small, model, data(), epochs=1, batch=16, augment=None, accelerator=device)
        return weights(healed), vt.probe(model, data(), data(), ("knn", "linear"), epochs=1, batch=16, augment=None)

    alike(through(gpu), through("cpu"))


@pytest.mark.parametrize("method", some(["SimMIM(cell=8)", "MAE(width=16, depth=1, heads=2)"], "SimMIM(cell=8)"))
def test_pretraining(method: str, gpu: str) -> None:
    model = small_vit(num_classes=0)
    given = dict(epochs=1, batch=8, augment=None, say=lambda line: None)
    ours, theirs = (vt.pretrain(model, (images(16), None), method, accelerator=d, **given) for d in (gpu, "cpu"))
    alike(weights(ours), weights(theirs))
