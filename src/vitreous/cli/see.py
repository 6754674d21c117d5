"""`vitreous see IMAGE`: where a model looks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import MODEL, ModelOptions, grouped


@grouped
def see(
    image: Annotated[Path, typer.Argument(help="a picture file")],
    model: MODEL = None,
    *,
    opening: ModelOptions,
    method: Annotated[str, typer.Option(help="one of vitreous.see.METHODS, such as grad_cam or lrp")] = "rollout",
    target: Annotated[int | None, typer.Option(max=2**31, help="class to explain; the predicted one by default")] = None,
    multi_label: Annotated[bool, typer.Option(help="the picture may have several classes: answers by sigmoid")] = False,
    layer: Annotated[str | None, typer.Option(help="for class activation maps: the dotted name of a module")] = None,
    tokens: Annotated[bool, typer.Option(help="draw which tokens survive each reduction instead")] = False,
    tree: Annotated[bool, typer.Option(help="draw the dependency tree of a dependencyvit instead")] = False,
    reconstruct: Annotated[
        bool,
        typer.Option(help="MODEL is a pretraining run's folder: draw what it hides, how it answers, attention before and after"),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="PNG to write; beside the picture by default")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the PNG if it exists")] = False,
) -> None:
    """Explain one picture: the heatmap laid over it, as a PNG."""
    import io

    import torch
    from PIL import Image

    from .. import see as room
    from ..copies.own import run, still
    from ..data.pictures import Unreadable, read_picture
    from ..data.transform import preparation
    from ..errors import VitreousError, nearest
    from ..files import writable, write_whole
    from ..learn.pretrain.reconstruct import before, opened, pixels
    from ..learn.pretrain.reconstruct import reconstruct as answers
    from ..models.dependencyvit import dependency_tree
    from ..outputs import answer, embeds
    from ..prove.drawing import answered, enlarge, overlay, survival
    from ..see.methods import CLASSLESS
    from ..see.patches import refuse_vast
    from ..see.tree import draw_tree

    if method not in room.METHODS:
        raise VitreousError(f"unknown method '{method}'{nearest(method, room.METHODS) or ': choose ' + ', '.join(room.METHODS)}")
    if target is not None and method in CLASSLESS:
        raise VitreousError(f"{method} shows the same whatever the class: leave --target out, or choose another --method")
    if layer is not None and not method.endswith(("cam", "cam_pp")):
        raise VitreousError(f"{method} looks at no layer of your choice: leave --layer out, or use --method grad_cam")
    if tokens + tree + reconstruct > 1:
        raise VitreousError("--tokens, --tree and --reconstruct draw different pictures: choose one")
    drawn = "tokens" if tokens else "tree" if tree else "reconstructed" if reconstruct else method
    if reconstruct and model is None:
        raise VitreousError("--reconstruct needs the folder of a run of vitreous pretrain in MODEL's place")
    try:
        whole = read_picture(image)
    except Unreadable as reason:
        raise VitreousError(f"{image}: {reason}") from None
    file = writable(out or image.with_name(f"{image.stem}.{drawn}.png"), overwrite, "another --out")
    net = opened(model)[0] if reconstruct and model is not None else opening.open(model)
    prepared = preparation(net)
    picture = whole.convert(prepared.mode)
    x, shown = prepared.to_tensor(picture)[None], prepared.view(picture)
    x = x.to(next((p.device for p in net.parameters()), x.device))
    refuse_vast(net, x)
    with torch.no_grad(), still(net) as own:
        logits = answer(run(own, x))
    panels = [enlarge(shown)]
    if tokens:
        maps = room.survival(net, x)
        if not maps:
            raise VitreousError("this model drops and merges no tokens: slim it with a token step first")
        panels += [survival(shown, groups[0]) for _, groups in maps]
    elif reconstruct and model is not None:
        hidden, made = answers(model, x)
        panels += [enlarge(p) for p in answered(shown, hidden[0, 0].cpu().numpy(), pixels(made[0], prepared.config))]
        panels += [overlay(shown, *m) for m in turned(x, before(model), net)]
    elif tree:
        parents = dependency_tree(net, x)[0]
        panels = [p.resize((2 * p.width, 2 * p.height), Image.Resampling.BICUBIC) for p in panels]  # room for the lines
        embed: Any = net.get_submodule("patch_embed")
        panels.append(draw_tree(panels[0], parents, embed.grid_size))
    else:
        chosen = {"layer": layer} if layer else {}
        heat = room.METHODS[method](net, x, target, **chosen)[0].cpu().numpy()
        if not heat.any():
            print(f"caution: {method} finds no place that speaks for it: the map is empty", file=sys.stderr)
        panels.append(overlay(shown, heat, (0.0, float(heat.max()))))
    sheet = Image.new("RGBA", (sum(p.width for p in panels) + 8 * (len(panels) - 1), panels[0].height), "white")
    left = 0
    for p in panels:
        sheet.alpha_composite(p.convert("RGBA"), (left, 0))
        left += p.width + 8
    buffer = io.BytesIO()
    sheet.convert("RGB").save(buffer, "PNG")
    write_whole(file, buffer.getvalue())
    if logits.ndim == 2 and not embeds(net, x):
        print(_said(net, logits[0], multi_label))
    print(f"{drawn} written to {file}")
    if reconstruct:
        last = ", attention before pretraining, and after" if len(panels) > 3 else ""
        print(f"from left to right: the picture, what is hidden of it, how it is answered{last}")
    if not tokens and not tree and not reconstruct and (failed := room.warning(method)):
        print(f"caution: {failed}", file=sys.stderr)


def turned(x: Any, before: Any, after: Any) -> list[Any]:
    """Rollout of an encoder before and after pretraining, each with the scale of both; none where there is nothing to compare."""
    from ..errors import VitreousError
    from ..see import METHODS

    if before is None:
        print("attention before and after: this run kept no encoder from before it", file=sys.stderr)
        return []
    try:
        maps = [METHODS["rollout"](net, x)[0].cpu().numpy() for net in (before, after)]
    except VitreousError as reason:
        print(f"attention before and after: {reason}", file=sys.stderr)
        return []
    return [(m, (0.0, max(float(m.max()) for m in maps))) for m in maps]


def _said(net: Any, logits: Any, multi_label: bool) -> str:
    """The class that is answered, or all that are, each with its probability."""
    shares = logits.sigmoid() if multi_label or len(logits) == 1 else logits.softmax(0)
    yes = (shares > 0.5).nonzero()[:, 0].tolist() if multi_label else []
    told = sorted(yes, key=lambda k: -float(shares[k])) or [int(shares.argmax())]
    return "\n".join(f"{_class(net, k, len(shares))}, probability {float(shares[k]):.3f}" for k in told)


def _class(net: Any, number: int, classes: int) -> str:
    """The name of a class and its number; ImageNet's names for a model of its 1,000 classes that tells none."""
    from timm.data import ImageNetInfo

    from ..store.expects import class_names

    names = class_names(net)
    if not names and classes == 1000:
        return f"{ImageNetInfo().index_to_description(number)} (class {number})"
    return f"{names[number]} (class {number})" if number < len(names) else f"class {number}"
