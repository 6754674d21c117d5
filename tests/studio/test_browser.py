"""The studio as people use it: a real browser on the real server."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from studio_jobs import HELD
from studio_pages import CLASSES, LINK, MODEL, RUN, UPLOAD, WAIT, click, overlay, picture, png, studio, told, turn_to, visit

# The head of the first point of the scatter, where on the screen it is, and the left, top, width and height of the plot.
POINT = """() => {
    const plot = [...document.querySelectorAll(".js-plotly-plot")].find(p => p.data.some(t => t.customdata));
    const at = plot.getBoundingClientRect(), { xaxis: x, yaxis: y } = plot._fullLayout, trace = plot.data[0];
    const left = at.x + x._offset, top = at.y + y._offset;
    return [trace.customdata[0], [left + x.l2p(trace.x[0]), top + y.l2p(trace.y[0])], [left, top, x._length, y._length]];
}"""
LASSO = ((0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98), (0.02, 0.05))  # shares of the plot
GATED = """
import os, time
from vitreous import cli
from vitreous.studio import opened

def gated(*arguments, explained=opened._explained):
    while not os.path.exists(os.environ["GATE"]):
        time.sleep(0.05)
    open(os.environ["GATE"], "w").write("gone through")
    return explained(*arguments)

opened._explained = gated
cli.main()
"""  # explanations wait for a file


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
    told(page, "Layer 0 of 0–1")
    assert overlay(page) != asked
    page.get_by_role("button", name="Class token").click()
    told(page, "The class token attends most")
    assert "<rect" not in overlay(page) and not page.failures


def test_a_view_drawn_late_does_not_come_to_the_front_again(
    browser: Any, opened: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATE", str(gate := tmp_path / "gate"))
    with studio(*opened, program=("-c", GATED)) as address:
        page = visit(browser, f"{address}?methods=rollout")
        picture(page)
        turn_to(page, "Heads")
        study = page.get_by_role("button", name="Study", exact=True)
        study.wait_for()
        gate.touch()
        while not gate.read_text():
            page.wait_for_timeout(50)
        page.get_by_role("button", name="Remove this head").click()
        told(page, "Without 1 of 4 heads")  # which is answered after the explanation
        assert study.is_visible() and "view=heads" in page.url
        page.context.close()


def test_a_link_restores_the_view(browser: Any, page: Any) -> None:
    page.get_by_label(f"image 3, {CLASSES[0]}", exact=True).click()
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


def test_removing_heads_changes_the_answers(page: Any, address: str) -> None:
    picture(page)
    turn_to(page, "Heads")
    page.get_by_role("button", name="Remove this head").click()
    one = told(page, re.compile("^Without 1 of 4 heads: accuracy")).inner_text()
    page.goto(f"{address}?view=heads&removed=0.0,0.1,1.0,1.1")
    all_of_them = told(page, re.compile("^Without 4 of 4 heads: accuracy")).inner_text()
    moved = re.compile(r"outputs move by ([0-9.]+) %")
    assert 0 < float(moved.findall(one)[0]) < float(moved.findall(all_of_them)[0])
    page.get_by_role("button", name="Put all back").click()
    told(page, "No head is removed.")


def test_a_study_links_matrix_and_patterns(page: Any) -> None:
    picture(page)
    turn_to(page, "Patterns")
    page.get_by_label("Pictures", exact=True).fill("16")
    page.get_by_role("button", name="Study", exact=True).click()
    told(page, "4 heads, on 16 pictures.")
    turn_to(page, "Heads")
    told(page, "Studied on 16 pictures.")
    turn_to(page, "Patterns")
    told(page, "4 heads, on 16 pictures.")
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
    assert 1 < int(selected.inner_text().split()[0]) <= 4
    page.get_by_role("heading", name="Where they are").click()  # drawing again must not forget the selection
    assert selected.is_visible()
    assert not page.failures


def test_a_recipe_runs_is_cancelled_finished_and_downloaded(page: Any, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    picture(page)
    turn_to(page, "Models")
    recipe, apply = page.get_by_label("Recipe"), page.get_by_role("button", name="Apply", exact=True)
    recipe.fill("EVit7()")
    apply.click()
    told(page, "unknown step")
    recipe.fill("ToMe(r=2)")
    page.get_by_role("button", name="Remove this step").click()
    page.get_by_label("Add a step").click()
    page.get_by_role("option", name="EViT · tokens").click()
    keep, at = page.get_by_label(re.compile("^keep: float")), page.get_by_label(re.compile("^at: "))
    at.wait_for()
    field = at.element_handle()
    keep.fill("0.5")
    keep.press("Tab")
    expect(recipe).to_have_value("tokens.EViT(keep=0.5)", timeout=WAIT)
    assert field.evaluate("field => field.isConnected"), "what is being written into another field may not be lost"
    at.fill("(1,)")
    at.press("Tab")
    expect(recipe).to_have_value("tokens.EViT(keep=0.5, at=(1,))", timeout=WAIT)
    images = page.get_by_label("Pictures to prove on")
    images.fill(str(HELD))
    apply.click()
    page.get_by_role("button", name="Cancel").click()
    told(page, "Cancelled.")
    images.fill("20")
    apply.click()
    told(page, "Done.")
    page.get_by_role("heading", name=f"{MODEL}: tokens.EViT(keep=0.5, at=(1,))").wait_for()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download model.safetensors").click()
    file = tmp_path / "model.safetensors"
    waiting.value.save_as(file)
    import vitreous as vt

    assert "EViT" in str(vt.steps.history_of(vt.load(file)).steps()[0])
    turn_to(page, "Image")
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


@pytest.mark.parametrize("view", ["image", "heads", "patterns", "models"])
def test_it_fits_a_telephone_and_the_dark(browser: Any, address: str, view: str) -> None:
    small = visit(browser, f"{address}?view={view}", 390, color_scheme="dark")
    small.locator(".studio-card:visible").first.wait_for()
    assert small.evaluate("document.documentElement.scrollWidth") <= 390, "nothing may stick out"
    assert small.evaluate("document.body.classList.contains('body--dark')") and not small.failures
    small.context.close()


def test_names_that_others_chose_are_shown_and_never_run(browser: Any, address: str) -> None:
    """Class, file, model and upload names and links with markup in them, which the fixtures plant."""
    page = visit(browser, f"{address}?methods=rollout,{quote(LINK)}&colour={quote(LINK)}&removed={quote(LINK)}&image=2")
    assert picture(page).get_attribute("aria-label").startswith(f"image 2, {CLASSES[1]}. ")
    page.get_by_label(f"image 3, {CLASSES[0]}", exact=True).click()
    page.locator("input[type=file]").set_input_files({"name": UPLOAD, "mimeType": "image/png", "buffer": png()})
    sent = page.get_by_role("button", name=UPLOAD, exact=True)
    sent.wait_for()
    sent.hover()
    page.locator("input[type=file]").set_input_files({"name": UPLOAD, "mimeType": "image/png", "buffer": b"none"})
    told(page, f"{UPLOAD} cannot be used")
    assert page.get_by_label("Model", exact=True).first.input_value() == MODEL or page.get_by_text(MODEL).count()
    for view in ("Heads", "Patterns", "Models"):
        turn_to(page, view)
    told(page, f"1. {MODEL}")
    told(page, RUN)
    told(page, "2 of 3")
    told(page, "50.0 %")
    turn_to(page, "Heads")
    page.get_by_label(re.compile("^image ")).first.wait_for()
    assert page.evaluate("window.ran") is None and page.locator("img[src=x]").count() == 0 and not page.failures
    page.context.close()


def status(address: str, data: bytes | None = None, **headers: str) -> int:
    """Of the answer to a request; 413 where the server hung up while it was sent."""
    sent = urllib.request.Request(address, data=data, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(sent) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code
    except (urllib.error.URLError, ConnectionError):
        return 413


def test_other_hosts_other_sites_and_endless_requests_are_refused(address: str) -> None:
    assert status(address, Host="evil.example") == 400
    assert status(address, bytes(22 * 2**20)) == 413
    live = f"{address}_nicegui_ws/socket.io/?EIO=4&transport="
    assert status(live + "polling", Origin="http://evil.example") == 403
    assert status(live + "polling", Origin=address.rstrip("/")) != 403
    upgrade = dict(
        Upgrade="websocket", Connection="Upgrade", Sec_WebSocket_Version="13", Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ=="
    )
    assert status(live + "websocket", Origin="http://evil.example", **upgrade) == 403


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/x-www-form-urlencoded"])
def test_text_where_a_file_belongs_is_refused(page: Any, kind: str) -> None:
    picture(page)
    with page.expect_request(re.compile("/upload/")) as sending:
        page.locator("input[type=file]").set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": png()})
    text = '--x\r\nContent-Disposition: form-data; name="f"\r\n\r\nhi\r\n--x--\r\n' if "multipart" in kind else "f=hi"
    assert status(sending.value.url, text.encode(), Content_Type=kind) == 400
    click(page, 0.5, 0.5)
    told(page, "Patch (3, 3) attends most")
