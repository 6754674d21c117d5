"""The record of a search: one line a finding, appended as it is made, so that a stopped search goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import VitreousError
from ..files import write_whole
from ..schema import read_json

VERSION = 1


class Record:
    """Findings by kind and key, in a file of JSON lines; the first line says of what they are.

    A line counts once it is whole: what a killed process left half written is cut off. `about` tells of the model, the images
    and the machine; a record of others is refused, by the name of what differs.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[tuple[str, str], Any] = {}
        self.busy: set[tuple[str, str]] = set()  # that other processes are at: none, as in `SharedRecord`
        about = {"vitreous search": VERSION, **about}
        if not path.exists():
            write_whole(path, json.dumps(about) + "\n")
            return
        lines = path.read_bytes().split(b"\n")
        if lines[-1]:  # no line end: it was being written
            write_whole(path, b"\n".join([*lines[:-1], b""]))
        entries = [read_json(line, f"{path}, line {i + 1}") for i, line in enumerate(lines[:-1])]
        if not entries or not isinstance(entries[0], dict) or "vitreous search" not in entries[0]:
            raise VitreousError(f"{path} is no record of a search: give another --out")
        for name, value in about.items():
            if entries[0].get(name) != value:
                there = entries[0].get(name)
                raise VitreousError(f"{path.parent} holds a search of another {name} ({there}, not {value}): give another --out")
        for i, entry in enumerate(entries[1:]):
            if not isinstance(entry, dict) or not {"kind", "key", "value"} <= entry.keys():
                raise VitreousError(f"{path}, line {i + 2} is no finding of a search: remove that line, or give another --out")
            self.found[entry["kind"], entry["key"]] = entry["value"]

    def get(self, kind: str, key: str) -> Any:
        return self.found.get((kind, key))

    def add(self, kind: str, key: str, value: Any) -> Any:
        """Keep it, on disk when this returns; gives `value` back."""
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps({"kind": kind, "key": key, "value": value}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise VitreousError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.found[kind, key] = value
        return value

    def spent(self) -> float:
        """Seconds of work that led to what is here."""
        return sum(v.get("seconds", 0.0) for v in self.found.values())

    def refresh(self) -> None:
        """Nobody else writes here: the folder is locked."""

    def claim(self, kind: str, key: str) -> bool:
        return True

    def release(self, kind: str, key: str) -> None:
        """Nothing was claimed from others."""

    def all(self, kind: str) -> dict[str, Any]:
        return {key: value for (k, key), value in self.found.items() if k == kind}
