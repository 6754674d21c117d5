"""The command line: `vitreous slim | see | faithful | heads | studio | anatomy | steps | systems`. One small file a command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import VitreousError
from .anatomy import anatomy
from .faithful import faithful
from .heads import heads
from .see import see
from .slim import slim
from .steps import steps
from .studio import studio
from .systems import systems

# typer carries its own copy of click, whose usage errors only this reaches
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="vitreous",
    help="Makes vision transformers clear, small and fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (slim, see, faithful, heads, studio, anatomy, steps, systems):
    app.command()(command)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        from .. import __version__

        beneath = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "openvino", "onnxruntime"))
        print(f"vitreous {__version__}: {beneath}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print versions and stop")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit status 2."""
    try:
        status = app(standalone_mode=False, prog_name="vitreous")
    except VitreousError as error:
        _stop(str(error), 2)
    except UsageError as error:
        _stop(str(error.format_message()), 2)
    except (typer.Abort, KeyboardInterrupt):
        _stop("stopped: nothing was written", 130)
    except OSError as error:
        _stop(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 2)
    else:
        if status == 130:  # how typer reports Ctrl-C here
            _stop("stopped: nothing was written", 130)
        sys.exit(status if isinstance(status, int) else 0)


def _stop(message: str, status: int) -> None:
    print(f"vitreous: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
