"""Sub-networks of ElasticViT: how many there are, what they cost, and cutting one out.

Tang et al., "ElasticViT" (ICCV 2023), section 3. Facts from the official repository, microsoft/Moonlit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..models.elasticvit import CONVS, DOWN, HEAD, Choice, ElasticViT, Norm
from ..store import open_model
from ..store.expects import expectations, restore

SIDES = (128, 160, 176, 192, 224, 256)
WIDTHS = (1, 4, 8, 12, 16, 20, 24)  # places of the stem's width and of the stages' in a row of numbers
DRAWN, TRIES = 4096, 400


def row(choice: Choice) -> list[int]:
    return [choice.side, *choice.stem, *(n for s in choice.stages for n in s)]


def choice(numbers: Sequence[int]) -> Choice:
    """The network that a row of numbers says."""
    n = list(numbers)
    return Choice(n[0], tuple(n[1:4]), tuple(tuple(n[i : i + 4]) for i in WIDTHS[1:]))


def options(model: ElasticViT) -> list[list[int]]:
    """What each number of a row may be, from least to largest: sides of images as published, widths in steps of 8 and of 16 in
    attention, odd kernels. Raises `VitreousError` where the model is no supernet."""
    if model.least is None:
        raise VitreousError("this elastic network is one that was cut out: sub-networks are in a supernet, as elastic_S1 is")
    steps = [0, 8, 1, 2] + [8, 1, 1, 2] * CONVS + [HEAD, 1, 1, 1] * (len(DOWN) - CONVS)
    found = []
    for step, low, high in zip(steps, row(model.least), row(model.largest), strict=True):
        between = range(low, high, step) if step else [s for s in SIDES if low < s < high]
        found.append(sorted({low, high, *between}))
    return found


def macs(model: ElasticViT, rows: Tensor) -> Tensor:
    """Multiply-accumulates of an image `[n]` in the networks `rows [n, 28]`, as the released code counts: no shortcut where a
    stage keeps its resolution, one for each weight of the convolution of values that is not in its kernel."""
    side, width, depth, kernel = rows.long().T[:4]
    n = (side // 2) ** 2
    total = n * width * (9 * model.first_conv.in_channels + depth * (kernel**2 + width))
    at = side // 2
    for i, down in enumerate(DOWN):
        outputs, depth, one, two = rows.long().T[WIDTHS[i + 1] :][:4]
        at = at // 2 if down and i < CONVS else (at + 1) // 2 if down else at
        n, before = at**2, (at * (2 if down else 1)) ** 2
        if i < CONVS:
            for inputs, count, seen in ((width, 1, before), (outputs, depth - 1, n)):
                inner = inputs * one
                block = inner * (seen * inputs + n * (two**2 + outputs)) + (2 * inner * (inner // 4) if i else 0)
                total = total + count * block
            total = total + n * width * outputs
        else:
            inner, heads = 6 * width, outputs // HEAD
            total = total + inner * (before * width + n * (9 + outputs))
            mixed = heads * n**2 * (HEAD * (1 + two) + 1) + n * two * outputs
            total = total + depth * (mixed + n * outputs**2 * (2 + 2 * two + 2 * one))
        width = outputs
    features, classes = model.num_features, model.num_classes
    return total + model.head_ratio * width * (n * width + features) + features * classes


def cost(model: ElasticViT, net: Choice) -> float:
    return float(macs(model, torch.tensor([row(net)]))[0])


def draw(model: ElasticViT, count: int, floor: Choice | None = None) -> Tensor:
    """At most `count` networks `[n, 28]`, none less than `floor` in anything, widths that do not fall; by torch's generator."""
    columns: list[Tensor] = []
    start = row(floor or cast(Choice, model.least))
    for i, (given, low) in enumerate(zip(options(model), start, strict=True)):
        values = torch.tensor(given)
        first = torch.full((count,), int(torch.searchsorted(values, low)))
        if i in WIDTHS[1:]:
            first = torch.maximum(first, torch.searchsorted(values, columns[WIDTHS[WIDTHS.index(i) - 1]]))
        place = first + (torch.rand(count) * (len(given) - first)).long()
        columns.append(values[place.clamp(max=len(given) - 1)])
    rows = torch.stack(columns, 1)
    return rows[(rows[:, list(WIDTHS)].diff(dim=1) >= 0).all(1)]


def between(model: ElasticViT, low: float, high: float, count: int, floor: Choice | None = None) -> list[Choice]:
    """At most `count` networks of `low` to `high` multiply-accumulates, drawn at random.

    Raises `VitreousError` where none is found.
    """
    found: list[Choice] = []
    least, most = (cost(model, n) for n in (cast(Choice, model.least), model.largest))
    for _ in range(TRIES if least <= high and low <= most else 0):
        rows = draw(model, DRAWN, floor)
        spent = macs(model, rows)
        found += [choice(r) for r in rows[(low <= spent) & (spent <= high)].tolist()]
        if len(found) >= count:
            return found[:count]
    if not found:
        raise VitreousError(
            f"no network of {low / 1e6:g} to {high / 1e6:g} million multiply-accumulates was found; this supernet goes from "
            f"{least / 1e6:.4g} to {most / 1e6:.4g}"
        )
    return found


@torch.no_grad()
def recalibrate(model: ElasticViT, batches: Iterable[Tensor]) -> None:
    """Measure the batch norms' statistics anew for the network that runs, on batches of images; leaves it in eval mode."""
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, Norm)]
    kept = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    for x in batches:
        model(x)
    for m, momentum in zip(norms, kept, strict=True):
        m.momentum = momentum
        m.eval()


@torch.no_grad()
def cut(model: ElasticViT, net: Choice) -> ElasticViT:
    """The ordinary, smaller model, in eval mode; the supernet stays as it is."""
    options(model)
    model.check(net)
    channels = model.first_conv.in_channels
    made = cast(
        ElasticViT,
        open_model(
            "elastic_T1", img_size=net.side, in_chans=channels, num_classes=model.num_classes, stem=net.stem, stages=net.stages,
            least=(), choice=(), features=model.num_features, head_ratio=model.head_ratio,
        ),
    )  # fmt: skip
    restore(made, {**expectations(model), "input_size": [channels, net.side, net.side]})
    mine, state = model.state_dict(), {}
    for name, wanted in made.state_dict().items():
        full = mine[name]
        if name.endswith(".qkv.weight"):
            c, most = wanted.shape[1], full.shape[1]
            full = torch.cat([full[:c], full[most : most + c], full[2 * most :][: len(wanted) - 2 * c]])
        elif name.endswith(".attention_bias"):
            side, most = (round(len(t) ** 0.5) for t in (wanted, full))
            a = (most - side) // 2
            full = full.unflatten(0, (most, most))[a : a + side, a : a + side].flatten(0, 1)
        elif name.endswith(".dw_conv.weight"):
            a = (full.shape[2] - wanted.shape[2]) // 2
            full = full[:, :, a:, a:]
        state[name] = full[tuple(slice(n) for n in wanted.shape)]
    made.load_state_dict(state)
    return made.eval()


def supernet(model: nn.Module, wanted: str) -> ElasticViT:
    """The model, where it is ElasticViT's supernet; `VitreousError` otherwise."""
    if not isinstance(model, ElasticViT):
        raise VitreousError(f"{wanted} an elastic supernet, as elastic_S1, not {type(model).__name__}")
    options(model)
    return model


def bounds(model: ElasticViT, floors: Any) -> list[Choice]:
    """Of `floors` those that are in the supernet."""
    low, high = row(cast(Choice, model.least)), row(model.largest)
    return [f for f in map(Choice.of, floors) if all(a <= b <= c for a, b, c in zip(low, row(f), high, strict=True))]
