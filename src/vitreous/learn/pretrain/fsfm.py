"""FSFM: masked faces, one region of them hidden whole, and a picture's identity from what is left."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...anatomy import read
from ...errors import VitreousError
from ...models.masked_autoencoder import encode_visible, sine_cosine
from ..objective import Batch, Now, Objective, Seen, final, objective, positive, share
from .beside import rows_of
from .dino import follow, rising, twin
from .encode import shape
from .masks import facial_regions, some
from .patches import normalised, over_hidden, patchify

norm: Any = partial(nn.LayerNorm, eps=1e-6)


class Projection(nn.Module):
    """Two layers with a LayerNorm between, where BYOL has a batch norm."""

    def __init__(self, width: int, hidden: int = 4096, out: int = 256) -> None:
        super().__init__()
        self.projection_head = nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(x)


class Representation(nn.Module):
    """Tokens of the visible patches to one vector `[B, 256]`: a decoder as wide as the encoder, its mean, a projector."""

    def __init__(self, width: int, grid: tuple[int, int], heads: int, positions: bool) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = sine_cosine(width, grid) * positions
        self.rep_decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.rep_decoder_embed, self.rep_decoder_pred = nn.Linear(width, width), nn.Linear(width, width)
        self.rep_decoder_blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(2))
        self.rep_decoder_norm = norm(width)
        self.projector = Projection(width)
        nn.init.normal_(self.mask_token, std=0.02)

    def projected(self, tokens: Tensor, place: Tensor) -> Tensor:
        x = ordered(self.rep_decoder_embed(tokens), place, self.mask_token) + self.rep_decoder_pos_embed
        for block in self.rep_decoder_blocks:
            x = block(x)
        return self.projector(self.rep_decoder_pred(self.rep_decoder_norm(x)).mean(1))


class Online(Representation):
    """Beside it a decoder to pixels, and a predictor of the target's vector."""

    def __init__(
        self, width: int, grid: tuple[int, int], heads: int, positions: bool, decoder: int, depth: int, values: int
    ) -> None:
        super().__init__(width, grid, heads, positions)
        self.predictor = Projection(256)
        self.decoder_pos_embed = nn.Parameter(sine_cosine(decoder, grid), requires_grad=False)
        self.decoder_embed = nn.Linear(width, decoder)
        self.decoder_blocks = nn.ModuleList(Block(decoder, 16, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.decoder_norm, self.decoder_pred = norm(decoder), nn.Linear(decoder, values)

    def pixels(self, tokens: Tensor, place: Tensor) -> Tensor:
        """`[B, N, values]`; hidden patches get their token before the first layer."""
        x = self.decoder_embed(ordered(tokens, place, self.mask_token)) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def ordered(tokens: Tensor, place: Tensor, token: Tensor) -> Tensor:
    """`[B, 1 + N, C]`: visible tokens `[B, 1 + k, C]` back at their places `[B, N]`, `token` at the others."""
    hidden = token.expand(len(tokens), 1 + place.shape[1] - tokens.shape[1], -1)
    patches = torch.cat([tokens[:, 1:], hidden], 1).gather(1, place[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :1], patches], 1)


@objective
@dataclass(frozen=True)
class FSFM(Objective):
    """Wang, Lin, Wu, Wang, Wang, Wu, Xu, "FSFM: A Generalizable Face Security Foundation Model via Self-Supervised Facial
    Representation Learning" (CVPR 2025); no labels. Built from facts alone, as the released code may not be used commercially.

    MAE whose mask hides one facial region whole and of the others the same share (`masks.facial_regions`), `mask` in all; pixels
    over what is hidden, + `region` · those of the region, + `identity` · −½ cosine between what an online branch predicts from
    the visible patches and what a target, which follows with momentum 0.996 to 1, makes of the whole picture.

    parsings: a `.npy` file `[pictures, H, W]` of face parsings with 11 classes, in the order of the pictures that are given as
    tensors; without it masks are random and the region's term is out. positions: sines and cosines in the second decoder; zeros
    as released, so that hidden places are all alike there. Published: no augmentation, pictures normalised by the face
    set's own statistics, 400 epochs, batch 4096.
    """

    wants = ()
    official: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^(online|target)\.(mask_token|decoder_|rep_decoder_|projector|predictor)", r"parts.\1.\2"),
        (r"^online\.", ""), (r"^target\.", "parts.backbone."),
    )  # fmt: skip
    crop: ClassVar[tuple[float, float]] = (1.0, 1.0)
    mask: float = 0.75
    region: float = 0.007
    identity: float = 0.1
    parsings: str | None = None
    normalise: bool = True
    positions: bool = True
    width: int = 512
    depth: int = 8

    def __post_init__(self) -> None:
        share(self, "mask")
        positive(self, "width", "depth")
        if self.width % 16:
            raise VitreousError(f"FSFM: a decoder of width {self.width} cannot have 16 heads")

    def parts(self, model: nn.Module) -> nn.Module:
        s, anatomy = shape(model, "FSFM"), read(model)
        if not anatomy.class_token:
            raise VitreousError("FSFM reads a class token: choose a ViT with one")
        heads = 16 if s.width % 16 == 0 else anatomy.blocks[0].attention.heads or 1
        some(int(self.mask * s.grid[0] * s.grid[1]), s.grid[0] * s.grid[1], f"FSFM: a mask of {self.mask}")
        values = s.patch[0] * s.patch[1] * s.channels
        online = Online(s.width, s.grid, heads, self.positions, self.width, self.depth, values)
        target = Representation(s.width, s.grid, heads, self.positions)
        target.load_state_dict({k: v for k, v in online.state_dict().items() if k in target.state_dict()})
        return nn.ModuleDict({"online": online, "target": target.requires_grad_(False), "backbone": twin(model)[0]})

    def seen_by(self, model: nn.Module, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of what `mask [B, N]` leaves, as many in each picture, and the place of every patch among them."""
        order = torch.argsort(mask.int(), dim=1, stable=True)
        shown = order[:, : int((~mask[0]).sum())]
        return encode_visible(model, images, shown, final(model)), order.argsort(1)

    def losses(self, model: nn.Module, parts: Any, images: Tensor, mask: Tensor, region: Tensor) -> dict[str, Tensor]:
        """Squared errors over what is hidden and over the region, and −½ mean cosine; not yet weighted."""
        tokens, place = self.seen_by(model, images, mask)
        target = patchify(images, shape(model, "FSFM").patch)
        error = (parts["online"].pixels(tokens, place) - (normalised(target) if self.normalise else target)).square().mean(-1)
        predicted = parts["online"].predictor(parts["online"].projected(tokens, place))
        with torch.no_grad():
            whole = parts["target"].projected(*self.seen_by(parts["backbone"], images, torch.zeros_like(mask)))
        found = {"pixels": over_hidden(error, mask), "identity": -0.5 * F.cosine_similarity(predicted, whole, dim=1).mean()}
        return found | ({"region": over_hidden(error, region)} if region.any() else {})

    def draw(self, model: nn.Module, index: Tensor, images: int) -> tuple[Tensor, Tensor]:
        s = shape(model, "FSFM")
        n = s.grid[0] * s.grid[1]
        if self.parsings is None:
            mask = torch.rand(images, n).argsort(1) < int(self.mask * n)
            return mask, torch.zeros_like(mask)
        faces = rows_of(self.parsings, index, "FSFM")
        if tuple(faces.shape[1:]) != (s.grid[0] * s.patch[0], s.grid[1] * s.patch[1]):
            raise VitreousError(f"FSFM: parsings of {faces.shape[1]} × {faces.shape[2]} are not of the size of the pictures")
        return facial_regions(faces, s.patch[0], self.mask)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        mask, region = (m.to(batch.images.device) for m in self.draw(now.model, batch.index, len(batch.images)))
        found = self.losses(now.model, now.parts, batch.images, mask, region)
        weights = {"pixels": 1.0, "region": self.region, "identity": self.identity}
        return {name: weights[name] * term for name, term in found.items()}

    def after_step(self, now: Now) -> None:
        parts: Any = now.parts
        momentum = rising(0.996, 1.0, now.share)
        follow(parts["backbone"], now.model, momentum)
        follow(parts["target"], parts["online"], momentum)
