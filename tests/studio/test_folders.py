"""What a killed process leaves behind goes when the next one starts; what a living one has stays."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitreous.studio import folders


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders.own.cache_clear()
    yield tmp_path
    folders.own.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
def test_a_killed_processs_folder_goes_and_a_living_ones_stays(temporary: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            (folders.own() / "session").mkdir()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = temporary.iterdir()
    assert (left / "session").is_dir()
    mine = folders.own()
    (mine / "session").mkdir()
    (temporary / "vitreous-studio-of-an-older-version").mkdir()
    folders.remove_left()
    assert not left.exists()
    assert (mine / "session").is_dir() and (temporary / "vitreous-studio-of-an-older-version").is_dir()
