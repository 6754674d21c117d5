"""The proof in a sentence: what was gained, and what was lost."""

from __future__ import annotations

from dataclasses import dataclass

from .proof import Measured, Proof
from .statistics import Interval
from .table import busy, signed, three, times


@dataclass(frozen=True)
class Verdict:
    """`headline`, a line; `sentences`, the same with intervals; `model`, the one that both are about."""

    headline: str
    sentences: list[str]
    model: Measured


def focus(proof: Proof) -> Measured:
    """The model that the proof is about: the fastest at the largest batch, or the last when none was timed."""
    others = proof.models[1:] or proof.models
    timed = [m for m in others if m.latency and m.latency[-1].ratio]
    return max(timed, key=lambda m: m.latency[-1].ratio.value) if timed else others[-1]  # pyright: ignore[reportOptionalMemberAccess]


def drifted(proof: Proof, m: Measured) -> Measured | None:
    """`m` if its attention could be compared, or else the last model whose could: a shipped file came from one."""
    return m if m.drift else next((other for other in reversed(proof.models) if other.drift), None)


def verdict(proof: Proof) -> Verdict:
    """What `focus(proof)` gained and lost against the reference."""
    m, reference = focus(proof), proof.models[0]
    if m is reference:
        return Verdict(f"{m.name}, measured alone", ["Give a second model to compare it with."], m)
    short: list[str] = []
    long: list[str] = []
    speeds = [(t.batch, t.ratio) for t in m.latency if t.ratio]
    if speeds:
        short.append("speed cannot be told on this busy machine" if busy(proof) else _speed([r for _, r in speeds]))
        each = ", ".join(f"{times(r)} ({three(r.low)} to {three(r.high)}) times at batch {b}" for b, r in speeds)
        long.append(f"Against “{reference.name}”, the speed of “{m.name}” is {each}.")
        if others := busy(proof):
            long.append(others)
    elif m.simulated:
        short.append("speed not shown")
        long.append(f"“{m.name}” simulates its arithmetic ({m.simulated}), so it has no speed.")
    short += _accuracy(m, proof.images, long)
    if m.cost.bytes and reference.cost.bytes:
        smaller = reference.cost.bytes / m.cost.bytes
        if abs(smaller - 1) > 0.02:
            long.append(f"Its weights take {1 / smaller:.0%} of the bytes.".replace("%", " %"))
    looked = drifted(proof, m)
    if looked and looked.drift:
        moved = looked.drift.total_variation
        whose = "its attention" if looked is m else f"the attention of “{looked.name}”"
        long.append(f"{moved.value * 100:.1f} % of {whose} moved elsewhere ({moved.low * 100:.1f} to {moved.high * 100:.1f}).")
    return Verdict(", ".join(short), long, m)


def _speed(ratios: list[Interval]) -> str:
    """In a few words, and no more exact than the intervals are."""
    if any(r.high > 1.5 * r.low for r in ratios):
        low, high = min(r.low for r in ratios), max(r.high for r in ratios)
        if low <= 1 <= high:
            return "speed cannot be told on this busy machine"
        return f"{_rough(low)} to {_rough(high)} times the speed, on a busy machine"
    if all(r.low <= 1 <= r.high for r in ratios):
        return "as fast, as far as can be told"
    values = sorted({times(r) for r in ratios}, key=float)
    return f"{' to '.join([values[0], values[-1]][: len(values)])} times the speed"


def _rough(x: float) -> str:
    return f"{x:.0f}" if x >= 3 else f"{x:.1f}"


def _accuracy(m: Measured, images: int, long: list[str]) -> list[str]:
    a = m.answers
    if a.difference is not None and a.accuracy is not None:
        d = a.difference
        points = "point" if signed(d.value).strip("+−") == "1.0" else "points"
        if d.low > 0:
            meaning = "a real gain"
        elif d.high < 0:
            meaning = "a real loss"
        else:
            meaning = f"which {images:,} images cannot tell from no change"
        long.append(
            f"Its accuracy is {a.accuracy.value * 100:.1f} %, {signed(d.value)} {points} "
            f"({signed(d.low)} to {signed(d.high)}), {meaning}: {a.lost} answers were lost and {a.gained} gained."
        )
        return [f"accuracy {signed(d.value)} {points}"]
    if a.features is not None and a.agreement is None:
        error = f"{a.features.mean * 100:.1f} %"
        long.append(f"Its outputs differ by {error} on average and by {a.features.worst * 100:.1f} % at worst.")
        if n := a.features.neighbours:
            long.append(
                f"For {n.value * 100:.1f} % of the images ({n.low * 100:.1f} to {n.high * 100:.1f}) the nearest of the others "
                "stays the nearest."
            )
            return [f"nearest neighbour kept for {n.value * 100:.1f} %"]
        return [f"outputs {error} away"]
    if a.agreement is not None:
        s = a.agreement
        long.append(
            f"It gives the same answer for {s.value * 100:.1f} % of the images ({s.low * 100:.1f} to {s.high * 100:.1f})."
        )
        return [f"same answer for {s.value * 100:.1f} %"]
    return []
