"""The studio as people use it: a real browser on the real server."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright import sync_api as playwright

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
# The head of the first point of the scatter, where on the screen it is, and the left, top, width and height of the plot.
POINT = """() => {
    const plot = [...document.querySelectorAll(".js-plotly-plot")].find(p => p.data.some(t => t.customdata));
    const at = plot.getBoundingClientRect(), { xaxis: x, yaxis: y } = plot._fullLayout, trace = plot.data[0];
    const left = at.x + x._offset, top = at.y + y._offset;
    return [trace.customdata[0], [left + x.l2p(trace.x[0]), top + y.l2p(trace.y[0])], [left, top, x._length, y._length]];
}"""
LASSO = ((0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98), (0.02, 0.05))  # shares of the plot
SLOW = """
import time
from vitreous import cli
from vitreous.studio.opened import Opened

def slow(*arguments, look=Opened.look):
    time.sleep(1)
    return look(*arguments)

Opened.look = slow
cli.main()
"""  # a machine on which to look takes a second longer
WAIT = 120_000  # milliseconds: the machine may be busy with other tests


@contextmanager
def studio(*command: str) -> Iterator[str]:
    """The address of a studio of the bundled model, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (sys.executable, *command, "studio", "--port", str(port), "--no-show")
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}  # by them NiceGUI takes itself for a test
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=plain) as server:
        for _ in range(600):
            if socket.socket().connect_ex(("127.0.0.1", port)) == 0:
                break
            assert server.poll() is None, server.stdout and server.stdout.read()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
        server.terminate()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with studio("-m", "vitreous") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    made = visit(browser, address)
    yield made
    made.context.close()


def visit(browser: Any, address: str) -> Any:
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    context.set_default_timeout(WAIT)
    made = context.new_page()
    made.failures = []
    hidden = "displayed plot div"  # plotly's word for a plot in a view that is not shown; nothing comes of it
    made.on("pageerror", lambda error: hidden in str(error) or made.failures.append(str(error)))
    made.goto(address)
    return made


def picture(page: Any) -> Any:
    """The large picture, once its attention is told."""
    page.get_by_text("attends most to").wait_for()
    return page.get_by_role("application")


def overlay(page: Any) -> str:
    return picture(page).locator("svg").inner_html()


def click(page: Any, x: float, y: float) -> None:
    """Click at a share of the picture's width and height."""
    box = picture(page).bounding_box()
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])


def told(page: Any, text: str | re.Pattern[str]) -> Any:
    found = page.get_by_text(text).first
    found.wait_for()
    return found


def png(size: tuple[int, int] = (64, 48)) -> bytes:
    held = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(held, "PNG")
    return held.getvalue()


def test_a_click_on_a_patch_shows_where_it_attends(page: Any) -> None:
    before = overlay(page)
    click(page, 0.5, 0.5)
    told(page, "Patch (3, 3) attends most")
    asked = overlay(page)
    assert asked != before and "<rect" in asked
    picture(page).focus()
    page.keyboard.press("ArrowRight")
    told(page, "Patch (3, 4) attends most")
    page.get_by_role("slider", name="Layer").locator("[tabindex]").press("ArrowLeft")
    told(page, "Layer 6 of 0–7")
    assert overlay(page) != asked
    page.get_by_role("button", name="Class token").click()
    told(page, "The class token attends most")
    assert "<rect" not in overlay(page) and not page.failures


def test_a_view_drawn_late_does_not_come_to_the_front_again(browser: Any) -> None:
    with studio("-c", SLOW) as address:
        page = visit(browser, address)
        page.get_by_role("application").wait_for()
        page.get_by_role("tab", name="Heads").click()
        study = page.get_by_role("button", name="Study", exact=True)
        study.wait_for()
        page.wait_for_timeout(4000)  # in which the picture's explanations are done
        assert study.is_visible() and "view=heads" in page.url
        page.context.close()


def test_a_link_restores_the_view(browser: Any, page: Any) -> None:
    page.get_by_label("image 3, Trouser").click()
    click(page, 0.1, 0.1)
    told(page, "Patch (0, 0) attends most")
    page.wait_for_function("location.search.includes('image=3') && location.search.includes('patch=0')")
    other = visit(browser, page.url)
    told(other, "Patch (0, 0) attends most")
    assert overlay(other) == overlay(page)
    other.context.close()


def test_uploads_good_corrupt_and_oversized(browser: Any, page: Any, address: str, tmp_path: Path) -> None:
    picture(page)
    chooser = page.locator("input[type=file]")
    chooser.set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": png()})
    page.get_by_role("button", name="mine.png").wait_for()
    assert "mine.png" in picture(page).get_attribute("aria-label")
    before = overlay(page)
    chooser.set_input_files({"name": "cut.png", "mimeType": "image/png", "buffer": png()[:90]})
    told(page, "cut.png cannot be used")
    (tmp_path / "vast.png").write_bytes(bytes(21 * 2**20))
    chooser.set_input_files(tmp_path / "vast.png")
    told(page, "at most 20 MB")
    click(page, 0.5, 0.5)
    told(page, "Patch (3, 3) attends most")
    assert overlay(page) != before, "the page goes on"

    other = visit(browser, address)
    picture(other)
    assert other.get_by_role("button", name="mine.png").count() == 0, "nobody sees another's upload"
    other.context.close()


def test_removing_heads_changes_the_accuracy(page: Any, address: str) -> None:
    picture(page)
    page.get_by_role("tab", name="Heads").click()
    remove = page.get_by_role("button", name="Remove this head")
    remove.click()
    first = told(page, re.compile("^Without 1 of 32 heads: accuracy")).inner_text()
    gone = ",".join(f"{layer}.{head}" for layer in (0, 1, 2) for head in range(4))
    page.goto(f"{address}?view=heads&removed={gone}")
    last = told(page, re.compile("^Without 12 of 32 heads: accuracy")).inner_text()
    shares = re.compile(r"accuracy ([0-9.]+) % → ([0-9.]+) %")
    (one, few), (two, many) = (shares.findall(text)[0] for text in (first, last))
    assert one == two and float(many) < float(few)
    page.get_by_role("button", name="Put all back").click()
    told(page, "No head is removed.")


def test_a_study_links_matrix_and_patterns(page: Any) -> None:
    picture(page)
    page.get_by_role("tab", name="Heads").click()
    page.get_by_label("Pictures", exact=True).fill("16")
    page.get_by_role("button", name="Study", exact=True).click()
    told(page, "Studied on 16 pictures.")
    page.get_by_role("tab", name="Patterns").click()
    told(page, "32 heads, on 16 pictures.")
    page.locator(".scatterlayer .point").first.wait_for()
    head, at, (left, top, width, height) = page.evaluate(POINT)
    page.mouse.click(*at)
    page.wait_for_url(re.compile(rf"layer={head[0]}&head={head[1]}\b"))
    around = [(left + width * x, top + height * y) for x, y in LASSO]
    page.mouse.move(*around[0])
    page.mouse.down()
    for corner in around[1:]:
        page.mouse.move(*corner, steps=8)
    page.mouse.up()
    selected = told(page, re.compile(r"^\d+ heads selected\."))
    assert 1 < int(selected.inner_text().split()[0]) <= 32
    page.wait_for_timeout(1000)  # drawing again must not forget the selection
    assert selected.is_visible()
    assert not page.failures


def test_a_recipe_runs_is_cancelled_finished_and_downloaded(page: Any, tmp_path: Path) -> None:
    picture(page)
    page.get_by_role("tab", name="Models").click()
    recipe, apply = page.get_by_label("Recipe"), page.get_by_role("button", name="Apply", exact=True)
    recipe.fill("EVit7()")
    apply.click()
    told(page, "unknown step")
    recipe.fill("EViT(keep=0.5)")
    page.get_by_label("Pictures to prove on").fill("20")
    apply.click()
    page.get_by_role("button", name="Cancel").click()
    told(page, "Cancelled.")
    apply.click()
    told(page, "Done.")
    page.get_by_role("heading", name="bundled model: EViT(keep=0.5)").wait_for()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download model.safetensors").click()
    file = tmp_path / "model.safetensors"
    waiting.value.save_as(file)
    import vitreous as vt

    assert "EViT" in str(vt.steps.history_of(vt.load(file)).steps()[0])
    page.get_by_role("tab", name="Image").click()
    told(page, "of its attention lies elsewhere")
    told(page, "tokens")


def test_figures_and_their_data_go_out(page: Any) -> None:
    picture(page)
    wanted = {"SVG": b"<svg", "PNG": b"\x89PNG", "CSV": b"row,column,attention", "Parquet": b"PAR1"}
    for kind, start in wanted.items():
        page.get_by_role("button", name="Export attention").click()
        with page.expect_download() as waiting:
            page.get_by_text(f"as {kind}").click()
        assert Path(waiting.value.path()).read_bytes().startswith(start), kind


def test_it_fits_a_telephone_and_the_dark(browser: Any, address: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    context.set_default_timeout(WAIT)
    small = context.new_page()
    small.goto(address)
    picture(small)
    assert small.evaluate("document.documentElement.scrollWidth") <= 390, "nothing may stick out"
    assert small.evaluate("document.body.classList.contains('body--dark')")
    context.close()


def test_other_hosts_and_endless_requests_are_refused(address: str) -> None:
    import urllib.error
    import urllib.request

    stranger = urllib.request.Request(address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(stranger)
    assert refused.value.code == 400
    large = urllib.request.Request(address, data=bytes(22 * 2**20), method="POST")
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError, ConnectionError)) as bounded:
        urllib.request.urlopen(large)
    assert getattr(bounded.value, "code", 413) == 413
