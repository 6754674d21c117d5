"""LWGANet: four quarters of the channels, each with attention of its own reach. Lu et al., "LWGANet: A Lightweight Group
Attention Backbone for Remote Sensing Visual Tasks" (2025).

Facts from the official repository, AeroVILab-AHU/LWGANet. Its blur is of a package whose licence is not free; here it is written
from its definition. Max-unpooling, which ONNX has poorly, is here a product with the place of the maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import conv_norm
from .classifier import Pyramid, init_weights
from .official import publish


def strongest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of every 2 × 2 places of `[B, C, H, W]`, and `[B, C, H // 2, W // 2, 4]`, one where it was, first of equals."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    x = x[:, :, : 2 * height, : 2 * width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)
    place = torch.arange(4, device=x.device)
    return x.amax(-1), (x.argmax(-1, keepdim=True) == place).to(x.dtype)


def put_back(x: Tensor, where: Tensor, size: Sequence[int]) -> Tensor:
    """Each of `[B, C, h, w]` where its maximum was in a map of `size`, and 0 elsewhere."""
    x = (x.unsqueeze(-1) * where).unflatten(4, (2, 2)).transpose(3, 4).flatten(4).flatten(2, 3)
    return F.pad(x, (0, size[1] - x.shape[3], 0, size[0] - x.shape[2]))


def sheared(x: Tensor) -> Tensor:
    """Each row of `[B, C, H, W]` moved to the right by its index: `[B, C, H, W + H − 1]`, so that diagonals are columns."""
    height, width = x.shape[2], x.shape[3]
    x = F.pad(x, (0, height)).flatten(2)[..., : height * (width + height - 1)]
    return x.unflatten(2, (height, width + height - 1))


def unsheared(x: Tensor, width: int) -> Tensor:
    """What `sheared` did to a map of `width`, undone."""
    height, wide = x.shape[2], x.shape[3]
    return F.pad(x.flatten(2), (0, height)).unflatten(2, (height, wide + 1))[..., :width]


class Blur(nn.Module):
    """A blur by 1 3 3 1 in both directions, every third place of it; of maps of 3 × 3 or more.

    Zhang, "Making Convolutional Networks Shift-Invariant Again" (ICML 2019).
    """

    weight: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("weight", torch.outer(line, line).expand(channels, 1, 4, 4).clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 3:
            raise VitreousError("LWGANet wants images of 96 pixels or more a side: a blur of its last map looks two places ahead")
        return F.conv2d(F.pad(x, (1, 2, 1, 2), mode="reflect"), self.weight, stride=3, groups=x.shape[1])


class PointAttention(nn.Module):
    """x + x · σ(conv(act(BN(conv x)))), of each place by itself."""

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        super().__init__()
        wide = 4 * channels
        expand, reduce = nn.Conv2d(channels, wide, 1, bias=False), nn.Conv2d(wide, channels, 1, bias=False)
        self.p_conv = nn.Sequential(expand, nn.BatchNorm2d(wide), act(), reduce)

    def forward(self, x: Tensor) -> Tensor:
        return x + x * self.p_conv(x).sigmoid()


class MediumRange(nn.Module):
    """x times the σ of strips of `kernel` × 3, upright, lying and along both diagonals, over a blurred map a third as large."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        half = kernel // 2
        upright = partial(nn.Conv2d, channels, channels, (kernel, 3), padding=(half, 1), groups=channels, bias=False)
        lying = partial(nn.Conv2d, channels, channels, (3, kernel), padding=(1, half), groups=channels, bias=False)
        self.blur, self.norm = Blur(channels), nn.BatchNorm2d(channels)
        self.H_att1, self.V_att1, self.H_att2, self.V_att2 = upright(), lying(), upright(), lying()

    def forward(self, x: Tensor) -> Tensor:
        small = self.blur(F.max_pool2d(x, 3, 1, 1))
        height, width = small.shape[2:]
        diagonal = unsheared(self.H_att2(sheared(small)), width)
        other = unsheared(self.V_att2(sheared(small.mT).mT).mT, height).mT
        weight = self.norm(self.H_att1(small) + self.V_att1(small) + diagonal + other).sigmoid()
        return x * F.interpolate(weight, size=x.shape[2:], mode="nearest")


class LargeKernels(nn.Module):
    """Over the strongest of every 2 × 2 places: a large kernel and a larger one, weighted by place, as a factor."""

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        super().__init__()
        half = channels // 2
        self.proj_1, self.proj_2 = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.activation = act()
        self.conv0 = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.conv_spatial = nn.Conv2d(channels, channels, 7, padding=9, groups=channels, dilation=3)
        self.conv1, self.conv2 = nn.Conv2d(channels, half, 1), nn.Conv2d(channels, half, 1)
        self.conv_squeeze, self.conv = nn.Conv2d(2, 2, 7, padding=3), nn.Conv2d(half, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        top, where = strongest(x)
        top = self.activation(self.proj_1(top))
        near = self.conv0(top)
        far = self.conv2(self.conv_spatial(near))
        near = self.conv1(near)
        both = torch.cat((near, far), 1)
        first, second = (
            self.conv_squeeze(torch.cat((both.mean(1, keepdim=True), both.amax(1, keepdim=True)), 1)).sigmoid().chunk(2, 1)
        )
        return put_back(self.proj_2(top * self.conv(near * first + far * second)), where, x.shape[2:])


class MapAttention(nn.Module):
    """Softmax attention of all places of a map `[B, C, H, W]`, in heads of four."""

    def __init__(self, channels: int, head_dim: int = 4) -> None:
        super().__init__()
        self.num_heads = max(channels // head_dim, 1)
        inner = self.num_heads * head_dim
        self.qkv, self.proj = nn.Linear(channels, 3 * inner, bias=False), nn.Linear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        q, k, v = self.qkv(x.flatten(2).mT).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(x).mT.unflatten(2, size)


class SparseAttention(nn.Module):
    """`MapAttention` over the strongest of every 2 × 2 places, put back where they were."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.BatchNorm2d(channels), MapAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        top, where = strongest(x)
        return put_back(self.norm(self.attn(top)), where, x.shape[2:])


class LWGABlock(nn.Module):
    """x + BN(MLP(points, a 3 × 3 convolution, medium range and global attention, each of a quarter of the channels))."""

    def __init__(self, channels: int, stage: int, kernel: int, mlp_ratio: float, act: type[nn.Module], drop_path: float) -> None:
        super().__init__()
        quarter, hidden = channels // 4, int(channels * mlp_ratio)
        self.PA, self.MRA = PointAttention(quarter, act), MediumRange(quarter, kernel)
        self.LA = nn.Sequential(*conv_norm(quarter, quarter, 3), act())
        self.GA = LargeKernels(quarter, act) if stage < 2 else SparseAttention(quarter) if stage == 2 else MapAttention(quarter)
        self.norm = nn.Identity() if stage == 2 else nn.BatchNorm2d(quarter)
        self.mlp = nn.Sequential(*conv_norm(channels, hidden, 1), act(), nn.Conv2d(hidden, channels, 1, bias=False))
        self.norm1, self.drop_path = nn.BatchNorm2d(channels), DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = x.chunk(4, 1)
        parts = torch.cat((self.PA(a), self.LA(b), self.MRA(c), self.norm(d + self.GA(d))), 1)
        return x + self.norm1(self.drop_path(self.mlp(parts)))


class DRFD(nn.Module):
    """Twice the channels, half the map: a strided convolution beside a pooling; `[B, C, H, W]` to `[B, 2C, ⌈H/2⌉, ⌈W/2⌉]`."""

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        super().__init__()
        wide = 2 * channels
        self.conv = nn.Conv2d(channels, wide, 3, padding=1, groups=channels)
        self.conv_c = nn.Conv2d(wide, wide, 3, 2, 1, groups=wide)
        self.act_c, self.norm_c, self.norm_m = act(), nn.BatchNorm2d(wide), nn.BatchNorm2d(wide)
        self.fusion = nn.Conv2d(2 * wide, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        strided, pooled = self.norm_c(self.act_c(self.conv_c(x))), self.norm_m(F.max_pool2d(x, 3, 2, 1))
        return self.fusion(torch.cat((strided, pooled), 1))


class LWGANet(Pyramid):
    """Images `[B, C, H, W]`, of sides of 96 pixels or more, to logits `[B, num_classes]`."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 32,
        depths: Sequence[int] = (1, 2, 4, 2),
        kernel: int = 11,
        mlp_ratio: float = 2.0,
        act: type[nn.Module] = nn.GELU,
        feature_dim: int = 1280,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [embed_dim << i for i in range(len(depths))]
        super().__init__(widths, [4 << i for i in range(len(depths))], drop_rate)
        self.num_features = self.head_hidden_size = feature_dim
        self.stem = nn.Sequential(nn.Conv2d(in_chans, embed_dim, 4, 4, bias=False), nn.BatchNorm2d(embed_dim))
        done, total = 0, max(sum(depths) - 1, 1)
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            rates = [drop_path_rate * (done + j) / total for j in range(depth)]
            blocks: list[nn.Module] = [LWGABlock(width, i, kernel, mlp_ratio, act, rate) for rate in rates]
            self.stages.append(nn.Sequential(*([DRFD(width // 2, act)] if i else []), *blocks))
            done += depth
        self.features = nn.Sequential(nn.Conv2d(widths[-1], feature_dim, 1, bias=False), act())
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def pool(self, x: Tensor) -> Tensor:
        return self.features(x.mean((2, 3), keepdim=True)).flatten(1)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: there what halves the map is a stage of its own."""
    named = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        if name.endswith(".max_m2.filt"):
            continue
        if first == "stages":
            number, _, rest = rest.partition(".")
            stage, between = divmod(int(number), 2)
            if between:
                name = f"stages.{stage + 1}.0.{rest}"
            else:
                block, _, rest = rest.removeprefix("blocks.").partition(".")
                name = f"stages.{stage}.{int(block) + (stage > 0)}.{rest}"
        name = (
            name.replace("Stem.proj.", "stem.0.").replace("Stem.norm.", "stem.1.").replace("avgpool_pre_head.1.", "features.0.")
        )
        for old in (".GA12.", ".GA3.", ".GA4."):
            name = name.replace(old, ".GA.")
        named[name.replace(".LA.conv.", ".LA.")] = tensor
    return named


for _name, _arguments in {
    "l0": dict(),
    "l1": dict(embed_dim=64, drop_path_rate=0.1),
    "l2": dict(embed_dim=96, depths=(1, 4, 4, 2), act=nn.ReLU, drop_path_rate=0.1),
}.items():
    publish(LWGANet, f"lwganet_{_name}", _arguments, variant=f"lwganet--{_name}", convert=convert, first_conv="stem.0")
