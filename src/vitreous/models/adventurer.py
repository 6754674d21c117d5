"""Adventurer: Mamba-2 reads the patches of an image one after the other, down to patches of one pixel.

Wang et al., "Adventurer: Optimizing Vision Mamba Architecture Designs for Efficiency" (CVPR 2025), and what it was scaled up
for, Wang et al., "Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More" (ICML 2025). Facts from the official
repositories, wangf3014/Adventurer and wangf3014/Patch_Scaling, and from state-spaces/mamba, whose kernels they run.
"""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, RmsNorm, SwiGLU, calculate_drop_path_rates, lecun_normal_, to_2tuple, trunc_normal_
from timm.models import checkpoint_seq, model_entrypoint
from torch import Tensor, nn

from ..mixers import MetaBlock, patch_grid, require_size, state_space_dual
from .classifier import Classifier
from .official import official, publish, renamed

Norm = partial(RmsNorm, eps=1e-5)


class Mamba2(nn.Module):
    """Tokens `[B, N, C]` to the same; each reads itself and those before it, by `state_space_dual`.

    Dao and Gu, "Transformers are SSMs" (ICML 2024), section 7; names and defaults of `mamba_ssm`'s Mamba2. One projection gives
    the gate, what is scanned, B, C and Δ; the gate multiplies before the norm.

    expand: channels scanned over channels. d_state: numbers remembered of each. headdim: channels that share a decay. d_conv:
    how many tokens the convolution reads, the last of them its own.
    """

    def __init__(self, channels: int, expand: int = 2, d_state: int = 64, headdim: int = 64, d_conv: int = 4) -> None:
        super().__init__()
        inner, self.headdim = channels * expand, headdim
        self.scanned = (inner, d_state, d_state)
        self.projected = (inner, sum(self.scanned), inner // headdim)
        self.in_proj = nn.Linear(channels, sum(self.projected), bias=False)
        self.conv1d = nn.Conv1d(sum(self.scanned), sum(self.scanned), d_conv, padding=d_conv - 1, groups=sum(self.scanned))
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(inner // headdim)) for _ in range(3))
        self.norm = Norm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A spread evenly between −1 and −16, and Δ, in logarithm, between 0.001 and 0.1; the rest as torch does."""
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            delta = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
            self.dt_bias.copy_(delta + (-torch.expm1(-delta)).log())
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        gate, scanned, delta = self.in_proj(x).split(self.projected, -1)
        scanned = F.silu(self.conv1d(scanned.mT)[..., : x.shape[1]]).mT
        x, B, C = scanned.split(self.scanned, -1)
        x = x.unflatten(-1, (-1, self.headdim))
        y = state_space_dual(x, F.softplus(delta + self.dt_bias), -self.A_log.float().exp(), B, C, self.D)
        return self.out_proj(self.norm(y.flatten(2) * F.silu(gate)))


def turned(x: Tensor) -> Tensor:
    """Tokens `[B, N, C]` in reverse, but for the class token, which stays the last."""
    return torch.cat([x[:, :-1].flip(1), x[:, -1:]], 1)


class CausalMixer(Mamba2):
    """Mamba-2 as images need it: the first token, too, knows something of the whole, and not all blocks read one way.

    The mean of all tokens goes ahead of them, and its own result is dropped (Adventurer, heading average); with `flip` the
    patches are read from the last to the first (inter-layer flipping).
    """

    def __init__(self, channels: int, flip: bool) -> None:
        super().__init__(channels)
        self.flip = flip

    def forward(self, x: Tensor) -> Tensor:
        x = turned(x) if self.flip else x
        x = super().forward(torch.cat([x.mean(1, keepdim=True), x], 1))[:, 1:]
        return turned(x) if self.flip else x


class Adventurer(Classifier):
    """Images `[B, C, *img_size]` to logits `[B, num_classes]`; the class token comes last, where it reads all patches.

    Work and memory grow with the number of patches, not with its square. Where there are `checkpoint_tokens` or more, training
    keeps the blocks' inputs alone and computes the rest again on the way back.

    The papers turn the sequence around between every two blocks. The official code turns it for the third and fourth block
    alone, and the published weights are trained so: ours does the same.
    """

    global_pool = "token"
    num_prefix_tokens = 0

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        depth: int = 12,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        checkpoint_tokens: int = 3136,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.img_size = cast(tuple[int, int], to_2tuple(img_size))
        patches = math.prod(patch_grid(self.img_size, patch_size, "Adventurer"))
        self.patch_embed = PatchEmbed(self.img_size, patch_size, in_chans, embed_dim)
        self.cls_token, self.cls_pos_embed = (nn.Parameter(torch.empty(1, 1, embed_dim)) for _ in range(2))
        self.pos_embed = nn.Parameter(torch.empty(1, patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [0.0, *cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))]  # the first two blocks drop nothing
        self.blocks = nn.Sequential(
            *(
                MetaBlock(
                    embed_dim,
                    CausalMixer(embed_dim, i in (2, 3)),
                    SwiGLU(embed_dim, embed_dim * 5 // 2),
                    Norm,
                    drop_path=rates[i],
                )
                for i in range(depth)
            )
        )
        self.norm = Norm(embed_dim)
        self.set_grad_checkpointing(patches >= checkpoint_tokens)
        self.reset_parameters()
        self.reset_classifier(num_classes)

    def reset_parameters(self) -> None:
        """Linears as torch does, without bias, the mixers' last 1 / √depth as large; the rest from truncated normals."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, Mamba2):
                with torch.no_grad():
                    module.out_proj.weight /= len(self.blocks) ** 0.5
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(cast(Tensor, self.patch_embed.proj.bias))
        for table in (self.cls_token, self.cls_pos_embed, self.pos_embed):
            trunc_normal_(table, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "cls_pos_embed", "pos_embed"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to `[B, N + 1, C]`, the class token last."""
        require_size(x, self.img_size, "Adventurer")
        x = self.patch_embed(x) + self.pos_embed
        x = self.pos_drop(torch.cat([x, (self.cls_token + self.cls_pos_embed).expand(x.shape[0], -1, -1)], 1))
        return self.norm(checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x))

    def pool(self, x: Tensor) -> Tensor:
        return x[:, -1]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours; the last of the official positions is the class token's."""
    state = renamed(
        state,
        (r"^layers\.(\d+)\.norm\.", r"blocks.\1.norm1."),
        (r"^layers\.(\d+)\.norm_mlp\.", r"blocks.\1.norm2."),
        (r"^layers\.(\d+)\.mixer\.", r"blocks.\1.attn."),
        (r"^layers\.", "blocks."),
        (r"\.w1\.", ".fc1_g."),
        (r"\.w2\.", ".fc1_x."),
        (r"\.w3\.", ".fc2."),
        (r"^norm_f\.", "norm."),
    )
    positions = state["pos_embed"]
    return {**state, "pos_embed": positions[:, :-1], "cls_pos_embed": positions[:, -1:]}


SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(embed_dim=256),
    "small": dict(embed_dim=512),
    "base": dict(embed_dim=768),
    "large": dict(embed_dim=1024, depth=24),
}
SHAPES = [(name, patch, side) for name in SIZES for patch in (16, 8, 4, 2, 1) for side in (64, 128, 224)]
SHAPES += [("base", 16, 384), ("base", 16, 448), ("base", 8, 448)]
for _name, _patch, _side in SHAPES:
    _official = f"adventurer_{_name}_patch{_patch}"
    _timm = f"{_official}_{_side}"
    _cut = _side == 64 or (_patch == 16 and _side <= 224)  # the READMEs' crops
    publish(
        Adventurer,
        _timm,
        dict(SIZES[_name], img_size=_side, patch_size=_patch),
        variant=f"patch-scaling--{_timm}",
        convert=convert,
        size=_side,
        crop_pct=0.875 if _cut else 1.0,
        fixed_input_size=True,
        first_conv="patch_embed.proj",
    )
    if _side == 224:
        official(f"patch-scaling--{_official}", model_entrypoint(_timm), convert)
