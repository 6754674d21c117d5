"""Do explanations tell the truth about a model? Insertion, deletion, the pointing game, and the sanity check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from .. import calibrate
from ..copies.own import still
from ..errors import VitreousError
from ..outputs import embeds
from .machine import describe
from .randomisation import Stage, stages
from .result import Result
from .statistics import Interval, bootstrap_mean, wilson
from .subject import caller

Explain = Callable[[nn.Module, Tensor, Any], Tensor]

CHUNK = 16  # images at a time
BLUR = 0.1  # standard deviation of the blur, as a share of the shorter side
BOUND = 0.5


@dataclass(frozen=True)
class Curve:
    """The area under the curve of the score while patches are inserted or deleted, most important first."""

    area: Interval
    gain: Interval
    """How much better than a random order of the same patches in the same images; above 0 is better, also for deletion."""


@dataclass(frozen=True)
class Measure:
    """One explanation; None where it does not apply, or where there is an `error`."""

    name: str
    insertion: Curve | None = None
    deletion: Curve | None = None
    pointing: Interval | None = None
    """Share of the images whose strongest patch has its centre in the box."""
    chance: float | None = None
    """That share for a patch drawn at random."""
    sanity: list[Stage] = field(default_factory=list)
    passes: bool | None = None
    """Whether the heatmaps of the model with all parameters random correlate at most by the bound."""
    error: str | None = None
    """Why there is no such explanation of this model."""


@dataclass(frozen=True)
class Faithfulness(Result):
    """What `faithfulness` found. `print(it)`, or `it.save("faithfulness.json")`."""

    rows: list[Measure]
    model: str
    images: int
    sanity_images: int
    score: str
    blurred: float
    """Mean score of the blurred images, where insertion begins; `blank`: of the images at 0, where deletion ends."""
    blank: float
    whole: float
    steps: int
    bound: float
    seed: int
    date: str
    machine: dict[str, Any]

    def __getitem__(self, name: str) -> Measure:
        return {m.name: m for m in self.rows}[name]

    def __rich__(self) -> Table:
        return _table(self)


def faithfulness(
    model: nn.Module,
    explanations: Mapping[str, Explain],
    images: Any,
    labels: Tensor | np.ndarray | None = None,
    boxes: Tensor | None = None,
    *,
    steps: int = 16,
    sanity_images: int = 16,
    bound: float = BOUND,
    seed: int = 0,
    multi_label: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Faithfulness:
    """Measure how far each of `explanations`, `(model, x [B, C, H, W], target [B] or None)` to heatmaps `[B, h, w]`, is true.

    - Insertion and deletion (Petsiuk, Das & Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC
      2018, section 4): the patches of the heatmap's grid are put into the blurred image, or set to 0, most important first, in
      `steps` equal parts; the mean score along the way. Good is much for insertion and little for deletion. The blur has a tenth
      of the image's side, where RISE has 5 pixels of 224, which leaves small images readable. Equal values come in random order.
    - The pointing game where there are `boxes` (Zhang et al., "Top-Down Neural Attention by Excitation Backprop", IJCV 2018),
      without their margin of 15 pixels.
    - The sanity check of `prove.randomisation` on the first `sanity_images`: it fails when the heatmaps of the model whose
      parameters are all random still correlate by more than `bound` with those of the model.

    The score is the probability of `labels` `[B]`, by default of the predicted class: by softmax, or where `multi_label` or where
    there is one logit by sigmoid. Of a model that gives features it is the cosine between them and those of the whole image, and
    then the explanations are given no target. All intervals are 95 %,
    over the images; the gain over a random order is paired.

    - `images`: `[B, C, H, W]`, or in another form that `vitreous.calibrate.images` takes.
    - `boxes`: `[B, 4]`, left, top, right, bottom in pixels of `images`; a row of NaN for an image without one.
    - `progress`: called with what is being done and the fraction of it that is done.

    Raises `VitreousError` for nothing to measure, and labels or boxes of the wrong form. An explanation that raises one, or gives
    no finite heatmaps, has it in its row.
    """
    images, labels = _checked(model, explanations, images, labels, boxes, steps)
    say = progress or (lambda task, fraction: None)
    found = []
    with torch.no_grad(), still(model) as own:
        target, score, called = _score(own, images, labels, multi_label)
        blurred, blank = _blur(images), torch.zeros_like(images)
        ways = ((blurred, images, 1), (images, blank, -1))  # what the patches are of before and after, and whether much is good
        few, few_targets = images[:sanity_images], None if target is None else target[:sanity_images]
        by_chance: dict[tuple[int, ...], list[np.ndarray]] = {}  # the areas of random orders, by grid
        for name, explain in explanations.items():
            try:
                maps = _maps(explain, own, images, target)
                grid = maps.shape[1:]
                order, random = _orders(torch.from_numpy(maps), seed)
                if grid not in by_chance:
                    by_chance[grid] = [_area(score, start, end, random, grid, steps) for start, end, _ in ways]
                curves = []
                for i, (start, end, sign) in enumerate(ways):
                    area = _area(score, start, end, order, grid, steps)
                    gain = sign * (area - by_chance[grid][i])
                    curves.append(Curve(bootstrap_mean(area, seed), bootstrap_mean(gain, seed)))
                    say(f"{name}: insertion and deletion", (i + 1) / 2)
                again = partial(_maps, explain, images=few, target=few_targets)
                checked = stages(own, again, few, seed, partial(say, f"{name}: sanity check"))
            except VitreousError as error:
                found.append(Measure(name, error=str(error)))
                continue
            pointing, chance = _pointing(maps, boxes, images.shape[2:])
            passes = checked[-1].correlation.value <= bound
            found.append(Measure(name, curves[0], curves[1], pointing, chance, checked, passes))
        return Faithfulness(
            rows=found,
            model=type(model).__name__,
            images=len(images),
            sanity_images=min(sanity_images, len(images)),
            score=called,
            blurred=float(score(blurred, slice(None)).mean()),
            blank=float(score(blank, slice(None)).mean()),
            whole=float(score(images, slice(None)).mean()),
            steps=steps,
            bound=bound,
            seed=seed,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=describe(),
        )


def _checked(
    model: nn.Module, explanations: Any, images: Any, labels: Any, boxes: Any, steps: int
) -> tuple[Tensor, Tensor | None]:
    """The images on the model's device, and the labels; whatever is wrong with any of it."""
    if not explanations:
        raise VitreousError("there is nothing to measure: give at least one explanation")
    if isinstance(images, Tensor) and (images.ndim != 4 or not len(images)):
        raise VitreousError("faithfulness needs images [B, C, H, W], at least one")
    images = calibrate.images(model, images)
    if steps < 1:
        raise VitreousError(f"steps={steps}: must be at least 1")
    labels = None if labels is None else torch.as_tensor(labels)
    for what, value, shape in (("labels", labels, [len(images)]), ("boxes", boxes, [len(images), 4])):
        if value is not None and list(value.shape) != shape:
            raise VitreousError(f"{what} must be {shape} for {len(images)} images, not {list(value.shape)}")
    return images, labels


def _score(
    model: nn.Module, images: Tensor, labels: Tensor | None, multi_label: bool
) -> tuple[Tensor | None, Callable[[Tensor, slice], Tensor], str]:
    """What the explanations are asked for, `[B]` or None, the score `[n]` of changed images at some places of the batch, and
    what it is called."""
    call = caller("model", model)

    def outputs(x: Tensor) -> Tensor:
        return torch.cat([call(part).answer for part in x.split(CHUNK)])

    whole = outputs(images)
    if labels is None and embeds(model, images):
        flat = whole.flatten(1)
        cosine = lambda x, at: torch.cosine_similarity(outputs(x).flatten(1), flat[at])
        return None, cosine, "cosine to the whole image's features"
    if whole.ndim != 2:
        raise VitreousError(f"labels need scores [B, classes]; {type(model).__name__} gives {list(whole.shape)}: leave them out")
    if whole.shape[1] == 1:  # its softmax is 1, whatever is seen
        target, name = torch.zeros(len(images), dtype=torch.long), "probability (sigmoid) of the one class"
    else:
        target = whole.argmax(1) if labels is None else labels.long()
        name = f"probability{' (sigmoid)' if multi_label else ''} of the class"
    if int(target.min()) < 0 or int(target.max()) >= whole.shape[1]:
        raise VitreousError(f"labels must be classes 0 to {whole.shape[1] - 1} of {type(model).__name__}")
    if multi_label or whole.shape[1] == 1:
        return target, lambda x, at: outputs(x).sigmoid().gather(1, target[at, None])[:, 0], name
    return target, lambda x, at: outputs(x).softmax(1).gather(1, target[at, None])[:, 0], name


def _maps(explain: Explain, model: nn.Module, images: Tensor, target: Tensor | None) -> np.ndarray:
    parts, wanted = images.split(CHUNK), [None] * len(images) if target is None else target.split(CHUNK)
    maps = torch.cat([explain(model, x, t).detach().float().cpu() for x, t in zip(parts, wanted, strict=False)]).numpy()
    if maps.ndim != 3 or len(maps) != len(images) or not np.isfinite(maps).all():
        raise VitreousError(f"the explanation gives {list(maps.shape)} for {len(images)} images: it needs finite [B, h, w]")
    return maps


def _blur(images: Tensor) -> Tensor:
    sigma = BLUR * min(images.shape[2:])
    reach = min(int(3 * sigma + 1), min(images.shape[2:]) - 1)
    return gaussian_blur(images, [2 * reach + 1, 2 * reach + 1], [sigma, sigma])


def _orders(maps: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """For each image the patches `[B, n]` by falling importance, and in the random order that also decides between equals."""
    flat = maps.flatten(1)
    chance = torch.rand(flat.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return chance.gather(1, flat.gather(1, chance).argsort(dim=1, descending=True, stable=True)), chance


def _area(
    score: Callable[[Tensor, slice], Tensor], start: Tensor, end: Tensor, order: Tensor, grid: tuple[int, ...], steps: int
) -> np.ndarray:
    """The area `[B]` under the score, 0 to 1, while the patches of `start` become those of `end` in this order."""
    rank = order.argsort(1)
    done = np.unique(np.linspace(0, order.shape[1], steps + 1).round().astype(int))
    areas = []
    for i in range(0, len(start), CHUNK):
        at = slice(i, i + CHUNK)
        scores = []
        for k in done:
            changed = (rank[at] < k).float().unflatten(1, (1, *grid))
            changed = F.interpolate(changed, start.shape[2:], mode="nearest").bool().to(start.device)
            scores.append(score(torch.where(changed, end[at], start[at]), at).cpu().double().numpy())
        areas.append(np.trapezoid(np.stack(scores, 1), done / done[-1], axis=1))
    return np.concatenate(areas)


def _pointing(maps: np.ndarray, boxes: Tensor | None, size: torch.Size) -> tuple[Interval | None, float | None]:
    if boxes is None or not (known := ~boxes.isnan().any(1).cpu().numpy()).any():
        return None, None
    h, w = maps.shape[1:]
    y, x = ((np.arange(n) + 0.5) * side / n for n, side in zip((h, w), size, strict=True))
    left, top, right, bottom = boxes.cpu().numpy()[known].T[:, :, None, None]
    inside = (x >= left) & (x <= right) & (y[:, None] >= top) & (y[:, None] <= bottom)  # [B, h, w]
    strongest = maps[known].reshape(len(inside), -1).argmax(1)
    hits = inside.reshape(len(inside), -1)[np.arange(len(inside)), strongest]
    return wilson(int(hits.sum()), len(hits)), float(inside.mean())


def _table(f: Faithfulness) -> Table:
    points = any(m.pointing for m in f.rows)
    caption = (
        f"{f.images} images of {f.model}; score: {f.score}, {f.whole:.2f} whole, {f.blurred:.2f} blurred, {f.blank:.2f} blank; "
        f"in brackets better than a random order; sanity: rank correlation with all weights random, over {f.sanity_images} "
        f"images, fails above {f.bound:g}; 95 % intervals"
    )
    shown = Table(caption=caption, caption_justify="left")
    for column in ("", "insertion ↑", "deletion ↓", *(["pointing ↑"] if points else []), "sanity"):
        shown.add_column(column, justify="right" if column else "left")
    for m in f.rows:
        if m.error is not None or m.insertion is None or m.deletion is None:
            shown.add_row(m.name, *[""] * (3 if points else 2), f"none: {m.error}")
            continue
        last = m.sanity[-1].correlation
        cells = [_curve(m.insertion), _curve(m.deletion)]
        if points:
            cells.append("–" if m.pointing is None else f"{m.pointing.value:.0%} (chance {m.chance:.0%})")
        shown.add_row(m.name, *cells, f"{last.value:.2f} ({last.low:.2f} – {last.high:.2f}){'' if m.passes else ' FAILS'}")
    return shown


def _curve(c: Curve) -> str:
    return f"{c.area.value:.3f} ({c.gain.value:+.3f}, {c.gain.low:+.3f} to {c.gain.high:+.3f})"
