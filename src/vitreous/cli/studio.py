"""`vitreous studio`: the web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DataOptions, ModelOptions, grouped


@grouped
def studio(
    models: Annotated[list[str] | None, typer.Argument(help="timm names or saved models; the bundled model by default")] = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    host: Annotated[
        str, typer.Option(help="address to serve on; others than this machine's are for those who know why")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to serve on")] = 8080,
    runs: Annotated[Path | None, typer.Option(help="folder of training runs (vitreous train --out) to show and open")] = None,
    show: Annotated[bool, typer.Option(help="open a browser")] = True,
) -> None:
    """Look into models in the browser: attention, heads, patterns, and recipes applied."""
    import socket
    from dataclasses import replace

    from ..errors import VitreousError

    try:
        from ..studio.page import serve
    except ImportError as error:
        raise VitreousError(f"the studio needs {error.name}: python -m pip install 'vitreous[studio]'") from None
    from ..studio.opened import Opened, Source

    if runs is not None and not runs.is_dir():
        raise VitreousError(f"--runs {runs}: there is no such folder")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, TypeError, UnicodeError) as error:
            raise VitreousError(
                f"cannot serve on {host}:{port}: {getattr(error, 'strerror', None) or error}; give another --port"
            ) from None
    first = Source(models[0] if models else None, opening, source)
    others = [replace(first, model=name, opening=opening.beside(name)) for name in (models or [])[1:]]
    opened = [Opened(s) for s in (first, *others)]
    print(f"the studio is open at http://{host}:{port}, until Ctrl-C")
    serve(opened, host, port, show, runs)
