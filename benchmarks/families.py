"""What works on which family of models: each cell is tried, on a small instance with random weights, nothing downloaded.

    python benchmarks/families.py --out docs/results/families.json    # tries the cells, prints the table
    python benchmarks/families.py --table docs/results/families.json  # prints it again

A cell is yes, or the reason that the user is given, in the table its kind alone. glass: attention of every layer. explain:
rollout, Grad-CAM, LRP, occlusion. tokens: EViT(keep=0.5). quantize: RepQ(), 8 bits. heads: importance of every head. ship: ONNX,
checked against the model.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import timm
from families import FAMILIES, timm_model
from small_models import SMALL
from test_own_models import Encoder, Unnamed

import vitreous as vt
from vitreous.prove.machine import describe

SECONDS = 300  # for a cell, however busy the machine is
EXPLAINED = ("rollout", "grad_cam", "lrp", "occlusion")
PYRAMID = dict(img_size=64, num_classes=7)
# timm's families beside those that the tests have, and of our own one of each kind
MORE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "hand-written, TransformerEncoder": (lambda: Encoder().eval(), 32),
    "hand-written, tokens before images": (lambda: Encoder(batch_first=False).eval(), 32),
    "hand-written, class token last": (lambda: Encoder(first=False).eval(), 32),
    "hand-written, attention of any name": (lambda: Unnamed().eval(), 32),
    "hand-written, keys shared by heads": (lambda: Unnamed(kv=2).eval(), 32),
    "timm ViT": (lambda: timm_model("vit_tiny_patch16_224"), 32),
    "timm DeiT": (lambda: timm_model("deit_tiny_patch16_224"), 32),
    "timm DeiT, distilled": (lambda: timm_model("deit_tiny_distilled_patch16_224"), 32),
    "timm DeiT III": (lambda: timm_model("deit3_small_patch16_224"), 32),
    "timm DINOv2": (lambda: timm_model("vit_small_patch14_dinov2", num_classes=0), 32),
    "timm DINOv2, registers": (lambda: timm_model("vit_small_patch14_reg4_dinov2", num_classes=0), 32),
    "timm CLIP": (lambda: timm_model("vit_base_patch16_clip_224"), 32),
    "timm SigLIP": (lambda: timm_model("vit_base_patch16_siglip_224"), 32),
    "timm CaiT": (lambda: timm_model("cait_xxs24_224"), 32),
    "timm XCiT": (lambda: timm_model("xcit_nano_12_p16_224"), 32),
    "timm Swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 2), num_heads=(2, 4),
                                            window_size=4, **PYRAMID).eval(), 64),
    "timm Swin v2": (lambda: timm.create_model("swinv2_tiny_window8_256", embed_dim=24, depths=(2, 2), num_heads=(2, 4),
                                               window_size=4, **PYRAMID).eval(), 64),
    "timm PVT v2": (lambda: timm.create_model("pvt_v2_b0", num_classes=7).eval(), 64),
    "timm LeViT": (lambda: timm.create_model("levit_128s", num_classes=7).eval(), 224),
    "timm ConvNeXt": (lambda: timm.create_model("convnext_atto", num_classes=7).eval(), 64),
}  # fmt: skip
OURS = ("pvt", "cvt", "crossformer", "smt", "litv2", "moh", "t2t-vit", "van", "hornet", "msvmamba", "crate", "dhvt", "illama")


def families() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    return (
        {name: (family.make, 32) for name, family in FAMILIES.items()}
        | MORE
        | {f"own {name}": (SMALL[name].make, SMALL[name].side) for name in OURS}
    )


def explained(model: nn.Module, x: Tensor) -> str:
    refused = {}
    for name in EXPLAINED:
        try:
            heat = vt.see.METHODS[name](model, x)
            if not torch.isfinite(heat).all() or heat.std() == 0:
                raise vt.VitreousError("all of its map is negative here, and cut")
        except vt.VitreousError as error:
            refused[name] = str(error)
    if len(refused) == len(EXPLAINED):
        return refused["rollout"]
    return f"all but {', '.join(refused)}: {next(iter(refused.values()))}" if refused else "yes"


def seen(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad(), vt.glass(model) as g:
        model(x)
    if not len(g.attention):
        raise vt.VitreousError("it has no attention")


def shipped(model: nn.Module, x: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        vt.ship(model, Path(folder) / "m.onnx", example=x)


CELLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "glass": seen,
    "explain": explained,
    "tokens": lambda model, x: vt.slim(model, vt.tokens.EViT(keep=0.5))(x),
    "quantize": lambda model, x: vt.slim(model, vt.quant.RepQ(), calibration=x)(x),
    "heads": lambda model, x: vt.see.head_importance(model, x),
    "ship": shipped,
}


def tried(make: Callable[[], nn.Module], side: int) -> dict[str, str]:
    """Cell to "yes" or the reason."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done in {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = {}
    for cell, attempt in CELLS.items():
        signal.alarm(SECONDS)
        try:
            told = attempt(make(), x)
            found[cell] = told if isinstance(told, str) else "yes"
        except vt.VitreousError as error:
            found[cell] = str(error)
        except BaseException as error:  # a fault of ours, and shown as one
            found[cell] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        finally:
            signal.alarm(0)
    return found


SHORT = (  # what a reason says beside its kind
    (r"\. Use a step .*| \(windows, pooling.*|: (use|choose) .*", ""),
    (r" \(\w*Error: .*", ""),
    (r"\w+'s '[\w.]+' \(\w+\)", "a block"),
    (r"layer '[\w.]+' of \w+ attends .*", "a layer attends to other than all of them"),
    (r"^[A-Z]\w+ attends", "it attends"),
    (r", and [A-Z]\w+ (tells|has|needs)", r", and it \1"),
    (r"its \w*At\w*n computes", "its attention computes"),
)


def kind(reason: str) -> str:
    for pattern, short in SHORT:
        reason = re.sub(pattern, short, reason)
    return reason


def table(result: dict[str, Any]) -> str:
    reasons: dict[str, int] = {}
    lines = ["| family | " + " | ".join(CELLS) + " |", "|---|" + "---|" * len(CELLS)]
    for name, cells in result["families"].items():
        told = []
        for cell in CELLS:
            answer = cells[cell]
            if answer != "yes":
                number = reasons.setdefault(kind(answer), len(reasons) + 1)
                answer = f"{'in part' if answer.startswith('all but') else 'no'} ({number})"
            told.append(answer)
        lines.append(f"| {name} | " + " | ".join(told) + " |")
    return "\n".join([*lines, "", *(f"{n}. {reason}" for reason, n in reasons.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", default="", help="families whose names hold this; others stay as they were in --out")
    asked = parser.parse_args()
    if asked.table:
        print(table(json.loads(asked.table.read_text())))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe(), "families": {}}
    if asked.out and asked.out.exists():
        result["families"] = json.loads(asked.out.read_text())["families"]
    for name, (make, side) in families().items():
        if asked.only in name:
            result["families"][name] = tried(make, side)
            print(name, result["families"][name], file=sys.stderr, flush=True)
            if asked.out:
                asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
