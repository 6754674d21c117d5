"""Masked autoencoders: a ViT that sees a quarter of the patches, and a narrow decoder that answers for all of them.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022), with the decoders and feature heads of Huang et al.,
"Generic-to-Specific Distillation of Masked Autoencoders" (CVPR 2023). Facts from the official repository, pengzhiliang/G2SD.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from .official import publish, renamed


def sine_cosine(width: int, grid: tuple[int, int]) -> Tensor:
    """The fixed table `[1, 1 + N, width]`: the first half of the channels tells the column, the second the row, sines before
    cosines; zeros for the class token."""
    if width % 4:
        raise VitreousError(f"positions in sines and cosines need a width that 4 divides, not {width}")
    rate = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    waves = [f(place.reshape(-1, 1) * rate) for place in (column, row) for f in (torch.sin, torch.cos)]
    return nn.functional.pad(torch.cat(waves, 1), (0, 0, 1, 0))[None].float()


def masked_order(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Of noise `[B, N]`: the ⌊N (1 − ratio)⌋ patches that are seen, those of the smallest values, `[B, k]` in their order; and
    the place `[B, N]` of each patch in that order."""
    kept = int(noise.shape[1] * (1 - ratio))
    if not 0 < kept < noise.shape[1]:
        raise VitreousError(f"a mask of {ratio} shows {kept} of {noise.shape[1]} patches: it must show some and hide some")
    order = noise.argsort(1)
    return order[:, :kept], order.argsort(1)


def encode_visible(model: nn.Module, images: Tensor, seen: Tensor, last: str = "norm") -> Tensor:
    """Class token, where there is one, and the patches `seen [B, k]` alone through a ViT, up to its submodule `last`:
    `[B, 1 + k, C]`, or `[B, k, C]`.

    Positions are added before; other prefix tokens (distillation, registers) stay out. Raises `VitreousError` for a model
    whose attention needs to know where the tokens lie.
    """
    anatomy = read(model)
    if not anatomy.plain or any(b.attention.position != "absolute" for b in anatomy.blocks):
        raise VitreousError(
            f"patches can be left out where blocks are plain, and positions are added before them: not in {anatomy.kind}"
        )
    found: list[Tensor] = []

    def leave_out(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, *others = given
        patches = tokens[:, anatomy.prefix :].gather(1, seen[:, :, None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([tokens[:, : int(anatomy.class_token)], patches], 1), *others

    handles = [
        model.get_submodule(anatomy.blocks[0].name).register_forward_pre_hook(leave_out),
        model.get_submodule(last).register_forward_hook(lambda *given: found.append(given[2])),
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[-1]


class MaskedDecoder(nn.Module):
    """From tokens of the visible patches `[B, 1 + k, C]` to what stands at every place `[B, 1 + N, width]`; without a class token
    (`prefix` 0) one less in both.

    `pixels`: numbers of a patch, of which a last layer answers; 0 for none. `predict`: widths of two heads of G2SD's students,
    for features of the teacher's encoder (which the released code builds and gives no weight) and of its decoder.
    """

    def __init__(
        self,
        inputs: int,
        grid: tuple[int, int],
        width: int,
        depth: int,
        heads: int,
        pixels: int = 0,
        predict: tuple[int, int] | None = None,
        prefix: int = 1,
    ) -> None:
        super().__init__()
        if width % heads or width % 4:
            raise VitreousError(f"a decoder of width {width} cannot have {heads} heads: both they and 4 must divide it")
        self.prefix = prefix
        self.decoder_embed = nn.Linear(inputs, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sine_cosine(width, grid)[:, 1 - prefix :], requires_grad=False)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        if pixels:
            self.decoder_norm, self.decoder_pred = norm(width), nn.Linear(width, pixels)
        if predict:
            self.encoderfeature_pred = Mlp(inputs, predict[0], predict[0])
            self.decoderfeature_pred = Mlp(width, predict[1], predict[1])
        nn.init.normal_(self.mask_token, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def forward(self, tokens: Tensor, place: Tensor, depth: int | None = None) -> Tensor:
        """`place [B, N]` as `masked_order` gives it; after `depth` blocks, all of them when None, before the norm."""
        x = self.decoder_embed(tokens)
        hidden = self.mask_token.expand(len(x), self.prefix + place.shape[1] - x.shape[1], -1)
        patches = torch.cat([x[:, self.prefix :], hidden], 1).gather(1, place[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, : self.prefix], patches], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks[:depth]:
            x = block(x)
        return x


class MaskedAutoencoder(VisionTransformer):
    """A ViT with its decoder. Called with images it is the ViT; `masked` hides patches and decodes."""

    def __init__(
        self,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        predict: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        embed: Any = self.patch_embed
        h, w = embed.patch_size
        pixels = h * w * embed.proj.in_channels
        self.pos_embed = nn.Parameter(sine_cosine(self.embed_dim, embed.grid_size), requires_grad=False)
        self.decoder = MaskedDecoder(
            self.embed_dim, embed.grid_size, decoder_width, decoder_depth, decoder_heads, pixels, predict
        )  # fmt: skip

    def masked(self, images: Tensor, noise: Tensor, ratio: float = 0.75, depth: int | None = None) -> Tensor:
        """What the decoder has at all places, `[B, 1 + N, width]`, after `depth` of its blocks. The ⌊N (1 − ratio)⌋ patches with
        the smallest `noise [B, N]` are seen. With `predict`, the prediction of the teacher's decoder from it."""
        seen, place = masked_order(noise, ratio)
        hidden = self.decoder(encode_visible(self, images, seen), place, depth)
        return self.decoder.decoderfeature_pred(hidden) if hasattr(self.decoder, "decoderfeature_pred") else hidden


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(state, (r"^((en|de)coder(_|feature_)|mask_token)", r"decoder.\1"))


for _name, _width, _heads, _decoder, _predict in (
    ("mae_vit_tiny_patch16_dec128d4b", 192, 3, (128, 4, 4), (768, 512)),
    ("mae_vit_tiny_patch16_12h_dec128d4b", 192, 12, (128, 4, 4), (768, 512)),
    ("mae_vit_small_patch16_dec256d4b", 384, 6, (256, 4, 8), (768, 512)),
    ("mae_vit_base_patch16_dec512d8b", 768, 12, (512, 8, 16), None),
):
    publish(
        MaskedAutoencoder,
        _name,
        dict(
            embed_dim=_width,
            depth=12,
            num_heads=_heads,
            decoder_width=_decoder[0],
            decoder_depth=_decoder[1],
            decoder_heads=_decoder[2],
            predict=_predict,
        ),
        variant=f"g2sd--{_name}",
        convert=_convert,
        maps=12,
        num_classes=0,
        first_conv="patch_embed.proj",
    )
