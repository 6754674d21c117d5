"""Adventurer: Mamba-2 reads the patches of an image one after the other, down to patches of one pixel.

Wang et al., "Adventurer: Optimizing Vision Mamba Architecture Designs for Efficiency" (CVPR 2025), and what it was scaled up
for, Wang et al., "Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More" (ICML 2025). Facts from the official
repositories, wangf3014/Adventurer and wangf3014/Patch_Scaling, and from state-spaces/mamba, whose kernels they run.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from timm.layers import PatchEmbed, SwiGLU, calculate_drop_path_rates, lecun_normal_, to_2tuple, trunc_normal_
from timm.models import checkpoint_seq, model_entrypoint
from torch import Tensor, nn

from ..mixers import MetaBlock, patch_grid, require_size
from ..mixers.mamba import CausalMixer, Mamba2, Norm
from .classifier import Classifier
from .official import official, publish, renamed


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
