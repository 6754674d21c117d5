"""The command line: one small file a command."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from typing import Annotated, Any

import typer

from ..errors import VitreousError
from .anatomy import anatomy
from .design import design
from .evolve import evolve
from .faithful import faithful
from .heads import heads
from .label import label
from .merge import merge
from .pretrain import pretrain
from .probe import probe
from .prove import prove
from .run import run
from .search import search
from .see import see
from .ship import ship
from .slim import slim
from .split import split
from .steps import steps
from .stitch import stitch
from .studio import studio
from .systems import systems
from .thin import thin
from .train import train

# typer carries its own copy of click, whose usage errors only this reaches
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

MEMORY = "there is not enough memory for this: take fewer or smaller images, or a smaller model"
UNFORESEEN = "this was not foreseen"  # how the last net begins

app = typer.Typer(
    name="vitreous",
    help="Makes vision transformers clear, small and fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    slim,
    search,
    design,
    evolve,
    stitch,
    ship,
    run,
    prove,
    see,
    faithful,
    heads,
    studio,
    train,
    pretrain,
    probe,
    label,
    thin,
    split,
    merge,
    anatomy,
    steps,
    systems,
):
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
    debug: Annotated[bool, typer.Option("--debug", help="show where in the code an error comes from")] = False,
) -> None:
    pass


_interrupts: list[int] = []


def _interrupt(number: int, _: Any) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; whatever goes wrong is one line on stderr and exit status 2, with `--debug` also its trace."""
    for stream in (sys.stdout, sys.stderr):  # names that are no text, and terminals that know no ×
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    try:
        try:
            # --debug may stand anywhere, as nobody knows before that they will want it
            status = app([w for w in words if w != "--debug"], standalone_mode=False, prog_name="vitreous")
        except Exception:
            if "--debug" in words:
                traceback.print_exc()
            if _interrupts:  # which compiled code turns into errors of its own
                raise KeyboardInterrupt from None
            raise
    except VitreousError as error:
        _stop(str(error), 2)
    except UsageError as error:
        _stop(str(error.format_message()), 2)
    except (typer.Abort, KeyboardInterrupt):
        _stop("stopped: nothing was written", 130)
    except BrokenPipeError:  # whoever read has gone, as in `vitreous systems | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        _stop(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 2)
    except MemoryError:
        _stop(MEMORY, 2)
    except Exception as error:  # the last net: what should have been refused by name, and was not foreseen
        if isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error)):  # torch's
            _stop(MEMORY, 2)
        reason = (str(error).strip().splitlines() or ["it says no more"])[0]
        _stop(f"{UNFORESEEN} ({type(error).__name__}: {reason[:300]}); --debug shows where", 2)
    else:
        if status == 130:  # how typer reports Ctrl-C here
            _stop("stopped: nothing was written", 130)
        sys.exit(status if isinstance(status, int) else 0)


def _stop(message: str, status: int) -> None:
    print(f"vitreous: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
