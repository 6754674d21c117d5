"""Five hundred bad inputs from a fixed seed; `fuzz.py` tries any number."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).parent / "fuzz.py")
assert spec and spec.loader
fuzz: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

NUMBERS = {"images": 130, "signals": 60, "shards": 20, "checkpoints": 60, "saved": 70, "recipes": 100}
NUMBERS |= {"calls": 60, "shipped": 20, "runs": 20, "arguments": 40}


@pytest.mark.parametrize("kind", NUMBERS)
def test_bad_input_is_refused_in_one_line(kind: str) -> None:
    failures = [failed for seed in range(NUMBERS[kind]) if (failed := fuzz.attempt(kind, seed))]
    assert not failures, "\n".join(failures[:3])


def test_the_fuzzer_would_tell() -> None:
    fuzz.KINDS["broken"] = lambda rng, folder: [][rng.randrange(3)]
    try:
        assert "IndexError" in fuzz.attempt("broken", 0)
    finally:
        del fuzz.KINDS["broken"]
