"""Names in data are printed as they are, whatever rich would read into them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import typer
from rich.markup import render
from support import small_vit

import vitreous as vt
from vitreous.cli import app
from vitreous.terminal import console

ODD = "[b]cat[/b] :smile: [link=x]y [/]"


def test_a_console_takes_text_literally() -> None:
    out = io.StringIO()
    printer = console(file=out, width=200)
    printer.print(f"{ODD}: install vitreous[studio]")
    assert out.getvalue() == f"{ODD}: install vitreous[studio]\n"


def test_a_proof_shows_names_with_brackets() -> None:
    proof = vt.prove({ODD: small_vit(depth=1)}, (torch.randn(4, 3, 32, 32), None), batches=(1,), rounds=2)
    assert ODD in " ".join(repr(proof).replace("│", " ").split())


def test_no_help_is_read_as_markup() -> None:
    def texts(group: Any) -> Any:
        for name, one in group.commands.items():
            yield name, one.help or ""
            yield from ((name, getattr(p, "help", None) or "") for p in one.params)

    for name, text in texts(typer.main.get_command(app)):
        assert render(text).plain == text, f"vitreous {name}: {text}"


def test_no_other_console_is_made() -> None:
    for file in Path(vt.__file__).parent.rglob("*.py"):
        text = file.read_text()
        assert file.name == "terminal.py" or "Console(" not in text, f"{file}: take vitreous.terminal.console"
        assert 'TextColumn("{task.description}")' not in text, f"{file}: markup=False"
