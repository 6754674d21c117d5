"""Fewer tokens, healed: every token step on one ViT, taught by `heal` for as long as the model itself is trained on."""

from __future__ import annotations

import vitreous as vt
from vitreous.prove.cost import macs

from .bench import Bench, Figures, experiment


@experiment("evit", "tome", "mctf", "sit", "stvit", "sparsifiner", baseline="original, trained on as long")
def tokens(bench: Bench, seed: int) -> dict[str, Figures]:
    """Patches half as wide as in the other experiments, so that there are four times as many tokens to drop."""
    t, depth = vt.tokens, bench.scale.depth
    at = tuple(sorted({depth * i // 4 for i in (1, 2, 3)}))
    each = max(1, round((32 * 2 // bench.scale.patch) ** 2 * 0.8 / depth))
    steps = {
        "EViT, 0.7": t.EViT(keep=0.7, at=at), "ToMe": t.ToMe(r=each), "MCTF": t.MCTF(r=each),
        "TokenSlimming": t.TokenSlimming(), "SemanticTokens": t.SemanticTokens(tokens=16),
        "Sparsifiner, 0.25": t.Sparsifiner(budget=0.25),
    }  # fmt: skip
    original = bench.teach(bench.vit(seed, patch_size=bench.scale.patch // 2), bench.train, seed=seed)
    given = dict(optimiser=vt.learn.AdamW(lr=3e-4), seed=seed + 1000)
    longer = bench.teach(original, bench.train, **given)
    whole, x = macs(original.cpu(), bench.test[0][:1].cpu()), bench.test[0][:1].cpu()
    found = {
        "original": {"accuracy": bench.right(original), "gradients": 1.0, "of the MACs, %": 100.0},
        "original, trained on as long": {"accuracy": bench.right(longer), "gradients": 2.0, "of the MACs, %": 100.0},
    }
    for name, step in steps.items():
        small = vt.slim(original.cpu(), step, bench.train[0][:64].cpu())
        healed = bench.heal(small, original, bench.train, **given)
        found[name] = {
            "accuracy": bench.right(healed), "gradients": 2.0, "of the MACs, %": 100 * macs(healed.cpu(), x) / whole,
            "accuracy untrained": bench.right(small),
        }  # fmt: skip
    return found
