"""The pictures of docs/gallery.md: what DINOv2 ViT-S/14 sees in scikit-image's photographs, drawn by what `vitreous.see` gives.

    python benchmarks/gallery.py --weights dinov2_vits14.safetensors

The photographs may be redistributed (their licences: https://scikit-image.org/docs/stable/api/skimage.data.html). The model has
no classes, so the explanations are of the squared norm of its features. Needs `pip install -e ".[bench,see]" scikit-image`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn

import vitreous as vt
from vitreous.data.transform import preparation
from vitreous.prove.drawing import COLOURS, enlarge, overlay, survival, tokens_left

DOCS = Path(__file__).parent.parent / "docs"
SIZE = 336
PHOTOS = {"chelsea": "A cat", "astronaut": "An astronaut", "coffee": "A cup of coffee", "rocket": "A rocket"}
STEPS = {"EViT, keep 0.7": vt.tokens.EViT(keep=0.7), "ToMe, r = 40": vt.tokens.ToMe(r=40), "MCTF, r = 40": vt.tokens.MCTF(r=40)}


def grid(panels: list[tuple[str, Image.Image]], columns: int, file: Path) -> None:
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.3 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, picture) in zip(axes.flat, panels, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=8)
    figure.savefig(file, dpi=110, facecolor="white", pil_kwargs={"quality": 82})
    plt.close(figure)


def explanations(model: nn.Module, x: Tensor, shown: Image.Image, file: Path) -> None:
    panels = [("the photograph", enlarge(shown))]
    for name, method in vt.see.METHODS.items():
        heat = method(model, x)[0].numpy()
        failed = "\n(fails the sanity check)" if vt.see.warning(name) else ""
        panels.append((name + failed, overlay(shown, heat, (0.0, float(heat.max())))))
    grid(panels, 7, file)


def heads(model: nn.Module, x: Tensor, file: Path) -> None:
    """Where the class token looks, in every head of every layer; each map scaled to its own largest value."""
    with torch.no_grad(), vt.glass(model) as g:
        model(x)
    maps = torch.stack([a[0, :, 0, 1:] for a in g.attention]).numpy()  # [layers, heads, patches]
    side = round(maps.shape[2] ** 0.5)
    figure, axes = plt.subplots(maps.shape[1], maps.shape[0], figsize=(maps.shape[0], maps.shape[1] + 0.3))
    for (head, layer), axis in np.ndenumerate(axes):
        level = maps[layer, head].reshape(side, side)
        axis.imshow(COLOURS[(255 * level / level.max()).astype(int)].astype(np.uint8))
        axis.set(xticks=[], yticks=[])
        if head == 0:
            axis.set_title(f"layer {layer}", fontsize=7)
        if layer == 0:
            axis.set_ylabel(f"head {head}", fontsize=7)
    figure.tight_layout(pad=0.3)
    figure.savefig(file, dpi=110, facecolor="white", pil_kwargs={"quality": 85})
    plt.close(figure)


def tokens(model: nn.Module, x: Tensor, shown: Image.Image, file: Path) -> None:
    panels = []
    for name, step in STEPS.items():
        left = vt.see.survival(vt.slim(model, step), x)
        taken = [left[round(i)] for i in np.linspace(0, len(left) - 1, min(4, len(left)))]
        for layer, groups in taken + [(None, None)] * (4 - len(taken)):
            drawn = Image.new("RGB", (1, 1), "white")
            if groups is not None:
                faded = survival(shown, groups[0])
                drawn = Image.new("RGB", faded.size, "white")
                drawn.paste(faded, mask=faded.getchannel("A"))
            panels.append((f"{name}\n{layer}: {tokens_left(groups[0])} tokens" if layer else "", drawn))
    grid(panels, 4, file)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", type=Path, required=True, help="DINOv2 ViT-S/14 under timm's names")
    p.add_argument("--only", nargs="*", choices=PHOTOS, default=list(PHOTOS))
    a = p.parse_args()
    model = vt.open("vit_small_patch14_dinov2", checkpoint=a.weights, img_size=SIZE)
    prepared, folder = preparation(model), DOCS / "gallery"
    folder.mkdir(exist_ok=True)
    for name in a.only:
        photo = Image.fromarray(getattr(skimage.data, name)())
        x, shown = prepared.to_tensor(photo)[None], prepared.view(photo)
        explanations(model, x, shown, folder / f"{name}-explanations.jpg")
        heads(model, x, folder / f"{name}-heads.jpg")
        tokens(model, x, shown, folder / f"{name}-tokens.jpg")
        print(name, flush=True)
    write()


def write() -> None:
    parts = [
        "# Gallery\n",
        f"What DINOv2 ViT-S/14 sees at {SIZE} × {SIZE} pixels in photographs that come with scikit-image, drawn by",
        "`python benchmarks/gallery.py --weights …`. The model has no classes: the explanations are of the squared norm of its",
        "features.",
        "What the methods are, and which are true: [see.md](see.md).",
    ]
    for name, title in PHOTOS.items():
        if not (DOCS / "gallery" / f"{name}-tokens.jpg").exists():
            continue
        parts += [
            f"\n## {title}\n",
            f"![Explanations of {name}](gallery/{name}-explanations.jpg)\n",
            "Where the class token looks, all heads of all layers:\n",
            f"![All heads on {name}](gallery/{name}-heads.jpg)\n",
            "Tokens dropped (faded) and merged (outlined) through the layers, without any training:\n",
            f"![Tokens left of {name}](gallery/{name}-tokens.jpg)",
        ]
    (DOCS / "gallery.md").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
