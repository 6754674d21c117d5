"""Edge-MoE: a multi-task ViT whose tasks share experts. Sarkar, Liang, Fan, Wang & Hao, "Edge-MoE: Memory-Efficient Multi-Task
Vision Transformer Architecture with Task-level Sparsity via Mixture-of-Experts" (ICCAD 2023).

The paper's is an accelerator for M³ViT (Fan et al., 2022), in C++ for an FPGA. What carries over to any machine is here: the
model, its order of work by experts, its table for GELU, and softmax in one pass (which torch's fused attention does by itself).
Its fixed-point formats and the reordering of attention belong to the circuit. The sizes are those of the official code; the
dense prediction heads of M³ViT are not part of it, and a linear layer on the class token stands in for each task's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..errors import VitreousError
from .official import publish

STEP, ENTRIES, GRAIN = 1 / 32, 177, 2.0**-22  # of the table: its spacing, up to 5.5, and what its entries are multiples of


def gelu_table() -> Tensor:
    """δ(t) = relu(t) − gelu(t) at multiples of `STEP`, `[177]` float64."""
    t = torch.arange(ENTRIES, dtype=torch.float64) * STEP
    return ((t - F.gelu(t)) / GRAIN).round() * GRAIN


class TableGELU(nn.Module):
    """GELU as relu(x) − δ(|x|), δ from a table, linear between its entries; relu where it ends. Off by less than 1e-4."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", gelu_table().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        place = x.abs() / STEP
        left = place.detach().clamp(max=ENTRIES - 2).floor().long()
        table = self.table.to(x.dtype)
        low, high = table[left], table[left + 1]
        between = low + (high - low) * (place - left)
        return F.relu(x) - torch.where(place < ENTRIES - 1, between, torch.zeros_like(between))


def online_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax in one pass over the keys of `[…, N]`: after each key the running maximum and the sum of exp(s − maximum), both
    `[…, N]`. A new maximum scales the sum down; the probabilities are exp(s − maximum[-1]) / sum[-1]."""
    most = scores.cummax(-1).values
    total, sums = torch.zeros_like(scores[..., 0]), []
    for i in range(scores.shape[-1]):
        before = most[..., i - 1] if i else most[..., 0]
        total = total * (before - most[..., i]).exp() + (scores[..., i] - most[..., i]).exp()
        sums.append(total)
    return most, torch.stack(sums, -1)


class TaskExperts(nn.Module):
    """Tokens `[B, N, C]` through the `top` of `experts` that the gate of `task` chooses for each: Σ score · expert(x).

    Scores are the softmax over all experts, not of the chosen alone. Expert by expert: tokens are queued first, so that the
    weights of each expert that is used are read once, and not once a token. Exported and compiled, where a queue has no fixed
    length, every expert sees every token and the scores of the others are zero: the same answer, for experts / top as much work.
    """

    def __init__(self, width: int, tasks: int, experts: int, hidden: int, top: int, act: nn.Module) -> None:
        super().__init__()
        self.top, self.act = top, act
        self.gate = nn.Parameter(torch.empty(tasks, experts, width))
        self.fc1, self.bias1 = nn.Parameter(torch.empty(experts, hidden, width)), nn.Parameter(torch.zeros(experts, hidden))
        self.fc2, self.bias2 = nn.Parameter(torch.empty(experts, width, hidden)), nn.Parameter(torch.zeros(experts, width))
        for p in (self.gate, self.fc1, self.fc2):
            trunc_normal_(p, std=0.02)

    def route(self, x: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the chosen experts of tokens `[T, C]`, both `[T, top]`."""
        found = F.linear(x, self.gate[task]).softmax(-1).topk(self.top)
        return found.values, found.indices

    def expert(self, i: int, x: Tensor) -> Tensor:
        return F.linear(self.act(F.linear(x, self.fc1[i], self.bias1[i])), self.fc2[i], self.bias2[i])

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        tokens = x.flatten(0, 1)
        scores, chosen = self.route(tokens, task)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            weights = torch.zeros_like(tokens[:, :1]).expand(-1, len(self.fc1)).scatter(1, chosen, scores)
            hidden = self.act(torch.einsum("tc,ehc->teh", tokens, self.fc1) + self.bias1)
            each = torch.einsum("teh,ech->tec", hidden, self.fc2) + self.bias2
            return (weights[:, :, None] * each).sum(1).view_as(x)
        y = torch.zeros_like(tokens)
        for i in chosen.unique().tolist():
            queue, place = (chosen == i).nonzero(as_tuple=True)
            y = y.index_add(0, queue, scores[queue, place, None] * self.expert(i, tokens[queue]))
        return y.view_as(x)


class TaskBlock(Block):
    """timm's block, whose MLP is told the task."""

    def forward(self, x: Tensor, task: int = 0, **_: Any) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), task)))


class EdgeMoE(VisionTransformer):
    """Images `[B, C, H, W]` to logits `[B, num_classes]` of one `task` of `tasks`, each with gates and a head of its own.

    Every second block has experts in place of its MLP. tabulated: GELU from the table.
    """

    def __init__(
        self, tasks: int = 2, experts: int = 16, hidden: int = 384, top: int = 2, tabulated: bool = True, **kwargs: Any
    ) -> None:
        if not 1 <= top <= experts or tasks < 1:
            raise VitreousError(f"EdgeMoE: {tasks} tasks, and {top} of {experts} experts: give at least one task, top ≤ experts")
        act = TableGELU if tabulated else nn.GELU
        super().__init__(act_layer=act, **kwargs)
        for block in list(self.blocks)[1::2]:
            block.__class__ = TaskBlock
            block.mlp = TaskExperts(self.embed_dim, tasks, experts, hidden, top, act())
        self.heads = nn.ModuleList(self._head() for _ in range(tasks - 1))

    def _head(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: Any = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.heads = nn.ModuleList(self._head() for _ in self.heads)

    def forward_features(self, x: Tensor, task: int = 0, **_: Any) -> Tensor:
        if not 0 <= task <= len(self.heads):
            raise VitreousError(f"EdgeMoE has tasks 0 to {len(self.heads)}, there is no task {task}")
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            if task and isinstance(block.mlp, TaskExperts) and not isinstance(block, TaskBlock):
                raise VitreousError("the steps that this model went through know its first task alone: slim it for task 0 only")
            x = block(x, task) if isinstance(block, TaskBlock) else block(x)
        return self.norm(x)

    def forward(self, x: Tensor, task: int = 0, **_: Any) -> Tensor:
        features = self.forward_features(x, task)
        return self.forward_head(features) if not task else self.heads[task - 1](self.forward_head(features, pre_logits=True))


@dataclass(frozen=True)
class Traffic:
    """Of one layer of experts: `tokens` that came, experts that were `used`, and bytes of weights read by expert and by token."""

    layer: str
    tokens: int
    used: int
    by_expert: int
    by_token: int


@torch.no_grad()
def weight_traffic(model: nn.Module, images: Tensor, task: int = 0) -> list[Traffic]:
    """What each layer of experts of an `EdgeMoE` reads for a batch of images: counted, for a machine that keeps no weights."""
    found: list[Traffic] = []

    def count(name: str) -> Any:
        def hook(m: TaskExperts, given: tuple[Any, ...]) -> None:
            chosen = m.route(given[0].flatten(0, 1), task)[1]
            size = sum(p[0].nbytes for p in (m.fc1, m.bias1, m.fc2, m.bias2))
            used = len(chosen.unique())
            found.append(Traffic(name, len(chosen), used, used * size, chosen.numel() * size))

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, TaskExperts)]
    if not layers:
        raise VitreousError("this model has no experts whose weights could be counted: give models.EdgeMoE")
    handles = [m.register_forward_pre_hook(count(n)) for n, m in layers]
    try:
        model(images, task) if task else model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


publish(
    EdgeMoE,
    "edge_moe_m3vit",
    dict(img_size=(128, 256), patch_size=16, embed_dim=192, depth=12, num_heads=3, num_classes=10),
    variant="edge-moe--m3vit",
    num_classes=10,
    fixed_input_size=True,
    first_conv="patch_embed.proj",
)
