"""Train the bundled model: a plain timm ViT on Fashion-MNIST.

    python benchmarks/train_bundled.py --out runs/fashion            # starts, or goes on from the last checkpoint
    python benchmarks/train_bundled.py --out runs/fashion --install  # also writes it into the package

Everything random comes from --seed. A checkpoint is written aside and renamed after every epoch, so a killed run
(kill -9 included) goes on from the last whole epoch with the same random numbers. It goes on only under the settings, the data
and the code that it began with.

The model trains with EViT (Liang et al., 2022) in its first block, as that paper does to its models: a share --keep of the
patches stays, which costs 2.6 times less. In the last third of the epochs every second step sees all of them, and pictures are
no longer shifted. Attention starts as in "Mimetic Initialization of Self-Attention Layers" (Trockman & Kolter, 2023), which
small vision transformers need when they are trained from scratch on few pictures; the optimiser is Muon (Jordan et al., 2024).

On two CPU cores, MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 in the environment keeps the C library
from giving memory back after every operator, which saves a quarter of the time.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import io
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, muon

from vitreous import __version__
from vitreous.data.fashion import fashion_arrays
from vitreous.files import write_whole
from vitreous.files.folders import locked
from vitreous.models.bundled import MEAN, STD, WEIGHTS, vit_fashion
from vitreous.tokens import EViT
from vitreous.work import fingerprint

# timm orthogonalises in bfloat16, which processors without it emulate fifty times slower.
muon.zeropower_via_newtonschulz = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)


def augment(x: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
    """Shift each `[B, 1, 28, 28]` picture by up to `shift` pixels and mirror half of them."""
    b, _, h, w = x.shape
    grid = F.pad(x, [shift] * 4, value=float(x.min())).unfold(2, h, 1).unfold(3, w, 1)  # [B, 1, 2s+1, 2s+1, h, w]
    where = torch.randint(0, 2 * shift + 1, (2, b), generator=generator).to(x.device)
    x = grid[torch.arange(b, device=x.device), :, where[0], where[1]]
    flip = (torch.rand(b, generator=generator) < 0.5).to(x.device)
    return torch.where(flip[:, None, None, None], x.flip(-1), x)


@torch.no_grad()
def mimetic(model: VisionTransformer, alpha: float = 0.7, beta: float = 0.7, alpha_v: float = 0.4, beta_v: float = 0.4) -> None:
    """Start with W_q W_kᵀ ≈ αZ + βI in each head, W_v W_proj ≈ αZ − βI, and sinusoidal position embeddings."""
    for block in model.blocks:
        d, heads = block.attn.qkv.in_features, block.attn.num_heads
        k, eye = d // heads, torch.eye(d)
        wq, wk, wv = block.attn.qkv.weight.chunk(3)
        for h in range(heads):
            u, s, v = torch.linalg.svd(alpha * torch.randn(d, d) / d**0.5 + beta * eye)
            rows, root = slice(h * k, (h + 1) * k), s[:k].sqrt()[:, None]
            wq[rows], wk[rows] = root * u[:, :k].T, root * v[:k]
        u, s, v = torch.linalg.svd(alpha_v * torch.randn(d, d) / d**0.5 - beta_v * eye)
        wv.copy_(s.sqrt()[:, None] * v)
        block.attn.proj.weight.copy_(u * s.sqrt())
    side = model.patch_embed.grid_size[0]
    half = model.embed_dim // 4
    angle = torch.arange(side)[:, None] / 100 ** (torch.arange(half) / half)  # [side, half]
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # [side, 2·half]
    grid = torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], 2).flatten(0, 1)
    model.pos_embed[:, 1:] = 0.5 * grid


def shortened(model: VisionTransformer, keep: float) -> VisionTransformer:
    """The same parameters and statistics, not copies of them, behind EViT in the first block."""
    shared = [*model.parameters(), *model.buffers()]
    short = copy.deepcopy(model, {id(t): t for t in shared})
    EViT(keep=keep, at=(0,)).build(short, {})
    return short


def checkpoint(path: Path, **state: object) -> None:
    held = io.BytesIO()
    torch.save(state, held)
    write_whole(path, held.getvalue())


def goes_on(said: dict[str, str], settings: dict[str, str], last: Path) -> None:
    """Stop where the checkpoint was trained by other settings: what comes out would be neither's."""
    if changed := [f"{k}: {said.get(k)} there, {v} now" for k, v in settings.items() if said.get(k) != v]:
        raise SystemExit(f"{last} was trained with other settings ({'; '.join(changed)}): give another --out, or remove it")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/fashion"))
    p.add_argument("--data", type=Path, default=None, help="folder with the four IDX files")
    p.add_argument("--epochs", type=int, default=18)
    p.add_argument("--batch", type=int, default=192)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--decay", type=float, default=0.05)
    p.add_argument("--keep", type=float, default=0.2, help="share of the patches that EViT keeps while training")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--install", action="store_true", help="write the weights into the package when done")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    with locked(a.out.absolute()):
        train(a)


def train(a: argparse.Namespace) -> None:
    torch.manual_seed(a.seed)
    device = torch.device(a.device)
    data = {}
    for split in ("train", "test"):
        images, labels = fashion_arrays(split, a.data)
        x = (torch.from_numpy(images.copy()).float()[:, None] / 255 - MEAN[0]) / STD[0]
        data[split] = x.to(device), torch.from_numpy(labels.copy()).long().to(device)
    x, y = data["train"]
    steps = len(x) // a.batch

    model = vit_fashion()
    mimetic(model)
    model.to(device)
    short = shortened(model, a.keep)
    optimiser = create_optimizer_v2(model, "muon", lr=a.lr, weight_decay=a.decay)
    total, warm = a.epochs * steps, steps // 2
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min(1, (i + 1) / warm) * (1 - min(1, i / total)))
    last = a.out / "last.pt"
    first = 0
    decides = ("epochs", "batch", "lr", "decay", "keep", "seed", "device")
    settings = {k: str(getattr(a, k)) for k in decides} | {
        "data": fingerprint(x, y),
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16],
        "vitreous": __version__,
        "torch": str(torch.__version__),
    }
    if last.exists():
        state = torch.load(last, weights_only=True, map_location=device)
        goes_on(state.get("settings", {}), settings, last)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    log = a.out / "log.jsonl"
    kept = log.read_text().splitlines()[:first] if log.exists() else []

    with Progress() as bar:
        task = bar.add_task("training", total=total, completed=first * steps)
        for epoch in range(first, a.epochs):
            began = time.time()
            g = torch.Generator().manual_seed(a.seed * 100_003 + epoch)
            torch.manual_seed(a.seed * 100_003 + epoch)
            model.train(), short.train()
            late = 3 * epoch >= 2 * a.epochs
            order = torch.randperm(len(x), generator=g).to(device)
            loss_sum = torch.zeros((), device=device)
            for i in range(steps):
                pick = order[i * a.batch : (i + 1) * a.batch]
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    out = (model if late and i % 2 else short)(augment(x[pick], 0 if late else 1, g))
                loss = F.cross_entropy(out.float(), y[pick], label_smoothing=0.05)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                loss_sum += loss.detach()
                bar.update(task, advance=1)
            model.eval(), short.eval()
            accuracy = {}
            for name, way in (("test_accuracy", model), ("test_accuracy_short", short)):
                with torch.inference_mode():
                    batches = zip(*(t.split(500) for t in data["test"]), strict=True)
                    right = sum(int((way(u).argmax(1) == v).sum()) for u, v in batches)
                accuracy[name] = right / len(data["test"][0])
            row = {
                "epoch": epoch + 1,
                "loss": round(float(loss_sum) / steps, 4),
                **accuracy,
                "seconds": round(time.time() - began, 1),
            }
            kept.append(json.dumps(row))
            bar.console.print(kept[-1])
            write_whole(log, "\n".join(kept) + "\n")
            states = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
            checkpoint(last, epoch=epoch + 1, settings=settings, **states)

    half = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in model.state_dict().items()}
    target = a.out / "model.safetensors"
    write_whole(target, save(half))
    if a.install:
        WEIGHTS.parent.mkdir(exist_ok=True)
        write_whole(WEIGHTS, save(half))


if __name__ == "__main__":
    main()
