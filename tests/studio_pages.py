"""The studio in a process of its own, and what tests do with its pages in a real browser."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

import vitreous as vt

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
WAIT = 800_000  # milliseconds: when nothing comes any more, however busy the machine is
# Names that other people chose: every one tries to get code onto the page.
CLASSES = ('"><img src=x onerror="window.ran=\'class\'">', "' :onclick=\"window.ran='class'\" {{1+1}} [b]`")
MODEL = "<img src=x onerror=window.ran='model'>\" :innerHTML=\"window.ran='model'\""
UPLOAD = "<svg onload=window.ran='upload'> :onclick=window.ran='upload' {{7*7}} [b]`.png"
RUN = "<img src=x onerror=window.ran='run'>\" {{3*3}} [b]"
LINK = "<img src=x onerror=window.ran='link'>\" :onclick=\"window.ran='link'\""


def png(size: tuple[int, int] = (64, 48)) -> bytes:
    held = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(held, "PNG")
    return held.getvalue()


def small_model(folder: Path) -> Path:
    """A saved ViT of two layers, two heads and 7 × 7 patches, called `MODEL`."""
    model = vt.open("vit_tiny_patch16_224", img_size=28, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=2)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    vt.save(model, folder / f"{MODEL}.safetensors")
    return folder / f"{MODEL}.safetensors"


def small_data(folder: Path) -> Path:
    """Twelve pictures of each of `CLASSES`, which the data deals out in turn."""
    draw = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            pixels = draw.integers(0, 256, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{i:02}.png")
    return folder / "pictures"


def small_runs(folder: Path) -> Path:
    """A folder of one training run of two epochs, called `RUN`."""
    home = folder / "runs" / RUN
    home.mkdir(parents=True)
    (home / "run.json").write_text('{"key": "k", "settings": {"epochs": 3}}')
    (home / "log.csv").write_text("epoch,loss,accuracy\n1,2.5,0.25\n2,1.5,0.5\n")
    return folder / "runs"


@contextmanager
def studio(*arguments: str, program: tuple[str, ...] = ("-m", "vitreous")) -> Iterator[str]:
    """The address of a studio in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (sys.executable, *program, "studio", *arguments, "--port", str(port), "--no-show")
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}  # by them NiceGUI takes itself for a test
    # What it says goes to a file: a pipe that nobody reads fills up, and then whoever writes to it waits for ever.
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stdout=said, stderr=said, env=plain) as server:
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
                if server.poll() is not None:
                    said.seek(0)
                    raise AssertionError(said.read())
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()


def visit(browser: Any, address: str, width: int = 1280, **look: Any) -> Any:
    """A page with a context of its own; what goes wrong on it is in `failures`."""
    context = browser.new_context(viewport={"width": width, "height": 1000}, accept_downloads=True, **look)
    context.set_default_timeout(WAIT)
    made = context.new_page()
    made.failures = []
    made.on("pageerror", lambda error: made.failures.append(str(error)))
    made.on("console", lambda message: message.type == "error" and made.failures.append(message.text))
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


def turn_to(page: Any, view: str) -> None:
    page.get_by_role("tab", name=view).click()


def told(page: Any, text: Any) -> Any:
    found = page.get_by_text(text).first
    found.wait_for()
    return found
