"""What patterns heads have learned: named by measurable rules, and laid out by an autoencoder."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from .. import calibrate
from ..errors import VitreousError
from ..work import tick
from .distance import hops_and_pixels
from .patches import grid_of
from .stream import Images, batches, heads_seen, side_by_side, tell

COMPASS = {
    (0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down",
    (-1, -1): "up left", (-1, 1): "up right", (1, -1): "down left", (1, 1): "down right",
}  # fmt: skip
QUERIES = 256
SAMPLE = 16
LATENT = 8


@dataclass(frozen=True)
class Patterns:
    """Every head's pattern: its class by rules, its cluster and its place in two dimensions; NaN or "" for absent heads."""

    images: int
    grid: tuple[int, int]
    layers: tuple[str, ...]
    labels: np.ndarray
    """`[layers, heads]` of str."""
    shares: dict[str, float]
    """Share of all heads in each class, the largest first."""
    measures: dict[str, np.ndarray]
    """`[layers, heads]` each; what the classes are decided on."""
    offsets: np.ndarray
    """`[layers, heads, 2h - 1, 2w - 1]`: mean attention to the patch so far away, over the queries that have one there."""
    latent: np.ndarray
    """`[layers, heads, 8]`: the autoencoder's code of the head."""
    at: np.ndarray
    """`[layers, heads, 2]`: the two principal components of the codes."""
    clusters: np.ndarray
    """`[layers, heads]` from 1, by Ward's method on the codes; 0 for absent heads."""
    error: float
    """Share of the variance of the autoencoder's inputs that it does not reconstruct."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a head: layer, head, class, cluster, place in two dimensions, and the measures."""
        return [
            {
                "layer": int(layer), "name": self.layers[layer], "head": int(head), "pattern": str(self.labels[layer, head]),
                "cluster": int(self.clusters[layer, head]),
                "x": float(self.at[layer, head, 0]), "y": float(self.at[layer, head, 1]),
                **{name: float(v[layer, head]) for name, v in self.measures.items()},
            }
            for layer, head in np.argwhere(self.clusters > 0)
        ]  # fmt: skip


def patterns(model: nn.Module, images: Images, clusters: int = 8, batch: int = 16, seed: int = 0) -> Patterns:
    """The attention pattern of every head of `model`'s blocks over a data set.

    After "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt" (Li et al., 2023): an autoencoder on
    attention maps, trained here, lays heads out. Its input is not the paper's whole map but a summary that is the same for every
    number of images: the head's mean attention by relative offset, what each place receives, and the share on prefix tokens
    (square roots, so that Euclidean distances are Hellinger's). It learns from 16 images, each head of each a sample, and
    encodes each head's mean over all images. The codes are clustered by Ward's method.

    The classes are ours, each by a rule; the first that holds names the head. Queries are patches, and all but the first rule
    look at attention among patches, each row made to sum to 1:

    - "sink": half of the attention or more goes to the prefix tokens, or on average over queries to one same patch.
    - "self": a patch pays itself half or more.
    - "neighbour: left" (and so on, eight ways): 0.4 or more to that one neighbour, over the queries that have it.
    - "local": half or more within r hops, and 1.5 times what a uniform head has there; r is a seventh of the shorter side.
    - "ring": 0.4 or more at one number of hops from 1 up, and twice what a uniform head has there.
    - "global": the entropy of a row is 0.9 of its greatest, log(h·w), or more.
    - "content": what the images change explains more than half of the variance of the map's entries, the place (query and
      key, whatever the image) the rest; needs two images.
    - "mixed": none of these.

    Grids of over 256 patches are measured at 256 queries, spread evenly.

    Args:
        images: `[N, C, H, W]`, or a data set of `vt.data`.
        clusters: how many clusters to make.

    Raises `VitreousError` for a model without one grid of patches, or a layer that does not attend over all of it.
    """
    if clusters < 1:
        raise VitreousError(f"clusters must be at least 1, not {clusters}")
    known = calibrate.count(images)
    wanted = set(np.linspace(0, known - 1, min(SAMPLE, known)).round().astype(int).tolist()) if known else set(range(SAMPLE))
    anatomy = grid = None
    total: Any = 0.0  # sums over images, and the numbers of images in which a query asked
    samples, seen = [], 0
    for x, _ in batches(images, None, batch, model):
        if anatomy is None or grid is None:
            anatomy, grid = grid_of(model, x[:1], "see.patterns")
        prefix, patches = anatomy.prefix, grid[0] * grid[1]
        queries = torch.linspace(0, patches - 1, min(QUERIES, patches)).round().long().to(x.device)

        def note(a: Tensor, asks: Tensor, prefix: int = prefix, queries: Tensor = queries) -> Tensor:
            rows = a[:, :, prefix + queries]
            on_prefix = rows[..., :prefix].sum(-1)
            among = rows[..., prefix:]
            among = among / among.sum(-1, keepdim=True).clamp_min(1e-12)
            entropy = torch.special.entr(among).sum(-1)
            asking = asks[:, prefix + queries].float()[:, None].expand(-1, a.shape[1], -1)
            parts = (among, torch.stack([on_prefix, entropy, among.square().sum(-1), torch.ones_like(entropy)], -1))
            return torch.cat(parts, -1) * asking[..., None]  # [B, heads, queries, patches + 4]

        found, _, _ = heads_seen(model, x, anatomy, grid, note)
        total = total + side_by_side([f.double().sum(0, keepdim=True) for f in found])[0]
        for i in wanted.intersection(range(seen, seen + len(x))):
            one = side_by_side([f[i - seen : i - seen + 1] for f in found])[0].cpu().double()
            samples.append(_summary(one, queries.cpu(), grid)[1].flatten(0, 1).float())
        seen += len(x)
        tell(int(0.9 * seen), images)
    assert anatomy is not None and grid is not None
    total, queries = total.cpu(), torch.linspace(0, grid[0] * grid[1] - 1, min(QUERIES, grid[0] * grid[1])).round().long()
    offsets, summary = _summary(total, queries, grid)
    measures = _measures(total, queries, grid, offsets)
    exist = ~np.isnan(measures["prefix"])
    labels = np.full(exist.shape, "", dtype=object)
    for layer, head in np.argwhere(exist):
        own = {name: float(v[layer, head]) for name, v in measures.items()}
        labels[layer, head] = _label(own, offsets[layer, head].numpy(), grid)
    heads, learned = summary[torch.from_numpy(exist)].float(), torch.cat(samples)
    codes, error = _encode(learned[~learned.isnan().any(1)], heads, seed)
    latent, at = np.full((*exist.shape, LATENT), np.nan), np.full((*exist.shape, 2), np.nan)
    latent[exist] = codes
    centred = codes - codes.mean(0)
    at[exist] = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    numbers = np.zeros(exist.shape, int)
    tree = scipy.cluster.hierarchy
    numbers[exist] = tree.fcluster(tree.linkage(codes, "ward"), clusters, "maxclust") if len(codes) > 1 else 1
    counts = Counter(labels[exist].tolist()).most_common()
    tick(1.0)
    return Patterns(
        seen, grid, tuple(b.attention.name for b in anatomy.blocks), labels,
        {name: n / int(exist.sum()) for name, n in counts}, measures, offsets.numpy(), latent, at, numbers, error,
    )  # fmt: skip


def _summary(total: Tensor, queries: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The offset map `[layers, heads, 2h - 1, 2w - 1]`, and what the autoencoder sees `[layers, heads, features]`."""
    (h, w), count = grid, total[..., -1]
    mean = total[..., : h * w] / count[..., None].clamp_min(1)
    row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
    there = (row - row[queries, None] + h - 1) * (2 * w - 1) + column - column[queries, None] + w - 1
    # A query that never asked, since its patch was given up, counts nowhere.
    asked = (count > 0).double()[..., None].expand_as(mean).flatten(2)
    size = (*mean.shape[:2], (2 * h - 1) * (2 * w - 1))
    summed = torch.zeros(size).double().index_add(2, there.flatten(), mean.flatten(2))
    pairs = torch.zeros(size).double().index_add(2, there.flatten(), asked)
    received = mean.sum(2) / (count > 0).sum(2, keepdim=True).clamp_min(1)
    on_prefix = (total[..., h * w].sum(2) / count.sum(2).clamp_min(1))[..., None]
    features = torch.cat([summed / summed.sum(2, keepdim=True), received, on_prefix], 2).clamp_min(0).sqrt()
    return (summed / pairs.clamp_min(1)).unflatten(2, (2 * h - 1, 2 * w - 1)), features


def _measures(total: Tensor, queries: Tensor, grid: tuple[int, int], offsets: Tensor) -> dict[str, np.ndarray]:
    h, w = grid
    count = total[..., -1]
    asked = count.sum(2)
    mean = total[..., : h * w] / count[..., None].clamp_min(1)
    weight = (count / asked[..., None])[..., None]  # [layers, heads, queries, 1]
    hops, _ = hops_and_pixels(grid, (1, 1))
    profile = (mean * weight).flatten(2) @ torch.eye(int(hops.max()) + 1).double()[hops[queries].flatten()]
    uniform = torch.bincount(hops[queries].flatten()) / hops[queries].numel()
    near = min(h, w) // 7 or 1
    # The sum of squares splits into what the mean map explains and what images change; the latter is estimated without bias.
    squares = total[..., h * w + 2] / count.clamp_min(1)
    changed = (squares - mean.square().sum(-1)).clamp_min(0) * count / (count - 1)
    changed = torch.where(count == 1, torch.nan, changed)
    overall = (mean * weight).sum((2, 3), keepdim=True) / (h * w)
    placed = ((mean - overall).square().sum(-1) - changed / count).clamp_min(0)
    by_image, by_place = ((v * weight[..., 0]).sum(2) for v in (changed, placed))
    shares = profile[..., 1:] / uniform[1:]
    ring = torch.where(shares >= 2, profile[..., 1:], 0.0)
    found = {
        "prefix": total[..., h * w].sum(2) / asked,
        "one_place": (mean * weight).sum(2).amax(-1),
        "self": profile[..., 0],
        "near": profile[..., : near + 1].sum(-1),
        "near_over_uniform": profile[..., : near + 1].sum(-1) / uniform[: near + 1].sum(),
        "ring": ring.amax(-1),
        "ring_hops": ring.argmax(-1) + 1.0,
        "evenness": total[..., h * w + 1].sum(2) / asked / np.log(h * w),
        "content": by_image / (by_image + by_place),
    }
    return {name: torch.where(asked.isnan(), torch.nan, v).numpy() for name, v in found.items()}


def _label(own: dict[str, float], offsets: np.ndarray, grid: tuple[int, int]) -> str:
    h, w = grid
    around = {way: offsets[h - 1 + dy, w - 1 + dx] for (dy, dx), way in COMPASS.items() if abs(dy) < h and abs(dx) < w}
    way = max(around, key=lambda k: around[k])
    if own["prefix"] >= 0.5 or own["one_place"] >= 0.5:
        return "sink"
    if own["self"] >= 0.5:
        return "self"
    if around[way] >= 0.4:
        return f"neighbour: {way}"
    if own["near"] >= 0.5 and own["near_over_uniform"] >= 1.5:
        return "local"
    if own["ring"] >= 0.4:
        return "ring"
    if own["evenness"] >= 0.9:
        return "global"
    return "content" if own["content"] > 0.5 else "mixed"


def _encode(samples: Tensor, heads: Tensor, seed: int) -> tuple[np.ndarray, float]:
    """Train the autoencoder on `samples` `[n, features]`; the codes `[m, 8]` of `heads`, and the share it cannot reconstruct."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        width = samples.shape[1]
        encode = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, LATENT))
        decode = nn.Sequential(nn.Linear(LATENT, 64), nn.GELU(), nn.Linear(64, width))
        middle = samples.mean(0)
        spread = (samples - middle).square().mean().clamp_min(1e-12)
        optimiser = torch.optim.Adam([*encode.parameters(), *decode.parameters()], lr=3e-3)
        for _ in range(400):
            x = samples[torch.randint(len(samples), (128,))] - middle
            loss = (decode(encode(x)) - x).square().mean() / spread
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        x = samples - middle
        error = float((decode(encode(x)) - x).square().mean() / spread)
        return encode(heads - middle).double().numpy(), error
