"""The training of the bundled model goes on only as what it began as."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "train_bundled.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for stem, n in (("train", 8), ("t10k", 4)):
        head = lambda kind, *sizes: bytes([0, 0, 8, kind]) + b"".join(s.to_bytes(4, "big") for s in sizes)
        images = head(3, n, 28, 28) + rng.integers(0, 256, n * 784, np.uint8).tobytes()
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head(1, n) + bytes(range(n))))
    return folder


def test_training_goes_on_under_its_own_settings_alone(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("train_bundled", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def train(*more: str) -> None:
        words = ["train_bundled.py", "--out", str(tmp_path / "out"), "--data", str(data), "--device", "cpu", "--batch", "4"]
        monkeypatch.setattr(sys, "argv", [*words, "--epochs", "1", *more])
        script.main()

    train()
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    for more in (["--lr", "0.5"], ["--decay", "0"], ["--keep", "0.9"], ["--seed", "1"], ["--epochs", "2"], ["--batch", "2"]):
        with pytest.raises(SystemExit, match=rf"other settings \({more[0][2:]}"):
            train(*more)
    train()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole, "the same settings go on"
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "out" / "log.jsonl").read_text())["epoch"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
