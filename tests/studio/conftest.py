"""One studio of a small model for all tests of a worker, and a browser for those of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studio_pages import BROWSER, small_data, small_model, small_runs, studio, visit

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
QUICK = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import studio_jobs
from vitreous import cli
from vitreous.studio import apart

apart.recipe = studio_jobs.recipe
cli.main()
"""  # speed is not what the tests of the page are about


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What the studio is told to open."""
    folder = tmp_path_factory.mktemp("studio")
    return str(small_model(folder)), "--data", str(small_data(folder)), "--runs", str(small_runs(folder))


@pytest.fixture(scope="session")
def address(opened: tuple[str, ...]) -> Iterator[str]:
    with studio(*opened, program=("-c", QUICK)) as found:
        yield found


@pytest.fixture(scope="module")  # no longer: while Playwright is at work, its loop runs in this thread, and nothing else can wait
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    from playwright import sync_api as playwright

    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    made = visit(browser, address)
    yield made
    made.context.close()
