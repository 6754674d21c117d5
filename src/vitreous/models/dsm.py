"""DSM: tokens are mixed by weights on their frequencies, which the image chooses. Hu and Yu, "Dynamic Spectrum Mixer for Visual
Recognition" (2023).

No code was found, and of the paper the abstract alone: a MetaFormer whose mixer works on the discrete cosine transform, with
weights made for each image, light and in n log n. Ours is what that says least of all: how the weights are made (a few learned
spectra, blended by what the image holds on average), and all sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from timm.layers import LayerNorm2d, Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from ..mixers import MetaBlock
from ..mixers.cosine import dct2, idct2
from .classifier import Pyramid, init_weights
from .official import publish

norm = partial(LayerNorm2d, eps=1e-6)


class DynamicSpectrum(nn.Module):
    """proj(DCT⁻¹(W(x) ∘ DCT(x))) on maps `[B, C, H, W]`, with W(x) = Σ_k softmax(MLP(mean x))_k · W_k.

    W_k are `spectra` learned maps of weights for each channel and frequency of a `side` × `side` map. Frequency i is i half waves
    in a map of any size, so a larger map has the weights of the highest known ones for those above, and a smaller lacks some.
    """

    def __init__(self, channels: int, side: int, spectra: int = 4, reduction: int = 4) -> None:
        super().__init__()
        self.spectra = nn.Parameter(1 + 0.02 * torch.randn(spectra, channels, side, side))
        self.choose = Mlp(channels, max(channels // reduction, spectra), spectra)
        self.proj = nn.Conv2d(channels, channels, 1)

    def weights(self, x: Tensor) -> Tensor:
        """W `[B, C, H, W]`."""
        (height, width), side = x.shape[2:], self.spectra.shape[-1]
        rows, columns = (torch.arange(n, device=x.device).clamp(max=side - 1) for n in (height, width))
        shares = self.choose(x.mean((2, 3))).softmax(1)
        return torch.einsum("bk,kchw->bchw", shares, self.spectra[:, :, rows][..., columns])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(idct2(self.weights(x) * dct2(x), *x.shape[2:]))


class DSM(Pyramid):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`. img_size: of the maps that the spectra are learned for."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        spectra: int = 4,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(embed_dims):
            kernel, stride, before = (7, 4, in_chans) if i == 0 else (3, 2, embed_dims[i - 1])

            def block(rate: float, width: int = width, side: int = img_size >> (i + 2)) -> nn.Module:
                mlp = Mlp(width, int(width * mlp_ratio), use_conv=True, drop=drop_rate)
                return MetaBlock(width, DynamicSpectrum(width, side, spectra), mlp, norm, drop_path=rate)

            embed = nn.Conv2d(before, width, kernel, stride, kernel // 2), norm(width)
            self.stages.append(nn.Sequential(*embed, *map(block, rates[i])))
        self.norm = norm(embed_dims[-1])
        self.apply(init_weights)
        self.reset_classifier(num_classes)


publish(
    DSM,
    "dsm_small",
    {},
    variant="dsm--small",
    doc="DSM, its sizes ours: the published could not be had.",
    first_conv="stages.0.0",
)
