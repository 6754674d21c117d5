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
        bool, typer.Option(help="MODEL is the folder of a pretraining run: draw what it hides and how it answers")
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
    from ..learn.pretrain.reconstruct import opened
    from ..learn.pretrain.reconstruct import reconstruct as answers
    from ..models.dependencyvit import dependency_tree
    from ..outputs import answer, embeds
    from ..prove.drawing import enlarge, overlay, survival
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
        hidden, answered = answers(model, x)
        panels += [enlarge(p) for p in told(shown, hidden[0], answered[0], prepared.config)]
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
    if not tokens and not tree and not reconstruct and (failed := room.warning(method)):
        print(f"caution: {failed}", file=sys.stderr)


def told(shown: Any, hidden: Any, answered: Any, config: Any) -> list[Any]:
    """A picture with what is hidden greyed, and the answer in its place: `hidden [1, H, W]`, `answered [C, H, W]`, normalised."""
    import numpy as np
    import torch
    from PIL import Image

    mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ("mean", "std"))
    pixels = ((answered.cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    seen, cover = np.asarray(shown.convert("RGB")), hidden[0].cpu().numpy()[..., None]
    pixels = pixels if pixels.shape[2] == 3 else pixels.repeat(3, 2)
    masked, made = np.where(cover, np.uint8(128), seen), np.where(cover, pixels, seen)
    return [Image.fromarray(a.astype(np.uint8)) for a in (masked, made)]


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
