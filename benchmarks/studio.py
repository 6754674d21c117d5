"""The pictures of docs/studio.md, and how quickly the studio answers, in a real browser on the real server.

    python benchmarks/studio.py pictures [MODEL --checkpoint W.safetensors --data FOLDER]   # by default the bundled model
    python benchmarks/studio.py speed                                                       # ViT-S/16 at 224, random weights
    python benchmarks/studio.py load                                                        # the same, with twenty visitors

Needs `pip install -e ".[studio]" playwright` and a Chromium on the machine. `pictures` writes docs/studio-<view>.png, and
docs/studio-small.png: the image view on a telephone, in the dark. `speed` prints how long it takes from the choice of a file to
all heads on the screen, and from a click to the new overlay, as the page itself sees it. `load` sends two hundred photographs of
12 megapixels at once, ten from each of twenty pages, looks on every page whose it shows, and prints what memory that took; then
nineteen pages ask for integrated gradients, and the twentieth clicks.
"""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from vitreous.prove.machine import describe

DOCS = Path(__file__).parent.parent / "docs"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
PORT = 8765
ADDRESS = f"http://127.0.0.1:{PORT}/"
WAIT = 600_000  # milliseconds
CLICK = """([x, y]) => new Promise(done => {
  const shown = document.querySelector('[role=application]');
  const box = shown.getBoundingClientRect();
  const place = { clientX: box.x + x * box.width, clientY: box.y + y * box.height, bubbles: true };
  const start = performance.now();
  new MutationObserver((_, watch) => { watch.disconnect(); requestAnimationFrame(() => done(performance.now() - start)); })
    .observe(shown.querySelector('svg'), { childList: true, subtree: true });
  shown.querySelector('img').dispatchEvent(new MouseEvent('click', place));
})"""
UPLOAD = """() => {
  window.took = new Promise(done => {
    let start;
    document.querySelector('input[type=file]').addEventListener('change', () => { start = performance.now(); }, true);
    document.querySelector('.all-heads img').addEventListener('load', () => {
      if (start) requestAnimationFrame(() => done(performance.now() - start));
    });
  });
}"""


@contextmanager
def studio(*arguments: str) -> Iterator[Any]:
    """A browser, with the studio of these arguments served at `ADDRESS`."""
    found = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    command = [sys.executable, "-m", "vitreous", "studio", *arguments, "--port", str(PORT), "--no-show"]
    with subprocess.Popen(command) as server, sync_playwright() as play:
        try:
            while socket.socket().connect_ex(("127.0.0.1", PORT)):
                if server.poll() is not None:
                    sys.exit("the studio did not start")
                time.sleep(0.5)
            yield play.chromium.launch(executable_path=found, args=FLAGS)
        finally:
            server.terminate()


def visit(browser: Any, query: str = "", **look: Any) -> Any:
    page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **look}).new_page()
    page.set_default_timeout(WAIT)
    page.goto(ADDRESS + query)
    return page


def shoot(page: Any, name: str) -> None:
    page.wait_for_timeout(1500)  # plots settle
    page.set_viewport_size({"width": 1280, "height": min(1600, page.evaluate("document.documentElement.scrollHeight"))})
    page.wait_for_timeout(500)
    page.screenshot(path=DOCS / f"studio-{name}.png")


def pictures(a: argparse.Namespace) -> None:
    options = {"--data": a.data, "--checkpoint": a.checkpoint, "--img-size": a.img_size}
    opened = [*([a.model] if a.model else []), *(str(o) for pair in options.items() if pair[1] for o in pair)]
    with studio(*opened) as browser:
        page = visit(browser, f"?image={a.image}")
        page.get_by_text("attends most to").wait_for()
        page.get_by_role("application").click(position={"x": 250, "y": 200})
        page.get_by_text(" ms").nth(2).wait_for()
        shoot(page, "image")
        page.get_by_role("tab", name="Heads").click()
        page.get_by_label("Pictures", exact=True).fill(str(a.images))
        page.get_by_role("button", name="Study", exact=True).click()
        page.get_by_text("Studied on").wait_for()
        page = visit(browser, f"?image={a.image}&view=heads&layer=2&head=1&removed=3.2")
        page.get_by_text("Without 1 of").wait_for()
        page.get_by_text("It moves these pictures most").wait_for()
        shoot(page, "heads")
        page.get_by_role("tab", name="Patterns").click()
        page.locator(".scatterlayer .point").first.wait_for()
        shoot(page, "patterns")
        page.get_by_role("tab", name="Models").click()
        page.get_by_label("Pictures to prove on").fill("200")
        page.get_by_role("button", name="Apply", exact=True).click()
        page.get_by_role("button", name="Download model.safetensors").wait_for()
        shoot(page, "models")
        small = visit(browser, f"?image={a.image}", viewport={"width": 390, "height": 844}, color_scheme="dark")
        small.get_by_text("attends most to").wait_for()
        small.wait_for_timeout(4000)
        small.screenshot(path=DOCS / "studio-small.png")


def speed(a: argparse.Namespace) -> None:
    held = io.BytesIO()
    Image.effect_noise((640, 480), 80).convert("RGB").save(held, "JPEG")
    uploads, clicks = [], []
    with studio("vit_small_patch16_224") as browser:
        page = visit(browser, "?methods=rollout")
        page.get_by_text("attends most to").wait_for()
        page.wait_for_timeout(3000)
        for i in range(a.times):
            page.evaluate(UPLOAD)
            page.locator("input[type=file]").set_input_files(
                {"name": f"{i}.jpg", "mimeType": "image/jpeg", "buffer": held.getvalue()}
            )
            uploads.append(page.evaluate("window.took"))
            page.wait_for_timeout(1500)
            clicks.append(page.evaluate(CLICK, [0.1 + 0.8 * i / a.times, 0.3]))
            page.wait_for_timeout(500)
    machine = describe()
    print(f"{machine.get('cpu', '')}, {time.strftime('%Y-%m-%d')}, median and largest of {a.times}, milliseconds")
    for what, taken in (("from a file to all 72 heads", uploads[1:]), ("from a click to the overlay", clicks[1:])):
        print(f"{what}: {statistics.median(taken):.0f}, {max(taken):.0f}")


def memory(field: str) -> float:
    """`VmRSS` or `VmHWM` of the process that listens at `PORT`, in MB (Linux)."""
    told = subprocess.run(["pgrep", "-f", f"vitreous studio .*--port {PORT}"], capture_output=True, text=True).stdout.split()
    lines = Path(f"/proc/{told[0]}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def send(address: str, name: str, content: bytes) -> int:
    edge = "edge-of-a-part"
    head = f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\nContent-Type: image/jpeg\r\n\r\n'
    body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
    asked = urllib.request.Request(address, body, {"Content-Type": f"multipart/form-data; boundary={edge}"})
    with urllib.request.urlopen(asked, timeout=WAIT / 1000) as answer:
        return answer.status


def load(a: argparse.Namespace) -> None:
    held = io.BytesIO()
    Image.effect_noise((4000, 3000), 80).convert("RGB").save(held, "JPEG", quality=60)
    people, each = 20, 10
    with studio("vit_small_patch16_224") as browser:
        pages, addresses = [visit(browser, "?methods=rollout") for _ in range(people)], []
        for i, page in enumerate(pages):
            page.get_by_text("attends most to").wait_for()
            with page.expect_request(lambda asked: asked.method == "POST" and "upload" in asked.url) as first:
                page.locator("input[type=file]").set_input_files(
                    {"name": f"of {i:02} first.jpg", "mimeType": "image/jpeg", "buffer": held.getvalue()}
                )
            addresses.append(first.value.url)
            page.get_by_role("button", name=f"of {i:02} first.jpg").wait_for()
        before = memory("VmRSS")
        sent = [(address, f"of {i:02} number {j}.jpg") for j in range(each) for i, address in enumerate(addresses)]
        start = time.perf_counter()
        with ThreadPoolExecutor(len(sent)) as pool:
            statuses = list(pool.map(lambda one: send(*one, held.getvalue()), sent))
        took, after, most = time.perf_counter() - start, memory("VmRSS"), memory("VmHWM")
        shown = others = 0
        for i, page in enumerate(pages):
            page.get_by_role("button", name=f"of {i:02} number").nth(each - 1).wait_for()
            names = [b.get_attribute("aria-label") or "" for b in page.get_by_role("button", name="of ").all()]
            shown += sum(name.startswith(f"of {i:02} number") for name in names)
            others += sum(name.startswith("of ") and not name.startswith(f"of {i:02}") for name in names)
        slow, clicks = [visit(browser, "?methods=integrated_gradients") for _ in range(people - 1)], []
        for page in slow:
            page.get_by_text("attends most to").wait_for()
        for k in range(a.times):
            clicks.append(pages[0].evaluate(CLICK, [0.1 + 0.8 * k / a.times, 0.3]))
            pages[0].wait_for_timeout(300)
        waiting = sum(page.get_by_text("computing…").count() > 0 for page in slow)
    if not waiting:
        sys.exit("nobody waited for an explanation any more when the clicks ended: they show nothing")
    machine = describe()
    size = len(held.getvalue()) / 1e6
    print(f"{machine.get('cpu', '')}, {time.strftime('%Y-%m-%d')}")
    print(f"{len(sent)} photographs of {size:.1f} MB at once: {statuses.count(200)} taken in {took:.0f} s,")
    print(f"{shown} shown on the page that sent them, {others} on another's;")
    print(f"memory {before:.0f} MB before, {most:.0f} at most, {after:.0f} after")
    print(f"{a.times} clicks while {waiting} of {len(slow)} pages waited: median {statistics.median(clicks):.0f} ms,")
    print(f"largest {max(clicks):.0f} ms")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("pictures", "speed", "load"))
    p.add_argument("model", nargs="?")
    p.add_argument("--checkpoint")
    p.add_argument("--data", default="sample")
    p.add_argument("--img-size", type=int)
    p.add_argument("--image", type=int, default=0, help="picture to show")
    p.add_argument("--images", type=int, default=128, help="pictures to study heads on")
    p.add_argument("--times", type=int, default=11, help="uploads and clicks; the first does not count")
    a = p.parse_args()
    {"pictures": pictures, "speed": speed, "load": load}[a.what](a)


if __name__ == "__main__":
    main()
