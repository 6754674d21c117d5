"""Soft labels of crops, stored once; calibrated and mixed within a picture as FerKD does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as pictures

from ..data import Data
from ..data.transform import preparation
from ..errors import VitreousError
from ..files import write_whole
from ..outputs import answer
from ..score import two
from .batches import Pair, seed_everything

Rest = Literal["marginal", "renorm", "smoothing"]


def restored(index: Tensor, value: Tensor, classes: int, rest: Rest = "marginal") -> Tensor:
    """Stored top k, `index` and `value` `[…, k]`, as distributions `[…, classes]`: what is missing from 1 spread over the other
    classes ("marginal"), the k scaled up to 1 ("renorm"), or the first alone and what it misses over all others ("smoothing")."""
    if rest == "smoothing":
        index, value = index[..., :1], value[..., :1]
    if rest == "renorm":
        return torch.zeros(*index.shape[:-1], classes).to(value).scatter(-1, index, value / value.sum(-1, keepdim=True))
    missing = (1 - value.sum(-1, keepdim=True)) / max(classes - index.shape[-1], 1)
    return missing.expand(*index.shape[:-1], classes).scatter(-1, index, value)


@dataclass(frozen=True, repr=False)
class CropLabels:
    """R crops of each of N pictures and what a teacher says of them: `boxes [N, R, 4]`, top, left, height and width in pixels of
    the whole picture; `flips [N, R]`; its k most probable classes, `index` and `value` `[N, R, k]`, of `classes`; `truth [N]`."""

    boxes: Tensor
    flips: Tensor
    index: Tensor
    value: Tensor
    truth: Tensor
    classes: int

    def save(self, path: str | Path) -> None:
        tensors = {k: v.contiguous() for k, v in vars(self).items() if isinstance(v, Tensor)}
        write_whole(path, save(tensors | {"classes": torch.tensor(self.classes)}))

    @staticmethod
    def load(path: str | Path) -> CropLabels:
        """Raises `VitreousError` for a file that holds no such labels."""
        try:
            held = load(Path(path).read_bytes())
            found = CropLabels(classes=int(held.pop("classes")), **held)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise VitreousError(f"cannot read labels of crops from {path} ({error}); `vitreous label` makes them") from None
        return found

    def __repr__(self) -> str:
        n, r = self.flips.shape
        digest = hashlib.sha256(self.value.numpy().tobytes() + self.boxes.numpy().tobytes()).hexdigest()[:12]
        return f"CropLabels({n} pictures, {r} crops, {digest})"


def cut(picture: Any, box: Tensor, flip: bool, size: tuple[int, int], config: Any = None) -> Tensor:
    """A crop of a picture, or of `[C, H, W]`, at `size`; a picture is normalised as `config` says (timm's mean, std …)."""
    top, left, height, width = box.tolist()
    how = InterpolationMode.BILINEAR if config is None else InterpolationMode(config["interpolation"])
    crop: Any = pictures.resized_crop(picture, top, left, height, width, list(size), how, antialias=True)
    crop = pictures.hflip(crop) if flip else crop
    return crop if config is None else pictures.normalize(pictures.to_tensor(crop), config["mean"], config["std"])


def _how(model: nn.Module, data: Data | Pair) -> tuple[tuple[int, int], Any]:
    """The size of what `model` is shown, and how pictures are prepared for it; tensors are prepared."""
    if not isinstance(data, Data):
        h, w = data[0].shape[2:]
        return (h, w), None
    config = preparation(model).config
    return config["input_size"][1:], config


def _truth(data: Data | Pair) -> Tensor:
    labels = data.labels if isinstance(data, Data) else data[1]
    found = torch.empty(0) if labels is None else torch.as_tensor(labels)
    if found.ndim != 1 or not len(found):
        raise VitreousError("FerKD needs pictures of one class each: the labels of uncertain crops are made of it")
    return found.cpu()


def label_crops(
    teacher: nn.Module,
    data: Data | Pair,
    crops: int = 8,
    top: int = 5,
    scale: tuple[float, float] = (0.08, 1.0),
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> CropLabels:
    """Shen & Xing, "A Fast Knowledge Distillation Framework for Visual Recognition" (ECCV 2022): `crops` of each picture, random
    resized crops of an area of `scale` with a flip or none, and the `top` classes that `teacher` sees in each.

    Raises `VitreousError` for a teacher that has not as many classes as the labels, and for data without classes.
    """
    truth, device = _truth(data), next(teacher.parameters()).device
    size, config = _how(teacher, data)
    boxes, flips, index, value = [], [], [], []
    classes = 0
    for i in range(len(truth)):
        picture: Any = data._whole(i) if isinstance(data, Data) else data[0][i]
        seed_everything(seed, i)
        where = [RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(crops)]
        boxes.append(torch.tensor(where, dtype=torch.int32))
        flips.append(torch.rand(crops) < 0.5)
        shown = torch.stack([cut(picture, b, bool(f), size, config) for b, f in zip(boxes[-1], flips[-1], strict=True)])
        with torch.inference_mode():
            p = two(answer(teacher.eval()(shown.to(device))).float()).softmax(1).cpu()
        classes = p.shape[1]
        if int(truth[i]) >= classes:
            raise VitreousError(f"picture {i} is of class {int(truth[i])}, and the teacher knows {classes} classes: give another")
        best = p.topk(min(top, classes), 1)
        value.append(best.values)
        index.append(best.indices)
        if progress is not None:
            progress(f"{i + 1} of {len(truth)} pictures", (i + 1) / len(truth))
    return CropLabels(torch.stack(boxes), torch.stack(flips), torch.stack(index), torch.stack(value), truth, classes)


@dataclass(frozen=True)
class FerKD:
    """Shen, "FerKD: Surgical Label Adaptation for Efficient Distillation" (ICCV 2023), as `train(…, augment=FerKD(labels))`: each
    time a picture is seen, one of its stored crops, and the label that goes with it; cross-entropy learns from it.

    By the teacher's confidence in a crop, its largest probability: below `drop_below` the crop is not shown (hard negatives),
    below `calibrate_below` it is shown with the picture's own class, smoothed by `smoothing` (context), above `drop_above` it is
    not shown (too easy); the others keep the soft label. A picture whose crops are all dropped keeps the most confident. With the
    probability `selfmix` a rectangle of another crop of the same picture is put in, and labels are mixed by area.

    No code of the calibration was released, and the published text that could be had gives no thresholds: those here are ours,
    to be set by what `shares` says. The labels may be a file that `CropLabels.save` or `vitreous label` wrote.
    """

    labels: CropLabels | str
    drop_below: float = 0.15
    calibrate_below: float = 0.3
    drop_above: float = 1.0
    smoothing: float = 0.1
    selfmix: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop_below <= self.calibrate_below <= self.drop_above <= 1:
            raise VitreousError("FerKD: thresholds must rise from 0 to 1: drop_below, calibrate_below, drop_above")
        if isinstance(self.labels, str):
            object.__setattr__(self, "labels", CropLabels.load(self.labels))

    @property
    def held(self) -> CropLabels:
        assert isinstance(self.labels, CropLabels)
        return self.labels

    def shares(self) -> dict[str, float]:
        """Of all crops, the share that is too hard, calibrated, kept, and too easy."""
        sure = self.held.value[..., 0]
        hard, unsure, easy = sure < self.drop_below, sure < self.calibrate_below, sure > self.drop_above
        kinds = {"dropped": hard, "calibrated": unsure & ~hard, "kept": ~unsure & ~easy, "too easy": easy & ~unsure}
        return {name: float(kind.float().mean()) for name, kind in kinds.items()}

    def bound(self, model: nn.Module, data: Data | Pair) -> Labelled:
        """What makes training images of `data` for `model`. Raises `VitreousError` where the labels are of other pictures."""
        if not torch.equal(_truth(data), self.held.truth):
            raise VitreousError(
                f"the labels of crops are of {len(self.held.truth)} other pictures than the {len(_truth(data))} to train on: "
                "make them of the same data, with the same --limit and --seed"
            )
        if (classes := max(2, getattr(model, "num_classes", self.held.classes))) != self.held.classes:  # one logit is two
            raise VitreousError(f"the labels of crops know {self.held.classes} classes and the model {classes}: give the same")
        return Labelled(self, *_how(model, data))


@dataclass(frozen=True)
class Labelled:
    """`FerKD` for one model and one way to prepare its pictures."""

    rule: FerKD
    size: tuple[int, int]
    config: Any = field(repr=False)

    def labelled(self, picture: Any, place: int) -> tuple[Tensor, Tensor]:
        """A training image `[C, H, W]` of picture number `place`, and its label `[K]`, drawn by torch's generator."""
        sure = self.rule.held.value[place, :, 0]
        shown = ((sure >= self.rule.drop_below) & (sure <= self.rule.drop_above)).nonzero()[:, 0]
        shown = shown if len(shown) else sure.argmax()[None]
        image, label = self._crop(picture, place, int(shown[torch.randint(len(shown), ())]))
        if torch.rand(()) < self.rule.selfmix:
            other, its = self._crop(picture, place, int(shown[torch.randint(len(shown), ())]))
            mask = rectangle(*self.size)
            image, share = torch.where(mask.to(image.device), other, image), float(mask.float().mean())
            label = (1 - share) * label + share * its
        return image, label

    def _crop(self, picture: Any, place: int, r: int) -> tuple[Tensor, Tensor]:
        held, rule = self.rule.held, self.rule
        if held.value[place, r, 0] < rule.calibrate_below:
            label = torch.full((held.classes,), rule.smoothing / held.classes)
            label[held.truth[place]] += 1 - rule.smoothing
        else:
            label = restored(held.index[place, r], held.value[place, r], held.classes)
        return cut(picture, held.boxes[place, r], bool(held.flips[place, r]), self.size, self.config), label


def rectangle(height: int, width: int) -> Tensor:
    """A mask `[height, width]` of CutMix: an area drawn uniformly, at a place drawn uniformly, cut off at the border."""
    side = (1 - torch.rand(())).sqrt()
    y, x = torch.randint(height, ()), torch.randint(width, ())
    h, w = (height * side / 2).int(), (width * side / 2).int()
    rows, columns = torch.arange(height), torch.arange(width)
    return ((rows >= y - h) & (rows < y + h))[:, None] & ((columns >= x - w) & (columns < x + w))
