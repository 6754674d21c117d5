"""Uni4Eye: one masked autoencoder for pictures and volumes, whose second decoder answers with edges."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...errors import VitreousError
from ...models.masked_autoencoder import masked_order, sine_cosine
from ..objective import Batch, Now, Objective, Seen, objective, positive, share
from .beside import array_of
from .encode import asked
from .patches import gradients, over_hidden, patchify

norm: Any = partial(nn.LayerNorm, eps=1e-6)


def sine_cosine_3d(width: int, grid: tuple[int, int, int]) -> Tensor:
    """`[1, 1 + N, width]`: a third of the channels for each axis, zeros for what is left and for the class token."""
    part = width // 6
    rate = 10000.0 ** -(torch.arange(part, dtype=torch.float64) / max(part, 1))
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    waves = [f(p.reshape(-1, 1) * rate) for p in places for f in (torch.sin, torch.cos)]
    return nn.functional.pad(torch.cat(waves, 1), (0, width - 6 * part, 1, 0))[None].float()


class UnifiedEmbed(nn.Module):
    """`[B, C, H, W]` by one convolution, `[B, C', H, W, D]` by another, to tokens `[B, N, width]` in the order of the axes."""

    def __init__(self, patch: int, slices: int, channels: tuple[int, int], width: int) -> None:
        super().__init__()
        self.proj2 = nn.Conv2d(channels[0], width, patch, patch)
        self.proj3 = nn.Conv3d(channels[1], width, (patch, patch, slices), (patch, patch, slices))

    def forward(self, x: Tensor) -> Tensor:
        proj: Any = self.proj2 if x.ndim == 4 else self.proj3
        if x.shape[1] != proj.in_channels or any(s % k for s, k in zip(x.shape[2:], proj.kernel_size, strict=True)):
            raise VitreousError(
                f"inputs of {' × '.join(map(str, x.shape[1:]))} do not fit {proj.in_channels} channels and patches of "
                f"{' × '.join(map(str, proj.kernel_size))}"
            )
        return proj(x).flatten(2).mT


class UnifiedViT(nn.Module):
    """A ViT for pictures of `size` and volumes of `volume` (rows, columns, slices): its own embedding and positions for each,
    and the same blocks. Called with either it gives the class token `[B, width]`,
    through a head where `num_classes`.

    slices: of a 3-D patch; with 3 it has as many values as a patch of an RGB picture, so that both losses weigh alike.
    positions3: sines and cosines for volumes; the released code leaves zeros there.
    """

    def __init__(
        self,
        size: int = 224,
        volume: tuple[int, int, int] = (224, 224, 12),
        patch: int = 16,
        slices: int = 3,
        channels: tuple[int, int] = (3, 1),
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        positions3: bool = True,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.patch, self.slices, self.positions3 = patch, slices, positions3
        self.pretrained_cfg = {"input_size": (channels[0], size, size), "crop_pct": 1.0}  # of pictures, normalised as ImageNet's
        self.patch_embed = UnifiedEmbed(patch, slices, channels, width)
        self.grids: dict[int, tuple[int, ...]] = {
            4: (size // patch, size // patch), 5: (volume[0] // patch, volume[1] // patch, volume[2] // slices),
        }  # fmt: skip
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm, self.num_features, self.embed_dim = norm(width), width, width
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def table(self, axes: int, width: int) -> Tensor:
        """Positions `[1, 1 + N, width]` for inputs of so many axes."""
        grid: Any = self.grids[axes]
        return sine_cosine(width, grid) if axes == 4 else sine_cosine_3d(width, grid) * self.positions3

    def tokens(self, x: Tensor, shown: Tensor | None = None) -> Tensor:
        """`[B, 1 + N, width]`, of the patches `shown [B, k]` alone."""
        axes, table = x.ndim, self.table(x.ndim, self.embed_dim).to(x)
        x = self.patch_embed(x)
        if x.shape[1] != table.shape[1] - 1:
            raise VitreousError(f"this model takes {' × '.join(map(str, self.grids[axes]))} patches, not {x.shape[1]}")
        x = x + table[:, 1:]
        if shown is not None:
            x = x.gather(1, shown[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([(self.cls_token + table[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x)[:, 0])


@register_model
def unified_vit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A ViT-S for pictures and volumes; `volume=`, `slices=`, `width=` and the others as `UnifiedViT`'s."""
    return UnifiedViT(**asked("unified_vit_small", pretrained, kwargs))


class Decoder(nn.Module):
    """One of two decoders of the same shape: blocks shared by pictures and volumes, a last layer for each."""

    def __init__(self, inputs: int, width: int, depth: int, heads: int, values: tuple[int, int]) -> None:
        super().__init__()
        self.embed, self.mask_token = nn.Linear(inputs, width), nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm, self.pred2, self.pred3 = norm(width), nn.Linear(width, values[0]), nn.Linear(width, values[1])

    def forward(self, tokens: Tensor, place: Tensor, table: Tensor, volume: bool) -> Tensor:
        x = self.embed(tokens)
        hidden = self.mask_token.expand(len(x), 1 + place.shape[1] - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], 1).gather(1, place[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], 1) + table
        for block in self.blocks:
            x = block(x)
        return (self.pred3 if volume else self.pred2)(self.norm(x)[:, 1:])


def edges(x: Tensor) -> Tensor:
    """Gradient maps of pictures normalised as ImageNet's (or of other channels, in [0, 1]) and of the slices of volumes in
    [0, 1]; in [0, 1] too."""
    if x.ndim == 5:
        b, c, h, w, d = x.shape
        flat = x.permute(0, 4, 1, 2, 3).reshape(b * d, c, h, w)
        return (gradients(255 * flat) / 255).view(b, d, c, h, w).permute(0, 2, 3, 4, 1)
    if x.shape[1] == 3:
        mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        x = x * std + mean
    return gradients(255 * x) / 255


@objective
@dataclass(frozen=True)
class Uni4Eye(Objective):
    """Cai, Lyu, He, Meng, Zhang, Tang, Zhao, Liu, "Uni4Eye: Unified 2D and 3D Self-supervised Pre-training via Masked Image
    Modeling Transformer for Ophthalmic Image Classification" (MICCAI 2022); no labels; of a `UnifiedViT`.

    MAE with `mask` hidden and two decoders: one answers with the picture, one with its gradient map, squared errors added alike.
    volumes: a `.npy` file `[M, C', H, W, D]`; every other epoch, the first one too, then takes batch / 8 of it in place of the
    pictures. Facts are from the authors' successor, Uni4Eye++; equal weights of the losses are our reading. Published: 200
    epochs, AdamW (0.9, 0.95), 10⁻³ · batch / 256.
    """

    wants = ()
    mask: float = 0.5
    volumes: str | None = None
    width: int = 512
    depth: int = 8
    heads: int = 16

    def __post_init__(self) -> None:
        share(self, "mask")
        positive(self, "width", "depth", "heads")
        if self.width % self.heads or self.width % 4:
            raise VitreousError(
                f"Uni4Eye: a decoder of width {self.width} cannot have {self.heads} heads: both they and 4 divide it"
            )

    def parts(self, model: nn.Module) -> nn.Module:
        whole = unified(model)
        masked_order(torch.zeros(1, whole.grids[4][0] * whole.grids[4][1]), self.mask)
        values = (
            whole.patch**2 * whole.patch_embed.proj2.in_channels,
            whole.patch**2 * whole.slices * whole.patch_embed.proj3.in_channels,
        )
        made = lambda: Decoder(whole.embed_dim, self.width, self.depth, self.heads, values)
        return nn.ModuleDict({"picture": made(), "edges": made()})

    def losses(self, model: nn.Module, parts: Any, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        whole, volume = unified(model), x.ndim == 5
        shown, place = masked_order(noise, self.mask)
        hidden = place >= shown.shape[1]
        tokens = whole.tokens(x, shown)
        side = (whole.patch, whole.patch, whole.slices)[: x.ndim - 2]
        table = whole.table(x.ndim, self.width).to(x)
        found = {}
        for name, target in (("picture", x), ("edges", edges(x))):
            made = parts[name](tokens, place, table, volume)
            found[name] = over_hidden((made - patchify(target, side)).square().mean(-1), hidden)
        return found

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        whole, x = unified(now.model), batch.images
        if self.volumes is not None and int(now.epoch) % 2 == 0:
            held = array_of(self.volumes, "Uni4Eye")
            if held.ndim != 5:
                raise VitreousError(f"Uni4Eye: {self.volumes} holds {held.ndim} axes, and volumes are [M, channels, H, W, D]")
            at = torch.randint(len(held), (max(1, len(x) // 8),))
            x = torch.stack([torch.from_numpy(held[int(i)].copy()) for i in at]).to(x)
        count = torch.tensor(whole.grids[x.ndim]).prod()
        return self.losses(now.model, now.parts, x, torch.rand(len(x), int(count)).to(x.device))


def unified(model: nn.Module) -> UnifiedViT:
    if not isinstance(model, UnifiedViT):
        raise VitreousError(
            f"Uni4Eye learns pictures and volumes: give a vt.learn.pretrain.UnifiedViT, not {type(model).__name__}"
        )
    return model
