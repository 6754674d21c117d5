"""VideoMAE V2: the encoder sees a tenth of a clip, the decoder answers for half of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import register_model
from timm.models.beit import Block
from torch import Tensor, nn

from ...errors import VitreousError
from ..objective import Batch, Now, Objective, Seen, objective, positive, share
from .encode import asked
from .masks import running_cell, tube
from .patches import normalised_cubes, over_hidden, patchify


def sinusoid(places: int, width: int) -> Tensor:
    """`[1, places, width]`, sines and cosines in turn, over places in one row."""
    rate = 10000 ** (-2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    angle = torch.arange(places, dtype=torch.float64)[:, None] * rate
    angle[:, 0::2], angle[:, 1::2] = angle[:, 0::2].sin(), angle[:, 1::2].cos()
    return angle[None].float()


class TubeEmbed(nn.Module):
    """Clips `[B, C, T, H, W]` to tokens `[B, N, width]` of cubes, frame groups first."""

    def __init__(self, size: tuple[int, int, int], cube: tuple[int, int, int], channels: int, width: int) -> None:
        super().__init__()
        if any(s % c for s, c in zip(size, cube, strict=True)):
            raise VitreousError(f"clips of {' × '.join(map(str, size))} cannot be cut into cubes of {' × '.join(map(str, cube))}")
        self.size, self.cube, self.grid = size, cube, tuple(s // c for s, c in zip(size, cube, strict=True))
        self.proj = nn.Conv3d(channels, width, cube, cube)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.size:
            wanted, got = (" × ".join(map(str, s)) for s in (self.size, x.shape[2:]))
            raise VitreousError(f"this model takes clips of {wanted} (frames, rows, columns), not {got}")
        return self.proj(x).flatten(2).mT


class VideoViT(nn.Module):
    """The encoder of VideoMAE: a ViT over cubes of `cube` (frames, rows, columns), sinusoidal positions, no class token.

    Called with clips `[B, channels, *size]` it gives the mean of their tokens `[B, width]`, through a head where `num_classes`.
    """

    table: Tensor

    def __init__(
        self,
        size: tuple[int, int, int] = (16, 224, 224),
        cube: tuple[int, int, int] = (2, 16, 16),
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        channels: int = 3,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.patch_embed = TubeEmbed(size, cube, channels, width)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("table", sinusoid(math.prod(self.patch_embed.grid), width), persistent=False)
        self.num_features, self.embed_dim = width, width
        self.reset_classifier(num_classes)
        self.apply(_xavier)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def tokens(self, x: Tensor, shown: Tensor | None = None) -> Tensor:
        """`[B, N, width]` after the final norm; of the places `shown [B, k]` alone."""
        x = self.patch_embed(x)
        x = x + self.table.to(x.dtype)
        if shown is not None:
            x = x.gather(1, shown[:, :, None].expand(-1, -1, x.shape[2]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x).mean(1))


@register_model
def video_vit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The ViT-S of VideoMAE on clips of 16 frames; `size=`, `cube=`, `width=` and the others as `VideoViT`'s."""
    return VideoViT(**asked("video_vit_small", pretrained, kwargs))


def _xavier(m: nn.Module) -> None:
    if isinstance(m, nn.Linear):
        nn.init.xavier_uniform_(m.weight)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


class ClipDecoder(nn.Module):
    """Sees the encoder's tokens and a mask token at each place that it answers for; it never puts them in order."""

    table: Tensor

    def __init__(self, inputs: int, places: int, width: int, depth: int, heads: int, values: int) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise VitreousError(f"a decoder of width {width} cannot have {heads} heads: both they and 2 must divide it")
        self.encoder_to_decoder = nn.Linear(inputs, width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("table", sinusoid(places, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, values)
        self.apply(_xavier)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, tokens: Tensor, shown: Tensor, asked: Tensor) -> Tensor:
        """`[B, a, values]` at the places `asked [B, a]`, of tokens at `shown [B, k]`."""
        x = self.encoder_to_decoder(tokens)
        table = self.table.to(x.dtype)[0]
        x = torch.cat([x + table[shown], self.mask_token + table[asked]], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -asked.shape[1] :]))


@objective
@dataclass(frozen=True)
class VideoMAEv2(Objective):
    """Wang, Huang, Zhao, Tong, He, Wang, Wang, Qiao, "VideoMAE V2: Scaling Video Masked Autoencoders with Dual Masking" (CVPR
    2023); no labels; of a `VideoViT`.

    The same ⌊mask · N⌋ patches are hidden in every frame group. The decoder answers for the places that a running cell leaves
    (`decoder_mask` skipped; 0 for all hidden ones, which is VideoMAE's), those that are visible included, and the loss is over
    what is hidden and decoded: cubes of pixels in [0, 1], normalised by channel. width, depth, heads: of the decoder. Clips are
    taken as normalised by ImageNet's mean and deviation.

    Published recipe of ViT-g: 1200 epochs counting repeats, AdamW (0.9, 0.95), 6 · 10⁻⁴ · batch / 256, clip 0.02.
    """

    wants = ()
    official: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^encoder\.", ""), (r"^decoder\.", "parts."), (r"^(mask_token|encoder_to_decoder)", r"parts.\1"),
    )  # fmt: skip
    crop: ClassVar[tuple[float, float]] = (0.44, 1.0)  # sides of 0.66 and more
    mask: float = 0.9
    decoder_mask: float = 0.5
    width: int = 192
    depth: int = 4
    heads: int = 3

    def __post_init__(self) -> None:
        share(self, "mask", "decoder_mask")
        positive(self, "width", "depth", "heads")

    def parts(self, model: nn.Module) -> nn.Module:
        embed = _clips(model)
        self.draw(embed, 1)
        values = embed.cube[0] * embed.cube[1] * embed.cube[2] * embed.proj.in_channels
        return ClipDecoder(embed.proj.out_channels, math.prod(embed.grid), self.width, self.depth, self.heads, values)

    def draw(self, embed: TubeEmbed, clips: int) -> tuple[Tensor, Tensor]:
        """What is hidden of the encoder and what is decoded, `[B, N]` each."""
        t, h, w = embed.grid
        hidden = torch.stack([tube(t, h * w, self.mask).flatten() for _ in range(clips)])
        if self.decoder_mask == 0:
            return hidden, hidden
        return hidden, torch.stack([~running_cell(t, (h, w), self.decoder_mask).flatten() for _ in range(clips)])

    def predict(self, model: nn.Module, parts: nn.Module, x: Tensor, hidden: Tensor, asked: Tensor) -> Tensor:
        """`[B, a, values]` of the places that `asked [B, N]` marks."""
        assert isinstance(model, VideoViT) and isinstance(parts, ClipDecoder)
        shown, where = ((m.nonzero()[:, 1].view(len(x), -1)) for m in (~hidden, asked))
        return parts(model.tokens(x, shown), shown, where)

    def target(self, model: nn.Module, x: Tensor) -> Tensor:
        """`[B, N, values]`."""
        embed = _clips(model)
        mean, std = (x.new_tensor(c).view(-1, 1, 1, 1) for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        pixels = x * std + mean if x.shape[1] == 3 else x
        return normalised_cubes(patchify(pixels, embed.cube), x.shape[1])

    def loss(self, model: nn.Module, parts: nn.Module, x: Tensor, hidden: Tensor, asked: Tensor) -> Tensor:
        pixels, target = self.predict(model, parts, x, hidden, asked), self.target(model, x)
        error = (pixels - target[asked].view_as(pixels)).square().mean(-1)
        return over_hidden(error, hidden[asked].view_as(error))

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        assert now.parts is not None
        hidden, asked = (m.to(batch.images.device) for m in self.draw(_clips(now.model), len(batch.images)))
        return {"cubes": self.loss(now.model, now.parts, batch.images, hidden, asked)}


def _clips(model: nn.Module) -> TubeEmbed:
    embed: Any = getattr(model, "patch_embed", None)
    if not isinstance(model, VideoViT):
        raise VitreousError(f"VideoMAEv2 learns from clips: give a vt.learn.pretrain.VideoViT, not {type(model).__name__}")
    return embed
