"""`vitreous merge A B C --rule RULE`: one model of several that were trained apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DataOptions, grouped


@grouped
def merge(
    models: Annotated[list[str], typer.Argument(help="saved models of one architecture")],
    *,
    source: DataOptions,
    rule: Annotated[str, typer.Option(help="UniformSoup(), GreedySoup(), LearnedSoup(), OPCM(), PLeaS() …")] = "GreedySoup()",
    base: Annotated[str | None, typer.Option(help="the model that all were fine-tuned from, for OPCM")] = None,
    out: Annotated[Path, typer.Option(help="file to write")] = Path("merged.safetensors"),
    overwrite: Annotated[bool, typer.Option(help="replace --out if it exists")] = False,
) -> None:
    """Merge models without training. Rules that try models do so on held-out images of DATA, and it is proven on others."""
    from .. import store
    from ..data import training_data
    from ..files import writable
    from ..learn import merge as merged
    from ..learn import written
    from ..learn.measure import accuracy_on

    chosen = written.rule(rule)
    writable(out, overwrite, "another --out")
    nets = [store.open_model(m) for m in models]
    start = store.open_model(base) if base is not None else None
    held, check = training_data(source.data, nets[0], limit=source.limit, seed=source.seed, download=source.download)
    notes: list[str] = []
    soup = merged(nets, chosen, base=start, data=held, notes=notes)
    store.save_model(soup, out)
    for line in notes:
        print(line)
    for name, net in (*zip(models, nets, strict=True), (out.name, soup)):
        found = accuracy_on(net, check)
        if found is not None:
            print(f"{name}: {100 * found:.2f} % of {len(check)} other images right")
    print(f"written to {out}")
