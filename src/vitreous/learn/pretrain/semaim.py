"""SemAIM: each patch is predicted from those before it, in an order that begins where the picture's meaning lies."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from ...anatomy import read
from ...errors import VitreousError
from ...models.masked_autoencoder import sine_cosine
from ..objective import Batch, Now, Objective, Seen, final, look, objective, positive
from .cross import CrossBlock
from .encode import shape
from .patches import blurred, normalised, patchify, unpatchify

ORDERS = ("attention", "random", "raster", "centre")


def streams(rank: Tensor) -> tuple[Tensor, Tensor]:
    """What may be seen, `[B, 1, 1 + N, 1 + N]` each, in the content stream (rank_j ≤ rank_i) and the query stream (<), of ranks
    `[B, N]`. The class token sees itself, and is seen by all."""
    later = rank[:, :, None], rank[:, None, :]
    masks = []
    for allowed in (later[1] <= later[0], later[1] < later[0]):
        whole = F.pad(allowed, (1, 0, 1, 0))
        whole[:, :, 0] = True
        masks.append(whole[:, None])
    return masks[0], masks[1]


def nearness(tokens: Tensor) -> Tensor:
    """Softmax over patches of their cosine to the class token, `[B, N]` of `[B, 1 + N, C]`."""
    return F.cosine_similarity(tokens[:, 1:], tokens[:, :1], dim=-1).softmax(-1)


def from_centre(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Distance on the grid to the patch of the most `attention [B, N]`: only where that is counts."""
    centre = attention.argmax(1)
    at = torch.arange(grid[0] * grid[1], device=attention.device)
    rows, columns = at // grid[1] - (centre // grid[1])[:, None], at % grid[1] - (centre % grid[1])[:, None]
    return (rows.square() + columns.square()).float().sqrt()


class QueryStream(nn.Module):
    """Queries that begin as places alone and look at what has been seen, after each of some blocks of the encoder."""

    table: Tensor

    def __init__(self, width: int, heads: int, depth: int, values: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("table", sine_cosine(width, grid), persistent=False)
        self.query_blocks = nn.ModuleList(CrossBlock(width, heads) for _ in range(depth))
        self.prediction_head = Mlp(width, 4 * width, values)


@contextmanager
def masked_attention(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """While open, every block attends only where `mask [B, 1, N, N]` is True. Raises `VitreousError` where blocks take none."""
    handles = []
    for block in read(model).blocks:
        module = model.get_submodule(block.name)
        if "attn_mask" not in inspect.signature(module.forward).parameters:
            raise VitreousError(f"SemAIM masks attention, and {type(module).__name__} takes no mask: choose a plain ViT of timm")
        handles.append(module.register_forward_pre_hook(lambda _, a, k: (a, {**k, "attn_mask": mask}), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@objective
@dataclass(frozen=True)
class SemAIM(Objective):
    """Song, Zhang, Guo, Wang, Chen, Yan, Shen, "Semantic-Aware Autoregressive Image Modeling for Visual Representation Learning"
    (AAAI 2024); no labels, nothing hidden.

    Content tokens attend to those of no higher rank. A second stream of queries, which know only their places, attends to content
    of lower rank after every block and answers with pixels: blurred (Gaussian of 9, σ 1), normalised patch by patch; squared
    error over all patches. order: "attention" ranks by distance to the patch that is nearest to the class token in the network as
    it is (one more pass a step), "centre" by distance to the middle, "random", "raster". depth: query blocks, as many as the
    encoder when None. It costs about four times a step of MAE: twice the blocks, and no token is left out.

    Published recipe: 800 epochs, batch 2048, AdamW (0.9, 0.95), 2 · 10⁻⁴ · batch / 256, decay 0.05, clip 3. The second target of
    the paper, CLIP's tokens, is not built.
    """

    wants = ()
    official: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^(query_blocks|prediction_head)", r"parts.\1"),
        (r"^gaussian_blur.*", ""),
    )
    order: str = "attention"
    depth: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise VitreousError(f"SemAIM: no order '{self.order}': choose {', '.join(ORDERS)}")
        if self.depth is not None:
            positive(self, "depth")

    def parts(self, model: nn.Module) -> nn.Module:
        s, anatomy = shape(model, "SemAIM"), read(model)
        anatomy.require_plain("SemAIM")
        if anatomy.prefix != 1 or not anatomy.class_token:
            raise VitreousError("SemAIM begins at the class token: choose a ViT with one, and no other prefix tokens")
        if not 1 <= (depth := self.depth or len(anatomy.blocks)) <= len(anatomy.blocks):
            raise VitreousError(f"SemAIM: the encoder has {len(anatomy.blocks)} blocks, there cannot be {depth} query blocks")
        heads = anatomy.blocks[0].attention.heads or 1
        return QueryStream(s.width, heads, depth, s.patch[0] * s.patch[1] * s.channels, s.grid)

    @torch.no_grad()
    def rank(self, model: nn.Module, images: Tensor) -> Tensor:
        """`[B, N]`: the lower, the sooner."""
        s = shape(model, "SemAIM")
        n, device = s.grid[0] * s.grid[1], images.device
        if self.order == "random":
            return torch.rand(len(images), n).to(device)
        if self.order == "raster":
            return torch.arange(n, dtype=torch.float32, device=device).expand(len(images), -1)
        if self.order == "centre":
            middle = F.one_hot(torch.tensor(s.grid[0] // 2 * s.grid[1] + s.grid[1] // 2), n).to(device).expand(len(images), -1)
            return from_centre(middle, s.grid) + 1e-3 * torch.rand(len(images), n).to(device)
        training = model.training
        seen = look(model.eval(), images, {"prefix", "patches"})
        model.train(training)
        assert seen.prefix is not None and seen.patches is not None
        attention = nearness(torch.cat([seen.prefix, seen.patches], 1))
        return from_centre(attention, s.grid) + 1e-3 * torch.rand(len(images), n).to(device)

    def predict(self, model: nn.Module, parts: nn.Module, images: Tensor, rank: Tensor) -> Tensor:
        """`[B, 1 + N, values]`, each place from those of lower rank; the first is the class token's."""
        assert isinstance(parts, QueryStream)
        depth = len(read(model).blocks)
        content, query = streams(rank)
        step = depth // len(parts.query_blocks)
        after = [step * (j + 1) - 1 for j in range(len(parts.query_blocks))]
        with masked_attention(model, content):
            seen = look(model, images, (), after).blocks
        g = parts.table.to(images.dtype).expand(len(images), -1, -1)
        for i, block in zip(after, parts.query_blocks, strict=True):
            g = block(g, seen[i], query)
        norm: Any = model.get_submodule(final(model))
        return parts.prediction_head(norm(g) if isinstance(norm, nn.LayerNorm) else g)

    def target(self, model: nn.Module, images: Tensor) -> Tensor:
        return normalised(patchify(blurred(images), shape(model, "SemAIM").patch))

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        assert now.parts is not None
        rank = self.rank(now.model, batch.images)
        pixels = self.predict(now.model, now.parts, batch.images, rank)[:, 1:]
        return {"pixels": (pixels - self.target(now.model, batch.images)).square().mean()}

    def reconstruct(self, model: nn.Module, parts: nn.Module | None, images: Tensor) -> tuple[Tensor, Tensor]:
        """Everything counts as hidden; each patch as it is answered from those before it."""
        assert parts is not None
        s = shape(model, "SemAIM")
        pixels, raw = self.predict(model, parts, images, self.rank(model, images))[:, 1:], patchify(blurred(images), s.patch)
        pixels = pixels * (raw.var(-1, keepdim=True) + 1e-6).sqrt() + raw.mean(-1, keepdim=True)
        return torch.ones_like(images[:, :1], dtype=torch.bool), unpatchify(pixels, s.patch, s.grid)
