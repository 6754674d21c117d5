"""`vitreous studio`: the web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def studio(
    models: Annotated[list[str] | None, typer.Argument(help="timm names or saved models; the bundled model by default")] = None,
    data: Annotated[str, typer.Option(help="sample, fashion-mnist, cifar10, or a folder of pictures")] = "sample",
    checkpoint: Annotated[Path | None, typer.Option(help="local weights for the first model")] = None,
    pretrained: Annotated[bool, typer.Option(help="download timm's weights")] = False,
    img_size: Annotated[int | None, typer.Option(min=1, help="input size to build the models for")] = None,
    host: Annotated[
        str, typer.Option(help="address to serve on; others than this machine's are for those who know why")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to serve on")] = 8080,
    show: Annotated[bool, typer.Option(help="open a browser")] = True,
) -> None:
    """Look into models in the browser: attention, heads, patterns, and recipes applied."""
    import socket

    from ..errors import VitreousError

    try:
        from ..studio.page import serve
    except ImportError as error:
        raise VitreousError(f"the studio needs {error.name}: python -m pip install 'vitreous[studio]'") from None
    from ..studio.opened import Opened, Source

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise VitreousError(f"cannot serve on {host}:{port}: {error.strerror}; give another --port") from None
    sources = [
        Source(name, data, checkpoint if i == 0 else None, pretrained, img_size) for i, name in enumerate(models or [None])
    ]
    opened = [Opened(source) for source in sources]
    print(f"the studio is open at http://{host}:{port}, until Ctrl-C")
    serve(opened, host, port, show)
