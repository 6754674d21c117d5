"""Each architecture small enough that every common test of tests/models/test_every_model.py runs in a second."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn


@dataclass(frozen=True)
class Small:
    """How to make an architecture small, and what its paper's design allows.

    name, arguments: for `timm.create_model`. side, channels: of its images. other_side: another size of images that it takes as
    it is built, None where the design has one size; then `resized` are the arguments that build it for 1.5 × `side`, None
    where nothing does. attention: whether it has softmax attention that `glass` sees. unused: parameters that no gradient
    reaches, by design of the paper; say why in a comment. uneven: scales of norms differ, where a design compares the sizes of
    tokens, which norms at their start make equal.

    Its key is the system's slug, and a word behind it where a paper has two designs.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    side: int = 64
    channels: int = 3
    other_side: int | None = 96
    resized: dict[str, Any] | None = None
    attention: bool = True
    unused: tuple[str, ...] = ()
    uneven: bool = False

    def make(self, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(self.name, **{"num_classes": 7, **self.arguments, **kwargs}).eval()
        for m in model.modules() if self.uneven else ():
            if isinstance(m, nn.LayerNorm):
                m.weight.data = torch.linspace(-1.5, 2, m.weight.shape[0])
        return model

    def images(self, n: int = 2, side: int | None = None) -> torch.Tensor:
        side = side or self.side
        return torch.randn(n, self.channels, side, side, generator=torch.Generator().manual_seed(1))


SMALL: dict[str, Small] = {
    "elasticvit": Small(
        "elastic_T1",
        dict(
            img_size=96,
            stem=(8, 0, 3),
            stages=((8, 1, 2, 3), (8, 1, 2, 3), (16, 0, 2, 2), (16, 1, 2, 2), (32, 0, 2, 2), (32, 1, 2, 2)),
            least=(),
            choice=(),
            features=32,
            head_ratio=2,
        ),
        side=96,
        other_side=64,  # resized within
        # The last norm of a block without stride begins at zero, so that at first nothing reaches what is before it.
        unused=tuple(f"reductions.1.{n}" for n in ("pw_", "dw_", "se_", "pwl_conv")),
    ),
    "vit-resnas": Small(
        "vit_resnas_tiny",
        dict(
            img_size=56,
            widths=(16, 24, 32),
            head_dims=(8, 8, 8),
            depths=(1, 1, 1),
            heads=(2, 2, 2),
            hidden=(32, 32, 32),
            middle=8,
        ),
        side=56,
        other_side=None,
        resized=None,
        unused=("patch_head",),  # reads the patches, for a loss of training alone
    ),
    "mpcvit": Small(
        "mpcvit_7_4_32_search",
        dict(img_size=16, embed_dim=24, depth=2, num_heads=3),
        side=16,
        other_side=None,
        resized=dict(img_size=24),
        attention=False,
    ),
    "as-vit": Small(
        "as_vit_seed",
        dict(img_size=64, genotype="8,2,3,1|4,1,2,1|4,1,4,1|3,1,2,1|8,16"),
        other_side=None,
        resized=dict(img_size=96),
    ),
    "deepmad": Small(
        "deepmad_r18", dict(stem=16, stages=[[16, 8, 5, 1], [24, 8, 5, 2], [24, 8, 3, 1, 1], [32, 8, 3, 1]]), attention=False
    ),
    "deepmad depthwise": Small(
        "deepmad_29m_224", dict(stem=16, stages=[[16, 32, 3, 2, 1], [24, 32, 5, 1], [32, 32, 3, 1]], last=48), attention=False
    ),
    "uniformer light": Small(
        "uniformer_xxs",
        dict(embed_dims=(16, 16, 32, 32), head_dim=16, depths=(1, 1, 2, 1)),
        unused=("norm_cls", "head_cls"),  # read the class token, for a loss of the official training alone
    ),
    "uniformer": Small("uniformer_small_plus_dim64_tl_224", dict(embed_dims=(16, 16, 32, 32), head_dim=16, depths=(1, 0, 1, 0))),
    "crossformer": Small(
        "crossformer_pp_small", dict(embed_dim=48, num_heads=(2, 2, 4, 4), groups=(4, 4, 4, 7), depths=(0, 4, 0, 1))
    ),
    "smt": Small("smt_t", dict(embed_dims=(16, 16, 32, 32), heads=(0, 0, 4, 4), depths=(1, 0, 2, 0))),
    "cvt": Small(
        "cvt_13",
        dict(embed_dims=(16, 24, 32), num_heads=(1, 2, 4), depths=(1, 1, 2)),
        # The head reads the class token alone, whose query passes by the last block's convolution.
        unused=("stages.2.blocks.1.attn.conv_q",),
    ),
    "overlock": Small(
        "overlock_xt",
        dict(embed_dims=(16, 16, 16, 32), depths=(1, 0, 0, 1), sub_depths=(1, 1), sub_num_heads=(1, 2), kernels=(7, 7, 7, 7)),
        attention=False,
        unused=("aux_head",),  # reads the Overview-Net in `forward_auxiliary`
    ),
    "litv2": Small("litv2_s", dict(embed_dim=16, depths=(1, 0, 0, 1), num_heads=(1, 1, 4, 4), alpha=0.5)),
    "hornet": Small("hornet_tiny_gf", dict(img_size=64, base_dim=16, depths=(1, 0, 0, 1)), attention=False),
    "cas-vit": Small("rcvit_xs", dict(embed_dims=(16, 16, 24, 32), depths=(1, 0, 0, 1)), attention=False),
    "pvt": Small("pvt_tiny", dict(img_size=64, embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2), depths=(1, 0, 0, 1))),
    "lsnet": Small(
        "lsnet_t",
        dict(img_size=128, embed_dims=(16, 32, 32, 48), depths=(0, 2, 0, 2), num_heads=2, key_dim=8),
        side=128,
        other_side=None,
        resized=dict(img_size=192),
    ),
    "dinat": Small("dinat_mini", dict(embed_dim=16, num_heads=(1, 1, 2, 2), dilations=((3,), (), (), (1,)), kernel=3)),
    "dinat merging": Small("dinat_s_tiny", dict(embed_dim=16, num_heads=(1, 1, 2, 2), dilations=((1,), (2,), (), ()), kernel=3)),
    "dinat isotropic": Small("dinat_isotropic_small", dict(patch_size=8, embed_dim=32, depth=2, num_heads=2, kernel=3)),
    "a2mamba": Small(
        "a2mamba_nano",
        dict(img_size=96, embed_dims=(8, 8, 16, 16), depths=(0, 0, 1, 1), num_heads=(2, 2, 2, 2), windows=(3, 3, 3, 3)),
        side=96,
        other_side=128,
    ),
    "lwganet": Small("lwganet_l0", dict(embed_dim=16, depths=(1, 0, 1, 1), kernel=3, feature_dim=16), side=96, other_side=128),
    "l2vit": Small("l2vit_tiny", dict(embed_dims=(16, 16, 16, 32), depths=(2, 0, 0, 1), num_heads=(1, 1, 1, 2))),
    "patnet": Small("patnet_t0", dict(embed_dim=8, depths=(1, 0, 0, 1), feature_dim=32)),
    "vir": Small(
        "vir_tiny",
        dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
        side=32,
        other_side=None,
        resized=dict(img_size=48),
        attention=False,
    ),
    "softhgnn": Small(
        "softhgnn_vit_cifar",
        dict(embed_dim=32, depth=1, num_heads=2, head_dim=16, mlp_dim=32, edges=4, edge_heads=2),
        side=32,
        other_side=None,
        resized=dict(img_size=48),
    ),
    "softhgnn selection": Small(
        "softhgnn_vit_ses_tiny",
        dict(embed_dim=32, depth=1, num_heads=2, head_dim=16, mlp_dim=32, edges=6, edge_heads=2, dynamic=4, top_k=2),
        side=32,
        other_side=None,
        resized=dict(img_size=48),
        unused=("soft_hgnn.gate",),  # the released layer has it and never uses it
    ),
    "dcls": Small("convnext_dcls_tiny", dict(depths=(1, 0, 0, 1), dims=(8, 8, 8, 16), size=9, count=6), attention=False),
    "dcls-thesis": Small(
        "convnext_dcls_tiny_gauss", dict(depths=(1, 0, 0, 1), dims=(8, 8, 8, 16), size=9, count=6), attention=False
    ),
    "monarch": Small(
        "monarch_vit_s_16",
        dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2),
        side=32,
        other_side=None,
        resized=dict(img_size=48),
    ),
    "monarch-mixer": Small(
        "m2_vit_b",
        dict(img_size=32, patch_size=8, embed_dim=16, depth=1, width=8),
        side=32,
        other_side=None,
        resized=dict(img_size=48),
        attention=False,
    ),
    "hyena-nd": Small(
        "hyena_nd_vit_tiny_hybrid",
        dict(img_size=32, patch_size=8, embed_dim=16, depth=2, hyena_depth=1, num_heads=2),
        side=32,
        other_side=None,
        resized=dict(img_size=48),
    ),
    "res-vmamba": Small("res_vmamba_vssm_tiny", dict(embed_dim=16, depths=(1, 0, 1, 0), expand=1.0, states=2), attention=False),
    "dsm": Small("dsm_small", dict(img_size=64, embed_dims=(16, 16, 16, 24), depths=(1, 1, 0, 0)), attention=False),
    "dct-histotransformer": Small(
        "dct_histotransformer", dict(embed_dims=(16, 16, 16, 24), depths=(1, 1, 0, 0), num_heads=(1, 2, 2, 2))
    ),
    "maformer": Small(
        "maformer_small",
        dict(img_size=64, embed_dims=(16, 16, 16, 24), depths=(1, 0, 0, 1), num_heads=(1, 2, 2, 2), coarse=6),
        other_side=None,
        resized=dict(img_size=96),
    ),
    "dualtoken-vit": Small(
        "dualtoken_vit_small",
        dict(img_size=64, embed_dims=(16, 16, 16, 24), depths=(1, 0, 0, 1), num_heads=(1, 2, 2, 2)),
        other_side=None,
        resized=dict(img_size=96),
    ),
    "tic": Small("tic_tiny", dict(embed_dims=(16, 16, 16, 24), depths=(2, 0, 0, 0), num_heads=(1, 2, 2, 2))),
    "duoformer": Small(
        "duoformer_resnet50_3scales",
        dict(img_size=64, backbone="test_resnet", embed_dim=32, depth=1, num_heads=2),
        other_side=None,
        resized=dict(img_size=96),
        unused=("fc_norm",),  # the released head reads the class token ahead of it
    ),
    "duoformer channel": Small(
        "duoformer_resnet50_3scales_channel",
        dict(img_size=64, backbone="test_resnet", embed_dim=32, depth=1, num_heads=2, scales=2),
        other_side=None,
        resized=dict(img_size=96),
        unused=("fc_norm",),
    ),
    "shift-equivariant-vit": Small(
        "polytwins_svt_small",
        dict(embed_dims=(16, 16, 16, 32), num_heads=(1, 1, 1, 2), depths=(2, 1, 1, 1), wss=(2, 2, 2, 2), sr_ratios=(4, 2, 2, 1)),
        other_side=128,
        uneven=True,
    ),
    "shift-equivariant-vit polyvit": Small(
        "polyvit_small", dict(patch_size=8, embed_dim=32, depth=1, num_heads=2), side=32, other_side=48
    ),
    "van": Small("van_b0", dict(embed_dims=(16, 16, 24, 32), depths=(1, 0, 0, 1)), attention=False),
    "moh": Small(
        "moh_transnext_base_50",
        dict(embed_dims=(24,) * 4, num_heads=(6,) * 4, shared_head=(2,) * 4, routed_head=(2,) * 4, depths=(1, 0, 0, 1)),
    ),
    "t2t-vit": Small(
        "t2t_vit_7",
        dict(img_size=64, embed_dim=32, depth=2, num_heads=2),
        other_side=None,
        resized=dict(img_size=96),
    ),
    "vig-gla": Small("vig_gla_t", dict(img_size=64, embed_dim=24, depth=1, num_heads=3), attention=False),
    "vig-gla hierarchical": Small(
        "vig_gla_h_t", dict(embed_dim=16, depths=(0, 1, 0, 0), num_heads=(1, 1, 2, 2)), attention=False
    ),
    "msvmamba": Small("msvmamba_nano", dict(embed_dim=16, depths=(0, 0, 1, 0)), attention=False),
    "msvmamba v3": Small("msvmambav3_tiny_224", dict(embed_dim=16, depths=(0, 0, 1, 0)), attention=False),
    "channelvit": Small("channelvit_small", dict(img_size=64, embed_dim=32, num_heads=2, depth=2)),
    "chada-vit": Small("chada_vit_moyen", dict(img_size=64, embed_dim=32, depth=2, hidden_dim=64)),
    "gmm-attention": Small(
        "gmm_vit_cifar",
        dict(embed_dim=24, depth=4, num_heads=2),
        side=32,
        other_side=None,
        resized=dict(img_size=48, patch_size=4),
    ),
    "gmm-attention swin": Small(
        "gmm_swin_cifar",
        dict(embed_dim=16, depths=(2, 1, 1), num_heads=(1, 2, 2)),
        side=32,
        other_side=None,
        resized=dict(img_size=48, window_size=6),
    ),
    "gmm-attention cait": Small(
        "gmm_cait_tiny_cifar",
        dict(embed_dim=24, depth=2, num_heads=2, head_dim=16, mlp_dim=48),
        side=32,
        other_side=None,
        resized=dict(img_size=48),
    ),
    "gmm-attention pit": Small(
        "gmm_pit_cifar",
        dict(patch_size=4, embed_dim=16, depths=(1, 1, 1), num_heads=(1, 2, 4)),
        side=32,
        other_side=None,
        resized=dict(img_size=48),
        # The head reads the class token alone, whose scores are not masked.
        unused=("stages.2.blocks.0.attn.mask",),
    ),
    "gmm-attention t2t": Small(
        "gmm_t2t_tinyimagenet",
        dict(img_size=32, token_dim=8, embed_dim=32, depth=2, num_heads=2),
        side=32,
        other_side=None,
        resized=dict(img_size=48),
        unused=("patch_embed.cls_token", "patch_embed.norm"),  # official checkpoints have them
    ),
    "patch-scaling": Small(
        "patch_scaling_tiny_patch4_64",
        dict(patch_size=8, embed_dim=24, depth=4, num_heads=2, checkpoint_tokens=16),
        other_side=None,
        resized=dict(img_size=96),
    ),
    "patch-scaling adventurer": Small(
        "adventurer_tiny_patch16_64",
        dict(patch_size=8, embed_dim=64, depth=3, checkpoint_tokens=16),
        other_side=None,
        resized=dict(img_size=96),
        attention=False,
    ),
    "minimal-transformer": Small(
        "minimal_transformer_cifar10_6_1_nomlp_symmetry",
        dict(embed_dim=16, depth=2),
        side=32,
        other_side=None,
        resized=dict(img_size=48),
    ),
    "sret": Small(
        "sret_t",
        dict(img_size=64, base_dim=8, heads=(1, 2, 4), depths=(1, 0, 1)),
        other_side=None,
        resized=dict(img_size=96),
    ),
    "crate": Small(
        "crate_tiny",
        dict(img_size=64, embed_dim=32, num_heads=2, depth=2),
        other_side=None,
        resized=dict(img_size=96),
    ),
    "dhvt": Small("dhvt_tiny_imagenet_patch16", dict(embed_dim=48, depth=2)),
    "illama": Small(
        "illama_tiny",
        dict(img_size=64, embed_dim=32, num_heads=2, depth=2),
        other_side=None,
        resized=dict(img_size=96),
    ),
    "spectformer": Small(
        "spectformer_s",
        dict(img_size=64, stem_hidden_dim=8, embed_dims=(16, 16, 24, 32), num_heads=(1, 1, 2, 2), depths=(1, 0, 0, 1)),
        other_side=None,
        resized=dict(img_size=96),
    ),
    "spectformer vanilla": Small(
        "spectformer_vanilla_ti",
        dict(img_size=64, embed_dim=32, num_heads=2, depth=3, alpha=1),
        other_side=None,
        resized=dict(img_size=96),
    ),
}
