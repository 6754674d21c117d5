"""ViR: a ViT whose attention is retention. Hatamizadeh et al., "ViR: Vision Retention Networks" (2023).

Facts from the authors' anonymous release, anom63931/ViR. There the parallel form puts a softmax over all tokens behind the decay,
so that tokens behind still count and the other forms, which have none, compute something else. The paper's is the one without:
`softmax=True` gives the released one, for weights that were trained so (variants `…_parallel` and `…_bidirectional`).
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from timm.layers import Mlp, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import MetaBlock, require_size
from ..mixers.retention import chunkwise_retention, decay_mask, decays, parallel_retention, recurrent_retention
from .classifier import Classifier
from .official import official, publish, renamed

FORMS = {"parallel": parallel_retention, "chunkwise": chunkwise_retention, "recurrent": recurrent_retention}
norm = partial(nn.LayerNorm, eps=1e-6)


class Retention(nn.Module):
    """Retention of tokens `[B, N, C]`, each of which sees those before it.

    form: "parallel", "chunkwise" or "recurrent", which compute the same. softmax: the released parallel form, with a softmax
    over all tokens behind the decay.
    """

    gamma: Tensor

    def __init__(self, channels: int, num_heads: int, form: str = "parallel", softmax: bool = False) -> None:
        super().__init__()
        if form not in FORMS or (softmax and form != "parallel"):
            raise VitreousError(f"form must be one of {', '.join(FORMS)}, with softmax 'parallel', not {form!r}")
        self.num_heads, self.form, self.softmax = num_heads, form, softmax
        self.scale = (channels // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.register_buffer("gamma", decays(num_heads), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = q * self.scale
        if self.softmax:
            x = (q @ k.mT * decay_mask(self.gamma, x.shape[1]).to(q)).softmax(-1) @ v
        else:
            x = FORMS[self.form](q, k, v, self.gamma)
        return self.proj(x.transpose(1, 2).flatten(2))


class ViR(Classifier):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`, read from the class token, which comes last.

    bidirectional: behind the tokens come the same in reverse, so that every patch is seen by every other; the last token is then
    the first patch. form, softmax: as in `Retention`.
    """

    global_pool = "last"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        form: str = "parallel",
        softmax: bool = False,
        bidirectional: bool = False,
        layer_scale: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.bidirectional = bidirectional
        self.size = (img_size, img_size)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.patch_embed.num_patches, embed_dim))
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))

        def block(rate: float) -> nn.Module:
            mixer = Retention(embed_dim, num_heads, form, softmax)
            return MetaBlock(embed_dim, mixer, Mlp(embed_dim, 4 * embed_dim, drop=drop_rate), norm, layer_scale, rate)

        self.blocks = nn.Sequential(*map(block, rates))
        self.norm = norm(embed_dim)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        require_size(x, self.size, "ViR")
        x = torch.cat((self.patch_embed(x) + self.pos_embed, self.cls_token.expand(x.shape[0], -1, -1)), 1)
        if self.bidirectional:
            x = torch.cat((x, x.flip(1)), 1)
        return self.norm(self.blocks(x))

    def pool(self, x: Tensor) -> Tensor:
        return x[:, -1]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours."""
    return renamed(state, (r"\.retention\.out_proj\.", ".attn.proj."), (r"\.retention\.", ".attn."))


SIZES = {
    "tiny": dict(embed_dim=192, num_heads=3),
    "small": dict(),
    "base": dict(embed_dim=768, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "large_patch14": dict(patch_size=14, embed_dim=1024, depth=24, num_heads=16),
}
for _name, _arguments in SIZES.items():
    publish(ViR, f"vir_{_name}", _arguments, variant=f"vir--{_name}", convert=convert, first_conv="patch_embed.proj")
    official(f"vir--{_name}_parallel", partial(ViR, softmax=True, **_arguments), convert)
    official(f"vir--{_name}_bidirectional", partial(ViR, softmax=True, bidirectional=True, **_arguments), convert)
