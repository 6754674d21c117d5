"""Run the serving examples of docs/ship.md in a virtual environment that has neither Vitreous nor torch.

    python benchmarks/serve.py

Builds the environment in a temporary folder (pip installs NumPy, Pillow and the two runtimes into it), ships a small model with
random weights, and compares what the examples print with the model's own logits.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from vitreous.data.transform import preparation
from vitreous.ship import ship

DOCS = Path(__file__).parent.parent / "docs" / "ship.md"
NEEDS = ("numpy", "pillow", "onnxruntime", "openvino")


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=2, num_classes=5).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["a", "b", "c", "d", "e"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDS], check=True)
        for absent in ("vitreous", "torch"):
            assert subprocess.run([python, "-c", f"import {absent}"], capture_output=True, env={}, check=False).returncode
        picture = folder / "picture.png"
        noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
        Image.fromarray(noise).resize((200, 150), Image.Resampling.BICUBIC).save(picture)
        with torch.no_grad():
            wanted = model(preparation(model).to_tensor(Image.open(picture))[None])[0]
        files = (ship(model, folder / "m.onnx").path, ship(model, folder / "m.xml", with_preprocessing=True).path)
        for text, file in zip(re.findall(r"```python\n(# serve with .*?)```", DOCS.read_text(), re.DOTALL), files, strict=True):
            (folder / "serve.py").write_text(text)
            said = subprocess.run(
                [python, folder / "serve.py", file, picture], capture_output=True, text=True, env={}, check=True
            )
            logits = torch.tensor([float(v) for v in said.stdout.split()[2:]])
            print(f"{text.splitlines()[0]}: {(logits - wanted).norm() / wanted.norm():.1e} from the model")


if __name__ == "__main__":
    main()
