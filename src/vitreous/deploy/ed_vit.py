"""ED-ViT: a vision transformer as several smaller ones, each for some of the classes, whose features are fused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .. import store
from ..data import Data
from ..errors import VitreousError
from ..files import write_whole
from ..learn import AdamW, heal, train
from ..learn.objective import pooled
from ..prune import Divergence

SMALLER = 0.85  # by which a part that does not fit is pruned further
RATE = 3e-3  # of learning, for the fusion
LEAST = 0.05  # share of a model that is left at least
IMAGES = 128  # of its classes, to prune a part by


class EDViT(nn.Module):
    """Images `[B, C, H, W]` to logits `[B, K]`: each part gives what its classifier would read, a small MLP answers.

    Liu, Song, Li, Sun, Lan, Liu, Jiang & Li, "ED-ViT: Splitting Vision Transformer for Distributed Inference on Edge Devices"
    (2024). classes: of each part, those that it was pruned for.
    """

    def __init__(self, parts: Sequence[nn.Module], classes: Sequence[Sequence[int]], widths: Sequence[int], count: int) -> None:
        super().__init__()
        self.parts, self.classes, self.widths, self.num_classes = nn.ModuleList(parts), [list(c) for c in classes], widths, count
        total = sum(widths)
        self.fusion: nn.Module = nn.Sequential(nn.LayerNorm(total), nn.Linear(total, total), nn.GELU(), nn.Linear(total, count))

    def features(self, i: int, x: Tensor) -> Tensor:
        """What part `i` sends for images `x`: `[B, widths[i]]`."""
        return pooled(self.parts[i], x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion(torch.cat([self.features(i, x) for i in range(len(self.parts))], 1))


def class_sets(classes: int, parts: int) -> list[list[int]]:
    """The classes in `parts` sets, as equal in size as can be, in their order."""
    if not 1 <= parts <= classes:
        raise VitreousError(f"{classes} classes cannot be split among {parts} parts: give 1 to {classes}")
    return [part.tolist() for part in np.array_split(np.arange(classes), parts)]


def size_of(model: nn.Module) -> int:
    return sum(t.nbytes for t in model.state_dict().values())


def assigned(sizes: Sequence[int], memory: Sequence[int]) -> list[int] | None:
    """Which device takes each part: the largest part first, to the device with the most memory left; None where one fits none."""
    left, device = list(memory), [0] * len(sizes)
    for part in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        best = max(range(len(left)), key=lambda d: left[d])
        if left[best] < sizes[part]:
            return None
        device[part] = best
        left[best] -= sizes[part]
    return device


def ed_vit(
    model: nn.Module,
    data: Data,
    parts: int,
    *,
    memory: Sequence[int] | None = None,
    keep: float = 0.5,
    epochs: float = 1.0,
    fusion_epochs: float = 1.0,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> tuple[EDViT, list[int]]:
    """The paper's four steps: split the classes evenly; prune a copy of `model` for each set (`prune.Divergence`), by its images;
    assign the parts to devices; train what fuses them. Gives the whole, and the device of each part.

    data: labelled images to learn from. memory: bytes of each device (None: as many devices as parts, of any size). keep: with
        which a part begins; the largest is pruned further until all of them fit. epochs: of healing each part on the images of
        its classes; fusion_epochs: of training the fusion, on all images, with the parts frozen.

    Raises `VitreousError` without labels, for more parts than classes, and for devices that nothing fits.
    """
    if data.labels is None or data.labels.ndim != 1:
        raise VitreousError("ED-ViT splits by class: give images with one label each")
    sets = class_sets(len(data.classes), parts)
    places = [np.flatnonzero(np.isin(data.labels, classes)) for classes in sets]
    shares = [keep] * parts
    made = [_pruned(model, data, of, share) for of, share in zip(places, shares, strict=True)]
    room = list(memory) if memory is not None else [max(size_of(m) for m in made)] * parts
    while (device := assigned([size_of(m) for m in made], room)) is None:
        largest = max(range(parts), key=lambda i: size_of(made[i]))
        shares[largest] *= SMALLER
        if shares[largest] < LEAST:
            sizes = ", ".join(f"{size_of(m) / 1e6:.2f}" for m in made)
            raise VitreousError(
                f"parts of {sizes} MB fit no devices of {', '.join(f'{m / 1e6:.2f}' for m in room)} MB: give more"
            )
        made[largest] = _pruned(model, data, places[largest], shares[largest])
    for i, of in enumerate(places):
        progress(f"healing part {i + 1} of {parts}", i / parts)
        if epochs:
            batch = max(1, min(64, len(of)))
            made[i] = heal(made[i], model, data.part(of), epochs=epochs, batch=batch, augment="shift", seed=seed)
    x = data.tensor([0])
    widths = [pooled(m, x.to(next(m.parameters()))).shape[-1] for m in made]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = EDViT(made, sets, widths, len(data.classes))
    whole.parts.requires_grad_(False)
    progress("training the fusion", 0.9)
    if fusion_epochs:  # the parts stand still, so that what they send is computed once
        seen = [torch.cat([_send(whole, i, x) for x, _ in data.batches(64)]) for i in range(parts)]
        pair = torch.cat(seen, 1), torch.as_tensor(data.labels)
        rate, batch = AdamW(lr=RATE), max(1, min(32, len(data)))
        whole.fusion = train(whole.fusion, pair, optimiser=rate, epochs=fusion_epochs, batch=batch, augment=None, seed=seed)
    return whole.eval(), device


@torch.no_grad()
def _send(whole: EDViT, i: int, x: Tensor) -> Tensor:
    return whole.features(i, x.to(next(whole.parts[i].parameters()))).float().cpu()


def _pruned(model: nn.Module, data: Data, of: np.ndarray, keep: float) -> nn.Module:
    if not len(of):
        raise VitreousError("a part has classes without any image to prune it by: give images of every class")
    spread = of[np.linspace(0, len(of) - 1, min(IMAGES, len(of))).astype(int)]
    return Divergence(keep=keep).apply(model, data.tensor(spread))


def save_split(whole: EDViT, device: Sequence[int], folder: str | Path) -> None:
    """Each part as a saved model of its own, the fusion, and `split.json`, into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(whole.parts):
        store.save_model(part, folder / f"part{i}.safetensors")
    write_whole(folder / "fusion.safetensors", save(whole.fusion.state_dict()))
    about = {"classes": whole.classes, "widths": list(whole.widths), "outputs": whole.num_classes, "device": list(device)}
    write_whole(folder / "split.json", json.dumps(about))


def open_split(folder: str | Path, base: nn.Module | None = None) -> EDViT:
    """What `save_split` wrote; `base`: the model that was split, where no registry knows it. Raises `VitreousError` for another
    folder, or a broken one."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "split.json").read_text())
        parts = [store.load(folder / f"part{i}.safetensors", base=base) for i in range(len(about["classes"]))]
        whole = EDViT(parts, about["classes"], about["widths"], about["outputs"])
        whole.fusion.load_state_dict(load_file(folder / "fusion.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise VitreousError(f"{folder} holds no model split by ED-ViT: {error}") from None
    return whole.eval()
