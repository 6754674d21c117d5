"""The experiments of benchmarks/learn.py: a function each, found by importing the modules of this folder."""

from importlib import import_module
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    import_module(f"{__name__}.{path.stem}")
