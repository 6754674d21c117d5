"""POA: beside the student a part of it learns too, another one at each step, so that one run gives models of many sizes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...errors import VitreousError
from ..objective import Batch, Now, Objective, Seen, objective, positive, share
from .dino import DINOHead, cross_entropy, follow, koleo, rising, sinkhorn, twin, warm
from .elastic import networks, plain, shrunk, sliced
from .encode import at_size, called_with, hiding, shape
from .masks import blocks
from .views import multi_crop

_TEMPLATES: WeakKeyDictionary[nn.Module, dict[tuple[int, int], VisionTransformer]] = WeakKeyDictionary()


class Told(NamedTuple):
    """Logits of one student and head: of small views `[L, B, K]`, of large ones `[2, B, K]`, of their hidden patches `[M, K]`."""

    local: Tensor
    large: Tensor
    patches: Tensor


def terms(
    intact: Told, elastic: Told | None, classes: Tensor, patches: Tensor, weights: Tensor, mix: float = 0.8
) -> dict[str, Tensor]:
    """What one head's answers cost: `mix` of the intact student's cross-entropy to the teacher's shares (`classes [2, B, K]`, of
    the other large view; `patches [M, K]`, each counted by `weights [M]`) and the rest of the elastic one's; and how far the
    elastic student is from the intact one on the same view. Without an elastic one, all of the intact one's."""
    found: dict[str, Tensor] = {}
    both = ((1.0, intact),) if elastic is None else ((mix, intact), (1 - mix, elastic))
    count = 2 + 2 * len(intact.local)
    found["local"] = sum(
        (w * cross_entropy(s, q).mean() / count for w, told in both for s in told.local for q in classes), classes.new_zeros(())
    )
    found["global"] = sum((w * 2 * cross_entropy(t.large, classes).mean() / count for w, t in both), classes.new_zeros(()))
    found["patches"] = sum((w * (cross_entropy(t.patches, patches) * weights).sum() for w, t in both), classes.new_zeros(()))
    pairs = () if elastic is None else (("local", elastic.local, intact.local), ("global", elastic.large, intact.large))
    for name, ours, theirs in pairs:
        if len(ours):
            found[f"distil_{name}"] = (1 - mix) * cross_entropy(ours, (theirs.detach() / 0.1).softmax(-1)).mean()
    return found


@objective
@dataclass(frozen=True)
class POA(Objective):
    """Zhang, Ren, Wang, Chen, Wang, Yang, "POA: Pre-training Once for Models of All Sizes" (ECCV 2024); no labels; plain ViTs.

    DINOv2 with an intact student and, at each step, an elastic one: the first `width` channels and `depth` of its blocks, small
    ones drawn more often, down to the share `smallest` of the whole. Both learn from the teacher that follows the intact one
    (classes, and with `ibot` after that many epochs hidden patches; shares by Sinkhorn and Knopp), `mix` of the loss for the
    intact one; the elastic one also learns from the intact one on the same view. KoLeo, 0.1, on both. `extract` then takes out a
    model of any of the sizes. `smallest=1` leaves the elastic student out: DINOv2.

    prototypes: one head each; published 8,192 to 65,536. local: small views; published 8. Published: momentum 0.992 to 0.9999,
    layer decay 0.9, 1,200 epochs counting views. Views are drawn from the picture as the model takes it: give `augment="none"`.
    """

    wants = ()
    whole_batch: ClassVar[bool] = True
    prototypes: tuple[int, ...] = (1024, 2048)
    local: int = 4
    mix: float = 0.8
    smallest: float = 0.5
    ibot: float = 30.0
    momentum: float = 0.992

    def __post_init__(self) -> None:
        share(self, "mix", "smallest", "momentum")
        if not self.prototypes or min(self.prototypes) < 2:
            raise VitreousError("POA: give at least one head, of at least two prototypes")
        positive(self, "smallest")

    def parts(self, model: nn.Module) -> nn.Module:
        whole = plain(model)
        if not whole.has_class_token or not isinstance(whole.pos_embed, nn.Parameter):
            raise VitreousError("POA needs a class token, and learned positions")
        heads = nn.ModuleList(DINOHead(whole.embed_dim, k) for k in self.prototypes)
        backbone, teacher = twin(model, heads)
        made = nn.ModuleDict({"heads": heads, "backbone": backbone, "teacher": teacher})
        made.register_parameter("mask_token", nn.Parameter(torch.zeros(1, whole.embed_dim)))
        return made

    def sizes(self, model: nn.Module) -> list[tuple[int, int]]:
        """(width, depth) as often as each is drawn."""
        whole = plain(model)
        attn: Any = whole.blocks[0].attn
        width, step, depth = whole.embed_dim, whole.embed_dim // attn.num_heads, len(whole.blocks)
        least = max(1, round(self.smallest * attn.num_heads)) * step
        found = networks(range(least, width + 1, step), range(max(1, round(self.smallest * depth)), depth + 1))
        return [n for n in found if n != (width, depth)] or [(width, depth)]

    def tokens(self, model: nn.Module, views: Tensor, size: tuple[int, int] | None, mask: Tensor | None, token: Tensor) -> Tensor:
        """`[B, 1 + N, w]` after the final norm, of the whole model or of the part of `size`; `mask [B, N]` hides patches."""
        whole = plain(model)
        if size is None:
            with nullcontext() if mask is None else hiding(whole, mask, token):
                return at_size(whole, VisionTransformer.forward_features, views)
        held = _TEMPLATES.setdefault(model, {})
        if size not in held:
            held[size] = shrunk(whole, *size).to("meta")
            held[size].patch_embed.strict_img_size = False
        part = held[size].train(model.training)
        side = shape(whole, "POA").patch
        tensors = sliced(whole, *size, (views.shape[2] // side[0], views.shape[3] // side[1]))
        with nullcontext() if mask is None else hiding(part, mask, token[:, : size[0]]):
            return called_with(part, tensors, VisionTransformer.forward_features, views)

    def draw(self, grid: tuple[int, int], images: int) -> Tensor:
        """`[images, N]`: half of them hide 10 to 50 % in rectangles, the others nothing."""
        n = grid[0] * grid[1]
        wanted = [round(random.uniform(0.1, 0.5) * n) if i % 2 else 0 for i in range(images)]
        masks = [blocks(grid, count, min(4, max(1, count // 2))).flatten() for count in wanted]
        return torch.stack([masks[i] for i in torch.randperm(images)])

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        parts: Any = now.parts
        model, images = now.model, batch.images
        views = multi_crop(model, images, self.local, "POA")
        prefix = plain(model).num_prefix_tokens
        b, large = len(images), torch.cat(views[:2])
        grid = shape(model, "POA").grid
        mask = torch.zeros(2 * b, grid[0] * grid[1], dtype=torch.bool)
        mask = (self.draw(grid, 2 * b) if now.epoch >= self.ibot else mask).to(images.device)
        weights = (1 / mask.sum(1).clamp_min(1))[:, None].expand_as(mask)[mask] / len(mask)
        temperature = warm(0.04, 0.07, now.epoch, 30)
        with torch.no_grad():
            taught = self.tokens(parts["backbone"], large, None, None, parts.mask_token)
            swapped = torch.cat([taught[b:, 0], taught[:b, 0]])
            hidden = taught[:, prefix:][mask]
            shares = []
            for head in parts["teacher"]:
                patches = sinkhorn(head(hidden), temperature) if len(hidden) else head(hidden)
                shares.append((sinkhorn(head(swapped), temperature).unflatten(0, (2, b)), patches))
        students = []
        drawn = [random.choice(self.sizes(model))] if self.smallest < 1 else []
        for size in (None, *drawn):
            whole = self.tokens(model, large, size, mask if mask.any() else None, parts.mask_token)
            small = [self.tokens(model, v, size, None, parts.mask_token)[:, 0] for v in views[2:]]
            students.append((whole[:, 0], small, whole[:, prefix:][mask]))
        total: dict[str, Tensor] = {}
        for head, (classes, patches) in zip(parts["heads"], shares, strict=True):
            told = [self.told(head, cls, small, hid, b, now.epoch < 1) for cls, small, hid in students]
            for name, term in terms(told[0], told[1] if drawn else None, classes, patches, weights, self.mix).items():
                total[name] = total.get(name, term.new_zeros(())) + term / len(self.prototypes)
        if b > 1:
            crops: Sequence[Tensor] = [c for s in students for c in s[0].unflatten(0, (2, b))]
            total["koleo"] = 0.1 * torch.stack([koleo(c) for c in crops]).sum() / len(students)
        return total

    def told(self, head: Any, cls: Tensor, small: Sequence[Tensor], hidden: Tensor, b: int, frozen: bool) -> Told:
        large = head(cls, frozen).unflatten(0, (2, b))
        local = torch.stack([head(s, frozen) for s in small]) if small else large[:0]
        return Told(local, large, head(hidden, frozen))

    def after_step(self, now: Now) -> None:
        parts: Any = now.parts
        momentum = rising(self.momentum, 0.9999, now.share)
        follow(parts["backbone"], now.model, momentum)
        follow(parts["teacher"], parts["heads"], momentum)
