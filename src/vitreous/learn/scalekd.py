"""ScaleKD: a transformer's features in any student, by attention, in two views, through the teacher's own last stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..data.transform import preparation
from ..errors import VitreousError
from ..score import two
from .maps import as_map, last_stages, probe
from .objective import Batch, Now, Objective, Seen, final, need_teacher, objective, same_classes


class _CrossAttention(nn.Module):
    """Queries `[B, N, C]` attend to student tokens `[B, M, S]`; logits are `sharpness` times the usual ones."""

    def __init__(self, student: int, teacher: int, heads: int, sharpness: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, sharpness * (teacher // heads) ** -0.5
        self.q, self.proj = nn.Linear(teacher, teacher), nn.Linear(teacher, teacher)
        self.k, self.v = nn.Linear(student, teacher), nn.Linear(student, teacher)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (self.q(query), self.k(tokens), self.v(tokens)))
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


class _FFN(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU()), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class CrossAttentionProjector(nn.Module):
    """Section 3.2: student maps `[B, S, h, w]` to tokens `[B, N, C]` at the teacher's places.

    `grid`: the student's h and w. `queries`: the number N of learned ones, or None where `query [B, N, C]` is given. There is no
    residual to the query.
    """

    def __init__(
        self, student: int, teacher: int, grid: tuple[int, int], queries: int | None, heads: int = 8, sharpness: float = 5.0
    ) -> None:
        super().__init__()
        if teacher % heads:
            raise VitreousError(f"ScaleKD: {heads} heads do not divide the teacher's width {teacher}: give heads= that do")
        self.proj_student = nn.Sequential(nn.Conv2d(student, student, 3, padding=1), nn.BatchNorm2d(student), nn.ReLU())
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, student, *grid), std=0.02))
        self.query = nn.Embedding(queries, teacher) if queries else None
        self.proj_pos = nn.Sequential(nn.Conv2d(teacher, teacher, 1), nn.ReLU())
        self.pos_attention = _CrossAttention(student, teacher, heads, sharpness)
        self.norm, self.ffn = nn.LayerNorm(teacher), _FFN(teacher)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        if query is None:
            query = cast(nn.Embedding, self.query).weight.expand(len(x), -1, -1)
        tokens = (self.proj_student(x) + self.pos_embed).flatten(2).mT
        query = self.proj_pos(query.mT[..., None])[..., 0].mT
        return self.ffn(self.norm(self.pos_attention(query, tokens)))


def mimic(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ ‖ŝ − t̂‖² / B over the places of maps `[B, C, h, w]`, each place of unit norm (eq. 4); it grows with the grid."""
    return (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum() / len(student)


def without_dc(x: Tensor) -> Tensor:
    """Maps `[B, C, h, w]` without the DC coefficient of their discrete cosine transform: without their mean over places."""
    return x - x.mean((2, 3), keepdim=True)


@dataclass(frozen=True)
class TeacherEnd:
    """The last stage of a teacher: what enters it (`before`) and its final feature (`after`), names of submodules; and how to run
    it, with frozen weights, on what enters."""

    teacher: nn.Module
    before: str
    after: str
    stage: tuple[str, ...]
    prefix: int

    @staticmethod
    def of(teacher: nn.Module, blocks: int) -> TeacherEnd:
        first, last = last_stages(teacher, "ScaleKD: the teacher")
        found = read(teacher).blocks
        names = [b.name for b in found]
        if last not in names:  # a pyramid
            norm = getattr(teacher, "norm", None)
            tail = ("norm",) if isinstance(norm, nn.Module) and any(True for _ in norm.parameters()) else ()
            return TeacherEnd(teacher, first, (last, *tail)[-1], (last, *tail), 0)
        if not 0 < blocks < len(names):
            raise VitreousError(
                f"ScaleKD: of the teacher's {len(names)} blocks the last {blocks} cannot be its last stage: give last="
            )
        end = final(teacher)
        tail = () if end == names[-1] else (end,)
        return TeacherEnd(teacher, names[-blocks - 1], end, (*names[-blocks:], *tail), read(teacher).prefix)

    def __call__(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Tokens `[B, N, C]` in place of the patches of `like`, what the teacher itself has there, through its last stage."""
        if like.ndim == 4:
            first = like.shape[1] == tokens.shape[2]
            x = tokens.mT.reshape(like.shape) if first else tokens.reshape(like.shape)
        else:
            x = torch.cat([like[:, : self.prefix], tokens], 1)
        for name in self.stage:
            part = self.teacher.get_submodule(name)
            still = {k: v.detach() for k, v in (*part.named_parameters(), *part.named_buffers())}
            x = torch.func.functional_call(part, still, (x,))
        return x


@objective
@dataclass(frozen=True)
class ScaleKD(Objective):
    """Fan et al., "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers" (NeurIPS 2024).

    The maps of the student's last two stages become the teacher's by cross-attention projectors, one for the whole map and one
    for the map without its mean (`alpha`: their weights). What stage 3 gives runs through the frozen last stage of the teacher
    (teacher parameter perception) before it is compared with the teacher's final feature, and is the query of stage 4. Added to
    (1 − λ) cross-entropy and λ cross-entropy to the teacher's answer (`logits`: λ; 0 for a teacher without the classes).

    Teachers: pyramids such as Swin, and plain ViTs, whose `last` blocks stand for a stage. Students: CNNs and other pyramids,
    plain ViTs (three quarters of their blocks stand for stage 3; our choice), or `names`, two submodules of any model. Published
    `heads`: 16 and 24 for CNNs from Swin-L, 8 and 8 for ViTs. `size`: pixels a side of the pictures, where it is not what the
    student expects.
    """

    teacher: nn.Module | None = field(default=None, compare=False)
    alpha: tuple[float, float] = (0.08, 0.06)
    logits: float = 0.5
    heads: tuple[int, int] = (8, 8)
    last: int = 3
    size: int | None = None
    names: tuple[str, str] | None = None

    def layers(self, model: nn.Module) -> tuple[str, str]:
        return self.names or last_stages(model, "ScaleKD: the student")

    def _end(self) -> TeacherEnd:
        return TeacherEnd.of(need_teacher(self.teacher, "ScaleKD"), self.last)

    def parts(self, model: nn.Module) -> nn.Module:
        end, names = self._end(), self.layers(model)
        size = self.size or preparation(model).config["input_size"][-1]
        entering, leaving = (as_map(t, end.prefix) for t in probe(end.teacher, size, (end.before, end.after)))
        third, fourth = (as_map(t, read(model).prefix) for t in probe(model, size, names))

        def two(ours: Tensor, theirs: Tensor, heads: int, own_query: bool) -> nn.ModuleList:
            (_, s, h, w), (_, c, *grid) = ours.shape, theirs.shape
            queries = grid[0] * grid[1] if own_query else None
            return nn.ModuleList(CrossAttentionProjector(s, c, (h, w), queries, heads) for _ in range(2))

        return nn.ModuleList([two(third, entering, self.heads[0], True), two(fourth, leaving, self.heads[1], False)])

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        end, parts = self._end(), cast(list[nn.ModuleList], now.parts)
        theirs = now.teach(end.teacher, batch.images, ("logits",), (), (end.before, end.after))
        entering, target = theirs.layers[end.before], as_map(theirs.layers[end.after], end.prefix).float()
        third, fourth = (as_map(seen.layers[n], read(now.model).prefix) for n in self.layers(now.model))
        terms: dict[str, Tensor] = {}
        for i, (view, alpha) in enumerate(zip(("spatial", "frequency"), self.alpha, strict=True)):
            see = without_dc if view == "frequency" else nn.Identity()
            first = as_map(end(parts[0][i](third), entering), end.prefix)
            second = parts[1][i](fourth, first.flatten(2).mT).mT.view_as(first)
            for stage, ours in ((3, first), (4, second)):
                terms[f"{view} {stage}"] = alpha * mimic(see(ours.float()), see(target))
        if self.logits:
            same_classes(seen.logits, theirs.logits, "ScaleKD")
            terms["kd"] = self.logits * F.cross_entropy(two(seen.logits.float()), two(theirs.logits.float()).softmax(1))
        if batch.labels is not None and self.logits < 1:
            terms["cls"] = (1 - self.logits) * F.cross_entropy(two(seen.logits.float()), batch.one_each)
        return terms
