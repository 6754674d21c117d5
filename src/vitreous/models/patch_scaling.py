"""Plain ViTs with patches down to one pixel. Wang et al., "Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And
More" (ICML 2025).

These are its ViTs, of DeiT's sizes. Its Mamba models, the only ones that the official repository, wangf3014/Patch_Scaling,
publishes, are in `adventurer.py`.
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer

from ..errors import VitreousError
from .official import publish


class PatchScalingViT(VisionTransformer):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]` from (img_size / patch_size)² tokens.

    What makes long sequences affordable: fused attention keeps no N × N scores (so do not record attention with `glass`, nor turn
    `timm.layers.set_fused_attn` off); and where there are `checkpoint_tokens` or more, training keeps the blocks' inputs alone
    and computes the rest again on the way back.
    """

    def __init__(
        self, img_size: int = 224, patch_size: int = 16, qkv_bias: bool = True, checkpoint_tokens: int = 3136, **kwargs: Any
    ) -> None:
        if img_size % patch_size:
            raise VitreousError(f"PatchScalingViT: {img_size} pixels a side do not divide into patches of {patch_size}")
        super().__init__(img_size=img_size, patch_size=patch_size, qkv_bias=qkv_bias, **kwargs)
        self.set_grad_checkpointing((img_size // patch_size) ** 2 >= checkpoint_tokens)


SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
}
for _size, _arguments in SIZES.items():
    for _patch in (16, 8, 4, 2, 1):
        for _side in (64, 128, 224):
            publish(
                PatchScalingViT,
                f"patch_scaling_{_size}_patch{_patch}_{_side}",
                dict(_arguments, img_size=_side, patch_size=_patch),
                variant=f"patch-scaling--deit_{_size}_patch{_patch}_{_side}",
                size=_side,
                maps=12,
                fixed_input_size=True,
                first_conv="patch_embed.proj",
            )
