"""Which training pictures to keep: few of simple concepts, more of complex ones, and of each the hardest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import VitreousError

CHUNK = 8192  # embeddings compared at once
ROUNDS = 100  # of k-means, at most; of the bisection

Order = Literal["hard", "easy", "random"]


@dataclass(frozen=True)
class Kept:
    """`indices` of what is kept, ascending. counts: of each cluster. complexity: of each cluster, C. shares: of what is kept
    that the softmax gives each. spread: clusters × the largest share: 1 where all get alike, and the method does nothing.
    duplicates: how many were left out first."""

    indices: Tensor
    counts: Tensor
    complexity: Tensor
    shares: Tensor
    spread: float
    duplicates: int


def spherical_kmeans(x: Tensor, k: int, seed: int = 0) -> Tensor:
    """The cluster `[N]` of each unit vector of `x` `[N, D]`: k-means by cosine, begun by k-means++, until nothing moves."""
    draw = torch.Generator().manual_seed(seed)
    centroids = x[torch.randint(len(x), (1,), generator=draw)]
    nearest = (1 - x @ centroids[0]).clamp_min(0)
    for _ in range(k - 1):
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        centroids = torch.cat([centroids, x[torch.multinomial(weights, 1, generator=draw)]])
        nearest = torch.minimum(nearest, (1 - x @ centroids[-1]).clamp_min(0))
    found = torch.full((len(x),), -1)
    for _ in range(ROUNDS):
        new = torch.cat([(part @ centroids.T).argmax(1) for part in x.split(CHUNK)])
        if torch.equal(new, found):
            break
        found = new
        sums = torch.zeros_like(centroids).index_add_(0, found, x)
        full = sums.norm(dim=1) > 0
        centroids = torch.where(full[:, None], F.normalize(sums, dim=1), centroids)
    return found


def complexity(x: Tensor, cluster: Tensor, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    """`distance [N]`, 1 − cosine to the own centroid; `intra [k]`, its mean in each cluster; `inter [k]`, the mean of 1 − cosine
    from each centroid to the `neighbours` nearest others. A cluster's complexity is intra · inter."""
    k = int(cluster.max()) + 1
    sizes = cluster.bincount(minlength=k)
    centroids = F.normalize(torch.zeros(k, x.shape[1], dtype=x.dtype).index_add_(0, cluster, x) / sizes[:, None], dim=1)
    distance = 1 - (x * centroids[cluster]).sum(1)
    intra = torch.zeros(k, dtype=x.dtype).index_add_(0, cluster, distance) / sizes
    apart = (1 - centroids @ centroids.T).fill_diagonal_(torch.inf)
    inter = apart.topk(min(neighbours, k - 1), largest=False).values.mean(1) if k > 1 else torch.ones(1, dtype=x.dtype)
    return distance, intra, inter


def allotted(shares: Tensor, count: int, sizes: Tensor, balance: float = 0.5) -> Tensor:
    """How many of `count` each cluster keeps, not yet rounded: the x that minimises Σ (x − shares · count)² with Σ x = `count`,
    x at most the cluster's size and at least `balance` of an equal part (at least one, and never all because of it).

    The paper solves this as a quadratic program; it is clip(shares · count + ν, least, most), with ν found by bisection.
    """
    k = len(sizes)
    least = torch.minimum(torch.full((k,), float(max(int(count / k * balance), 1))), (sizes - 1).double()).double()
    if count < least.sum():
        raise VitreousError(f"{count} of {int(sizes.sum())} cannot be kept of {k} clusters: keep more, or make fewer clusters")
    wanted, most = shares.double() * count, sizes.double()
    low, high = -float(count), float(max(count, int(most.max())) + count)
    clip = lambda nu: torch.minimum(torch.maximum(wanted + nu, least), most)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if clip(middle).sum() < count else (low, middle)
    return clip(high)


def whole(x: Tensor, sizes: Tensor) -> Tensor:
    """`x` in whole numbers of the same sum: the largest remainders are rounded up."""
    floor = (x + 1e-6).floor().long()
    missing = int(x.sum().round()) - int(floor.sum())
    free = torch.where(floor < sizes, x - floor, -1.0)
    floor[free.topk(missing).indices] += 1
    return floor


def chosen(distance: Tensor, cluster: Tensor, counts: Tensor, order: Order = "hard", seed: int = 0) -> Tensor:
    """Indices, ascending, of as many of each cluster as `counts`: those farthest from its centroid, nearest, or any."""
    if order == "random":
        distance = torch.rand(len(distance), generator=torch.Generator().manual_seed(seed))
    found = []
    for j, count in enumerate(counts.tolist()):
        members = (cluster == j).nonzero().flatten()
        found.append(members[distance[members].argsort(descending=order != "easy", stable=True)[:count]])
    return torch.cat(found).sort().values


def without_duplicates(x: Tensor, cluster: Tensor, alike: float) -> Tensor:
    """Indices, ascending, when of two in a cluster whose cosine is above `alike` the one nearer to its centroid goes
    (Abbas et al., "SemDeDup", 2023)."""
    left = []
    for j in cluster.unique().tolist():
        members = (cluster == j).nonzero().flatten()
        middle = F.normalize(x[members].mean(0), dim=0)
        members = members[(x[members] @ middle).argsort(stable=True)]  # the farthest first
        held = x[members]
        gone = torch.zeros(len(members), dtype=torch.bool)
        for i in range(1, len(members)):
            gone[i] = bool((held[:i] @ held[i] > alike).any())
        left.append(members[~gone])
    return torch.cat(left).sort().values


def by_concepts(
    embeddings: Tensor,
    keep: float,
    *,
    clusters: int = 100,
    temperature: float = 0.1,
    neighbours: int = 20,
    balance: float = 0.5,
    order: Order = "hard",
    alike: float | None = None,
    seed: int = 0,
) -> Kept:
    """Abbas, Rusak, Tirumala, Brendel, Chaudhuri & Morcos, "Effective pruning of web-scale datasets based on complexity of
    concept clusters" (ICLR 2024): density-based pruning.

    embeddings: `[N, D]`, of any model; they are brought to unit length. keep: share of them. alike: of two in a cluster with a
        cosine above this one goes first, as near-duplicates make clusters of their own (None: none does).
    clusters: concepts, the paper's 500 for 280 million pictures; its DataComp has 100. temperature: the smaller, the more goes to
        complex clusters. Products of two cosine distances are small, so the shares are nearly alike even at the published 0.1:
        see `Kept.spread`. neighbours: of a centroid, whose distances tell how alone it is.
    order: "hard" keeps those farthest from their centroid, as published; "easy" the nearest, better where little is left of each
        class (Sorscher et al., 2022).

    Raises `VitreousError` for a share that is none, fewer embeddings than clusters, and clusters that would be left empty.
    """
    if not 0 < keep <= 1:
        raise VitreousError(f"keep must lie in (0, 1], not {keep}")
    if temperature <= 0 or clusters < 1 or neighbours < 1 or not 0 <= balance <= 1:
        raise VitreousError("temperature must be above 0, clusters and neighbours at least 1, balance between 0 and 1")
    if len(embeddings) < clusters:
        raise VitreousError(f"{len(embeddings)} embeddings make no {clusters} clusters: a tenth of that is plenty")
    if not torch.isfinite(embeddings).all():
        raise VitreousError("the embeddings hold NaN or infinity: try the model in float32")
    count = max(1, round(keep * len(embeddings)))
    x = F.normalize(embeddings.double(), dim=1)
    cluster = spherical_kmeans(x, clusters, seed)
    left = torch.arange(len(x)) if alike is None else without_duplicates(x, cluster, alike)
    duplicates = len(x) - len(left)
    cluster = cluster[left].unique(return_inverse=True)[1]
    distance, intra, inter = complexity(x[left], cluster, neighbours)
    hard = intra * inter
    shares = (hard / temperature).softmax(0)
    sizes = cluster.bincount()
    counts = whole(allotted(shares, min(count, len(left)), sizes, balance), sizes)
    indices = left[chosen(distance, cluster, counts, order, seed)]
    return Kept(indices, counts, hard, shares, float(len(shares) * shares.max()), duplicates)
