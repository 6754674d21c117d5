"""SN-Net v2: two vision transformers of different size joined by stitching layers, so that one net has many costs.

Pan et al., "Stitched ViTs are Flexible Vision Backbones" (ECCV 2024), sections 3.2 and 3.3. Facts from the official repository,
ziplab/SN-Netv2. There the low-rank part is merged on `eval()`, which loses it when weights are loaded afterwards; here it is
merged only in the model of one route.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import VitreousError
from .official import family, publish, renamed


@dataclass(frozen=True)
class Route:
    """A way through the anchors (0 the small one, 1 the large): `blocks[i]` are the first and one past the last block of
    `anchors[i]`, behind which comes the stitching layer `layers[i]` of that anchor."""

    anchors: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " → ".join(f"{'SL'[a]}{begin}…{end - 1}" for a, (begin, end) in zip(self.anchors, self.blocks, strict=True))


def routes(small: int, large: int) -> list[Route]:
    """All routes through anchors of these depths, in the official order: each alone, S→L, L→S, L→S→L, S→L→S.

    Of S→L the last, behind the last block of the small anchor, leads nowhere and is never used: `usable` leaves it out.
    Raises `VitreousError` where the depths are not one a multiple of the other.
    """
    if small > large or large % small:
        raise VitreousError(f"stitching wants the small model first, and depths that divide: not {small} and {large} blocks")
    times = large // small
    up = [(i, (i + 1) * times, i) for i in range(small)]
    down = [(i, i // times + 1, i // times) for i in range(times - 1, large - 1, times)]
    found = [Route((0,), ((0, small),)), Route((1,), ((0, large),))]
    found += [Route((0, 1), ((0, i + 1), (j, large)), (n,)) for i, j, n in up]
    found += [Route((1, 0), ((0, i + 1), (j, small)), (n,)) for i, j, n in down]
    for i, j, n in down:
        found += [Route((1, 0, 1), ((0, i + 1), (j, k + 1), (m, large)), (n, o)) for k, m, o in up[:-1] if k >= j]
    for i, j, n in up:
        found += [Route((0, 1, 0), ((0, i + 1), (j, k + 1), (m, small)), (n, o)) for k, m, o in down if k >= j]
    return found


class StitchingLayer(nn.Module):
    """y = (W + B A / r) x + b on tokens `[B, N, C]`; W stays as least squares found it, b, A and B learn (equation 3)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=rank == 0)
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.rank = rank
        if rank:
            self.lora_A = nn.Parameter(torch.empty(rank, inputs))
            self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def merged(self) -> Tensor:
        return self.weight + self.lora_B @ self.lora_A / self.rank if self.rank else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged(), self.bias)


class SNNet(nn.Module):
    """Images `[B, C, H, W]` to logits `[B, num_classes]` by the route numbered `route` of `routes`.

    anchors: width, depth and heads of the small one and the large one. rank: of what the stitching layers learn, 0 to learn all
    of it. only: build this one route, with nothing that it does not use. layer_scale, class_position: whether blocks scale
    what they add, and whether the class token has a position embedding.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        anchors: Sequence[Sequence[int]] = ((384, 12, 6), (1024, 24, 16)),
        rank: int = 64,
        only: int | None = None,
        layer_scale: bool = True,
        class_position: bool = False,
        mlp_ratio: float = 4.0,
        global_pool: str = "token",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(anchors) != 2:
            raise VitreousError(f"stitching joins two models, not {len(anchors)}")
        self.anchors = nn.ModuleList(
            VisionTransformer(
                img_size, patch_size, in_chans, num_classes, cast(Any, global_pool), width, depth, heads, mlp_ratio,
                init_values=1e-4 if layer_scale else None, no_embed_class=not class_position, drop_path_rate=drop_path_rate,
            )
            for width, depth, heads in anchors
        )  # fmt: skip
        (c0, d0, _), (c1, d1, _) = anchors
        self.routes = routes(d0, d1)
        self.num_classes, self.num_features, self.only = num_classes, c1, only
        up, down = [r for r in self.routes if r.anchors == (0, 1)], [r for r in self.routes if r.anchors == (1, 0)]
        self.stitches = nn.ModuleList(
            [
                nn.ModuleList(StitchingLayer(c0, c1, 0 if only is not None else rank) for _ in up),
                nn.ModuleList(StitchingLayer(c1, c0, 0 if only is not None else rank) for _ in down),
            ]
        )
        self.route = 0 if only is None else only
        if only is not None:
            self._trim(self.at(only))

    @property
    def usable(self) -> list[int]:
        """Numbers of the routes that end in a block."""
        depths = [len(cast(Any, a).blocks) for a in self.anchors]
        return [i for i, r in enumerate(self.routes) if r.blocks[-1][0] < depths[r.anchors[-1]]]

    def at(self, number: int) -> Route:
        if not 0 <= number < len(self.routes):
            raise VitreousError(f"there are routes 0 to {len(self.routes) - 1}, there is no route {number}")
        return self.routes[number]

    def macs(self, number: int) -> float:
        """Multiply-accumulates of an image in the blocks and stitching layers of a route."""
        route, total = self.at(number), 0.0
        for place, (a, (begin, end)) in enumerate(zip(route.anchors, route.blocks, strict=True)):
            anchor = cast(Any, self.anchors[a])
            width, hidden = anchor.embed_dim, anchor.embed_dim * anchor.blocks[begin].mlp.fc1.out_features // anchor.embed_dim
            n = anchor.patch_embed.num_patches + anchor.num_prefix_tokens
            total += (end - begin) * n * (4 * width**2 + 2 * width * hidden + 2 * n * width)
            if place < len(route.layers):
                total += n * width * cast(Any, self.anchors[route.anchors[place + 1]]).embed_dim
        return total

    def embed(self, x: Tensor, anchor: int) -> Tensor:
        """Images to the tokens `[B, N, C]` that enter the first block of an anchor."""
        a = cast(Any, self.anchors[anchor])
        return a.norm_pre(a.patch_drop(a._pos_embed(a.patch_embed(x))))

    def forward(self, x: Tensor) -> Tensor:
        route = self.at(self.route)
        x = self.embed(x, route.anchors[0])
        for place, (a, (begin, end)) in enumerate(zip(route.anchors, route.blocks, strict=True)):
            x = cast(Any, self.anchors[a]).blocks[begin:end](x)
            if place < len(route.layers):
                x = cast(Any, self.stitches[a])[route.layers[place]](x)
        last = cast(Any, self.anchors[route.anchors[-1]])
        return last.forward_head(last.norm(x))

    @torch.no_grad()
    def merged_state(self, wanted: Iterable[str]) -> dict[str, Tensor]:
        """The tensors called `wanted`, the low-rank parts merged into the weights of their layers."""
        mine = self.state_dict()
        for a, layers in enumerate(cast(Any, self.stitches)):
            mine |= {f"stitches.{a}.{i}.weight": layer.merged() for i, layer in enumerate(layers)}
        return {name: mine[name] for name in wanted}

    def _trim(self, route: Route) -> None:
        for a, anchor in enumerate(cast(Any, self.anchors)):
            used = {i for b, (begin, end) in zip(route.anchors, route.blocks, strict=True) if a == b for i in range(begin, end)}
            for i in set(range(len(anchor.blocks))) - used:
                anchor.blocks[i] = nn.Identity()
            if a != route.anchors[0]:
                anchor.patch_embed.proj, anchor.cls_token, anchor.pos_embed = nn.Identity(), None, None
            if a != route.anchors[-1]:
                anchor.norm, anchor.fc_norm, anchor.head = nn.Identity(), nn.Identity(), nn.Identity()
            stitches = cast(Any, self.stitches[a])
            passed = {n for b, n in zip(route.anchors, route.layers, strict=False) if a == b}
            for i in set(range(len(stitches))) - passed:
                stitches[i] = nn.Identity()


def arguments(small: Any, large: Any) -> dict[str, Any]:
    """With which `SNNet` has these two as its anchors. Raises `VitreousError` for what is no plain ViT of timm's."""
    for model in (small, large):
        if not isinstance(model, VisionTransformer) or not getattr(model, "blocks", None):
            raise VitreousError(f"stitching takes plain vision transformers of timm's, not {type(model).__name__}")
    said = [_shared(m) for m in (small, large)]
    if differ := [k for k in said[0] if said[0][k] != said[1][k]]:
        k = differ[0]
        raise VitreousError(f"the two models cannot be stitched: {k} is {said[0][k]} in one and {said[1][k]} in the other")
    anchors = [[m.embed_dim, len(m.blocks), _whole(m).attn.num_heads] for m in (small, large)]
    return {**said[0], "anchors": anchors}


def _whole(model: Any) -> Any:
    return next((b for b in model.blocks if not isinstance(b, nn.Identity)), model.blocks[0])


def _shared(m: Any) -> dict[str, Any]:
    block, embed = _whole(m), m.patch_embed
    heads = getattr(m.head, "out_features", 0)
    return dict(
        img_size=embed.img_size[0],
        patch_size=embed.patch_size[0],
        in_chans=embed.proj.in_channels,
        num_classes=heads,
        layer_scale=not isinstance(block.ls1, nn.Identity),
        class_position=not m.no_embed_class,
        mlp_ratio=block.mlp.fc1.out_features / m.embed_dim,
        global_pool=m.global_pool,
    )


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(
        state,
        (r"\.gamma_(\d)$", r".ls\1.gamma"),
        (r"^stitch_layers\.(\d)\.(\d+)\.transform\.", r"stitches.\1.\2."),
    )


def told(state: dict[str, Tensor]) -> dict[str, Any]:
    """With which `SNNet` has such weights, of heads 64 wide."""
    depths = [1 + max(int(k.split(".")[3]) for k in state if k.startswith(f"anchors.{a}.blocks.")) for a in (0, 1)]
    widths = [state[f"anchors.{a}.patch_embed.proj.weight"].shape[0] for a in (0, 1)]
    places, patch = state["anchors.0.pos_embed"].shape[1], state["anchors.0.patch_embed.proj.weight"].shape[-1]
    class_position = math.isqrt(places) ** 2 != places
    return dict(
        anchors=[(c, d, max(1, c // 64)) for c, d in zip(widths, depths, strict=True)],
        rank=len(state.get("stitches.0.0.lora_A", ())),
        patch_size=patch,
        img_size=patch * math.isqrt(places),
        class_position=class_position,
        layer_scale="anchors.0.blocks.0.ls1.gamma" in state,
        mlp_ratio=state["anchors.0.blocks.0.mlp.fc1.weight"].shape[0] / widths[0],
    )


for variant, sizes, rank in (
    ("ti_s_r16", ((192, 12, 3), (384, 12, 6)), 16),
    ("s_b", ((384, 12, 6), (768, 12, 12)), 64),
    ("s_l", ((384, 12, 6), (1024, 24, 16)), 64),
    ("b_l", ((768, 12, 12), (1024, 24, 16)), 64),
):
    publish(
        SNNet, f"sn_net_{variant}", dict(anchors=sizes, rank=rank), variant=f"sn-netv2--{variant}", convert=convert,
        first_conv="anchors.0.patch_embed.proj", classifier=("anchors.0.head", "anchors.1.head"), fixed_input_size=True,
    )  # fmt: skip
family("sn-netv2", SNNet, convert, told)
