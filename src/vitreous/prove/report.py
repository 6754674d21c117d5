"""The report: one HTML file that holds everything it shows and opens without a network."""

from __future__ import annotations

import html
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ..files import write_whole
from .answers import Guess
from .drawing import colour_bar, data_uri, enlarge, overlay, survival, tokens_left
from .drift import as_shares, total_variation
from .proof import Measured, Proof
from .table import caption, rows, signed, three, times
from .verdict import drifted, verdict

CLASSES_SHOWN = 20
CHANGED_LISTED = 200
PICTURED = 12  # images whose prediction changed
STORIES = 3  # pictures shown of attention and of tokens; the others are folded away


@dataclass
class Picture:
    """One image for the report; what is not given is not drawn.

    `before` and `after` are the answers of the reference and of the slimmed model. `attention_*` are heatmaps `[h, w]`
    ≥ 0. `survival` lists `(layer name, groups [h, w] of int)`: -1 for a patch that was dropped or fused away, the same
    number ≥ 0 for patches that became one token.
    """

    image: Image.Image
    title: str
    label: str | None = None
    before: Guess | None = None
    after: Guess | None = None
    attention_before: np.ndarray | None = None
    attention_after: np.ndarray | None = None
    survival: list[tuple[str, np.ndarray]] = field(default_factory=list)


def write_report(
    proof: Proof,
    path: str | Path,
    *,
    title: str,
    recipe: Sequence[str] = (),
    pictures: Sequence[Picture] = (),
    notes: Sequence[str] = (),
    log: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write the report of `proof` to `path`, whole or not at all.

    `recipe` holds a line for each step, `notes` what the reader must know to understand the figures, `log` how the recipe was
    found, `facts` by name what else the measurement depends on. A picture goes into every section that it has something for.
    Raises `VitreousError` when `path` cannot be written.
    """
    from plotly.offline import get_plotlyjs

    said = verdict(proof)
    charts = [_latency_chart(proof, b, said.model) for b in proof.batches] if any(m.latency for m in proof.models) else []
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        files("vitreous.prove").joinpath("report.html.j2").read_text("utf-8")
    )
    text = template.render(
        title=title,
        proof=proof,
        verdict=said,
        tiles=_tiles(proof, said.model),
        rows=rows(proof),
        caption=caption(proof),
        charts=charts,
        plotly=Markup(get_plotlyjs()) if charts else "",
        damage=_first(said.model, [_damage(m) for m in proof.models[1:] if m.answers.classes]),
        moves=_first(said.model, [_moves(m) for m in proof.models[1:] if m.answers.agreement]),
        changed=[_changed(p) for p in sorted(pictures, key=_harm) if _is_changed(p)][:PICTURED],
        attention=[_attention(p) for p in pictures if p.attention_before is not None and p.attention_after is not None],
        drift_missing=[m for m in proof.models if m.drift_missing],
        survival=[_survival(p) for p in pictures if p.survival],
        colour_bar=data_uri(colour_bar()),
        recipe=recipe,
        notes=[note for note in (proof.note, *notes, *_uncounted(proof)) if note],
        log=log,
        facts=facts or {},
        shown=STORIES,
        nonce=secrets.token_urlsafe(16),
    )
    write_whole(path, text)


def _uncounted(proof: Proof) -> list[str]:
    return [f"MACs of {m.name}: {m.cost.uncounted}" for m in proof.models if m.cost.uncounted]


def _tiles(proof: Proof, m: Measured) -> list[dict[str, str]]:
    """The few figures that are worth large type, of the model that the verdict is about."""
    a = m.answers
    tiles = [
        {
            "value": f"{times(t.ratio)} ×",
            "around": f"{three(t.ratio.low)} to {three(t.ratio.high)}",
            "what": f"speed, batch {t.batch}",
        }
        for t in m.latency
        if t.ratio
    ]
    if a.difference:
        d = a.difference
        tiles.append({"value": signed(d.value), "around": f"{signed(d.low)} to {signed(d.high)}", "what": "points of accuracy"})
    elif a.features:
        f = a.features
        tiles.append(
            {"value": f"{f.mean * 100:.1f} %", "around": f"{f.worst * 100:.1f} % at worst", "what": "error of the output"}
        )
        if f.neighbours:
            n = f.neighbours
            around = f"{n.low * 100:.1f} to {n.high * 100:.1f}"
            tiles.append({"value": f"{n.value * 100:.1f} %", "around": around, "what": "nearest neighbours kept"})
    if a.agreement:
        s = a.agreement
        tiles.append(
            {
                "value": f"{s.value * 100:.1f} %",
                "around": f"{s.low * 100:.1f} to {s.high * 100:.1f}",
                "what": "same answers",
            }
        )
    looked = drifted(proof, m)
    if looked and looked.drift:
        t = looked.drift.total_variation
        tiles.append(
            {
                "value": f"{t.value * 100:.1f} %",
                "around": f"{t.low * 100:.1f} to {t.high * 100:.1f}",
                "what": "attention drift" + (f", {looked.name}" if looked is not m else ""),
            }
        )
    return tiles


def _latency_chart(proof: Proof, batch: int, focus: Measured) -> dict[str, Any]:
    """One box a model, every sample a point. Stray slow samples must not squeeze the boxes: cut off and counted."""
    timed = {m.name: next(t for t in m.latency if t.batch == batch) for m in proof.models if m.latency}
    edge = 1.1 * max(float(np.percentile(t.samples, 95)) for t in timed.values())
    beyond = sum(sample > edge for t in timed.values() for sample in t.samples)
    boxes = [
        {
            "type": "box", "orientation": "h", "x": t.samples, "name": html.escape(name), "boxpoints": "all",
            "jitter": 0.6, "pointpos": 0, "marker": {"size": 3, "opacity": 0.5}, "line": {"width": 1.5},
            "hovertemplate": "%{x:.3g} ms<extra></extra>", "meta": {"focus": name == focus.name},
        }
        for name, t in timed.items()
    ]  # fmt: skip
    layout = {
        "height": 90 + 58 * len(boxes), "margin": {"l": 10, "r": 10, "t": 8, "b": 44}, "showlegend": False,
        "xaxis": {"range": [0, edge], "title": {"text": "ms per image"}, "zeroline": False, "automargin": True},
        "yaxis": {"autorange": "reversed", "automargin": True, "zeroline": False},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "dragmode": False,
    }  # fmt: skip
    return {
        "title": f"Batch {batch}",
        "beyond": beyond,
        "samples": sum(len(t.samples) for t in timed.values()),
        "alt": f"Milliseconds an image at batch {batch}. Medians: "
        + ", ".join(f"{name} {t.median:.3g}" for name, t in timed.items()),
        "figure": {"data": boxes, "layout": layout},
    }


def _first(focus: Measured, sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(sections, key=lambda s: s["name"] != focus.name)


def _damage(m: Measured) -> dict[str, Any]:
    """The classes of one model, the worst and the best when there are many; bar lengths as shares of the longest."""
    classes = m.answers.classes
    shown = classes if len(classes) <= CLASSES_SHOWN else classes[: CLASSES_SHOWN - 5] + classes[-5:]
    longest = max(abs(c.difference) for c in classes) or 1.0
    bars = [
        {
            "c": c,
            "points": signed(c.difference),
            "bar": f"{abs(c.difference) / longest * 50:.1f}",
            "loss": c.difference < 0,
        }
        for c in shown
    ]
    return {"name": m.name, "bars": bars, "left_out": len(classes) - len(shown)}


def _moves(m: Measured) -> dict[str, Any]:
    changed = m.answers.changed
    return {
        "name": m.name,
        "n": len(changed),
        "listed": changed[:CHANGED_LISTED],
        "left_out": max(0, len(changed) - CHANGED_LISTED),
    }


def _is_changed(p: Picture) -> bool:
    return p.before is not None and p.after is not None and p.before.name != p.after.name


def _harm(p: Picture) -> int:
    """0 for a picture that is wrong now, 1 for one that is right now, 2 for the rest."""
    if p.label is None or p.before is None or p.after is None:
        return 2
    return 0 if p.label == p.before.name else 1 if p.label == p.after.name else 2


def _changed(p: Picture) -> dict[str, Any]:
    what = ("now wrong", "now right", "changed" if p.label is None else "still wrong")[_harm(p)]
    return {"p": p, "what": what, "tone": ("bad", "good", "even")[_harm(p)], "image": data_uri(enlarge(p.image))}


def _attention(p: Picture) -> dict[str, Any]:
    assert p.attention_before is not None and p.attention_after is not None
    before, after = as_shares(np.stack([p.attention_before]))[0], as_shares(np.stack([p.attention_after]))[0]
    scale = (float(min(before.min(), after.min())), float(max(before.max(), after.max())))
    moved = float(total_variation(before[None], after[None])[0]) if before.shape == after.shape else None
    return {
        "p": p,
        "image": data_uri(enlarge(p.image)),
        "before": data_uri(overlay(p.image, before, scale)),
        "after": data_uri(overlay(p.image, after, scale)),
        "moved": None if moved is None else f"{moved * 100:.1f} %",
        "least": f"{scale[0] * 100:.1f} %",
        "most": f"{scale[1] * 100:.1f} %",
    }


def _survival(p: Picture) -> dict[str, Any]:
    layers = [
        {"name": name, "left": tokens_left(groups), "of": groups.size, "image": data_uri(survival(p.image, groups))}
        for name, groups in p.survival
    ]
    return {"p": p, "image": data_uri(enlarge(p.image)), "layers": layers}
