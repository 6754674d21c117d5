"""The figures of a proof as rows of text, one column a model, for the terminal and for the report alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from .statistics import Interval

if TYPE_CHECKING:
    from .distances import FeatureError
    from .proof import Measured, Proof

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """A figure, and below it its interval or its spread (may be empty)."""

    value: str
    around: str = ""


@dataclass(frozen=True)
class Row:
    label: str
    about: str
    """What the row says, in half a sentence."""
    cells: list[Cell]


def rows(proof: Proof) -> list[Row]:
    """One row a measure, left out where no model has it."""
    models = proof.models
    found = [
        _row("accuracy", "share of images answered rightly", models, lambda m: _percent(m.answers.accuracy)),
        _row("Δ accuracy", "points against the reference, same images", models, lambda m: _points(m.answers.difference)),
        _row("agreement", "same answer as the reference", models, lambda m: _percent(m.answers.agreement)),
        _row("output error", "relative L2 distance from the reference, mean, and the worst image", models, _features),
        _row("neighbours kept", "images whose nearest other image stays the nearest", models, _neighbours),
    ]
    for name in dict.fromkeys(name for m in models for name in m.answers.outputs):
        found.append(_row(f"error of {name}", "mean, and the worst image", models, partial(_output, name)))
    for batch in proof.batches:
        found.append(_row(f"ms / image, b{batch}", f"median at batch {batch}, and quartiles", models, partial(_ms, batch)))
        found.append(_row(f"speed, b{batch}", "times the reference, median of paired rounds", models, partial(_speed, batch)))
    found += [
        _row("parameters", "", models, lambda m: _count(m.cost.parameters)),
        _row("MACs", "multiply-accumulates an image, counted as it ran", models, lambda m: _count(m.cost.macs)),
        _row("in few bits", "share of the multiplications, and how narrow", models, _covered),
        _row("size", "bytes of all weights, or of the shipped file", models, lambda m: _bytes(m.cost.bytes)),
        _row("memory", f"weights and live tensors at batch {max(proof.batches)}", models, lambda m: _bytes(m.cost.memory)),
        _row("drift", "share of the attention that moved elsewhere", models, _drift),
    ]
    return [row for row in found if any(cell.value != MISSING for cell in row.cells)]


def table(proof: Proof) -> Table:
    """The rows for a terminal, intervals dimmed below their figures."""
    shown = Table(caption=Text(caption(proof), justify="left"))
    shown.add_column("")
    for m in proof.models:
        shown.add_column(Text(m.name, overflow="fold"), justify="right")
    for row in rows(proof):
        cells = [Text(c.value) if not c.around else Text.assemble(c.value, "\n", (c.around, "dim")) for c in row.cells]
        shown.add_row(Text(row.label), *cells)
    return shown


def caption(proof: Proof) -> str:
    """Under what circumstances the figures hold, in one line."""
    taken = {len(latency.samples) for m in proof.models for latency in m.latency}
    rounds = f"{min(taken)}–{max(taken)}" if len(taken) > 1 else f"{max(taken, default=0)}"
    timing = f" · {rounds} interleaved rounds" if taken else ""
    threads = f"{proof.threads} thread{'s' if proof.threads != 1 else ''}"
    return f"{proof.images:,} images of {proof.data} · {proof.machine['cpu']}, {threads}{timing} · 95 % intervals" + (
        f"\n{others} No speed can be told." if (others := busy(proof)) else ""
    )


def busy(proof: Proof) -> str:
    """Said when more wanted to run than there are cores, which makes every speed unsure."""
    load, cores = proof.load, int(proof.machine.get("cores") or 1)
    if load is None or load <= 1.25 * cores:
        return ""
    return f"Others used the machine meanwhile: {load:.1f} processes wanted its {cores} core{'s' if cores > 1 else ''}."


def signed(points: float) -> str:
    """A difference of shares in points, with a true minus sign: `-0.3` reads `−0.3`."""
    text = f"{points * 100:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def three(x: float) -> str:
    """`x` with three significant figures, zeros kept: 2 reads `2.00`."""
    return f"{x:#.3g}".rstrip(".") if 1e-4 <= abs(x) < 999.5 else f"{x:,.0f}" if x else "0"


def times(ratio: Interval) -> str:
    """A ratio of speeds, no finer than its interval allows: `3.4`, or `2 to 5` where it is off by more than half."""
    width = ratio.high / ratio.low
    if width > 1.5:
        return f"{_digits(ratio.low, 0.2)} to {_digits(ratio.high, 0.2)}"
    return _digits(ratio.value, width - 1)


def _digits(x: float, uncertainty: float) -> str:
    """`x` with the last digit that an `uncertainty` (a share of it) of less than ten of that digit's units lets stand."""
    places = min(max(-math.floor(math.log10(max(x * uncertainty, 1e-9))), 0), 2)
    return f"{x:,.{places}f}"


def _row(label: str, about: str, models: list[Measured], cell: Callable[[Measured], Cell]) -> Row:
    return Row(label, about, [cell(m) for m in models])


def _percent(share: Interval | None) -> Cell:
    if share is None:
        return Cell(MISSING)
    return Cell(f"{share.value * 100:.1f} %", f"{share.low * 100:.1f} – {share.high * 100:.1f}")


def _points(difference: Interval | None) -> Cell:
    if difference is None:
        return Cell(MISSING)
    return Cell(signed(difference.value), f"{signed(difference.low)} to {signed(difference.high)}")


def _features(m: Measured) -> Cell:
    return _error(m.answers.features)


def _error(f: FeatureError | None) -> Cell:
    return Cell(MISSING) if f is None else Cell(f"{f.mean:.2%}".replace("%", " %"), f"worst {f.worst:.2%}".replace("%", " %"))


def _neighbours(m: Measured) -> Cell:
    return _percent(m.answers.features.neighbours if m.answers.features else None)


def _output(name: str, m: Measured) -> Cell:
    return _error(m.answers.outputs.get(name))


def _covered(m: Measured) -> Cell:
    share, _, left = (m.coverage or "").partition(" of the multiplications")
    return Cell(share, "" if "nothing left" in left else "some left") if left else Cell(MISSING)


def _ms(batch: int, m: Measured) -> Cell:
    if m.simulated:
        return Cell("simulated")
    latency = next(t for t in m.latency if t.batch == batch)
    return Cell(three(latency.median), f"{three(latency.q1)} – {three(latency.q3)}")


def _speed(batch: int, m: Measured) -> Cell:
    ratio = next((t.ratio for t in m.latency if t.batch == batch), None)
    return Cell(MISSING) if ratio is None else Cell(f"{times(ratio)} ×", f"{three(ratio.low)} – {three(ratio.high)}")


def _drift(m: Measured) -> Cell:
    if m.drift is None:
        return Cell(MISSING)
    moved = m.drift.total_variation
    return Cell(f"{moved.value:.1%}".replace("%", " %"), f"{moved.low * 100:.1f} – {moved.high * 100:.1f}")


def _count(n: int | None) -> Cell:
    return Cell(MISSING) if n is None else Cell(_scaled(n, ("", "k", "M", "G", "T")))


def _bytes(n: int | None) -> Cell:
    return Cell(MISSING) if n is None else Cell(_scaled(n, ("B", "kB", "MB", "GB", "TB")))


def _scaled(n: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if n < 999.5:
            return f"{three(n) if unit not in ('', 'B') else round(n)} {unit}".rstrip()
        n /= 1000
    return f"{three(n)} {units[-1]}"
