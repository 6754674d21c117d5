"""How well features find pictures of the same class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import VitreousError

ROWS = 1024  # queries whose similarities to all others are held at once


@torch.no_grad()
def retrieval(features: Tensor, labels: Tensor, ks: Sequence[int] = (1, 2, 4, 8)) -> dict[str, float]:
    """Recall@k and MAP@R of `features [N, D]`, each picture asked for among all others by cosine; shares in [0, 1].

    Recall@k (Jégou et al., 2011): how often one of the k nearest is of the same class. MAP@R (Musgrave, Belongie & Lim, "A Metric
    Learning Reality Check", ECCV 2020): the precision at each of the R nearest that are right, summed and divided by R, the
    number of others of that class; classes of one picture are left out. Raises `VitreousError` where no class has two pictures.
    """
    counts = torch.bincount(labels)[labels] - 1
    if not bool((counts > 0).any()):
        raise VitreousError("retrieval needs classes of at least two pictures each")
    features = F.normalize(features.float(), dim=1)
    most = max(int(counts.max()), *ks)
    most = min(most, len(features) - 1)
    found: dict[str, list[Tensor]] = {**{f"recall@{k}": [] for k in ks}, "map@r": []}
    for place in torch.arange(len(features), device=features.device).split(ROWS):
        scores = features[place] @ features.mT
        scores[torch.arange(len(place)), place] = -torch.inf
        right = labels[scores.topk(most, 1).indices] == labels[place][:, None]  # [q, most]
        asked = counts[place] > 0
        for k in ks:
            found[f"recall@{k}"].append(right[:, :k].any(1)[asked])
        r, rank = counts[place][:, None], torch.arange(1, most + 1, device=labels.device)
        precise = right.cumsum(1) / rank * right * (rank <= r)
        found["map@r"].append((precise.sum(1) / r[:, 0].clamp_min(1))[asked])
    return {name: float(torch.cat(parts).float().mean()) for name, parts in found.items()}
