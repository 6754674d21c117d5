"""Make the bundled sample from a local copy of Fashion-MNIST: the first 1,000 test pictures, 256 train pictures.

    python benchmarks/make_sample.py                # writes src/vitreous/data/bundled/fashion_sample.npz
    python benchmarks/make_sample.py --data FOLDER  # with the four IDX files

The train pictures are for calibration: drawn from --seed, as even over the classes as 256 allows. Lossless, and the
same bytes every time.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from vitreous.data.fashion import SAMPLE, fashion_arrays
from vitreous.data.sets import balanced_order


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=None, help="folder with the four IDX files")
    p.add_argument("--out", type=Path, default=SAMPLE)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    test_images, test_labels = fashion_arrays("test", a.data)
    train_images, train_labels = fashion_arrays("train", a.data)
    pick = np.array(balanced_order(train_labels, a.seed)[:256])
    a.out.parent.mkdir(parents=True, exist_ok=True)
    aside = a.out.with_suffix(".part")
    with aside.open("wb") as file:
        np.savez_compressed(
            file,
            test_images=test_images[:1000],
            test_labels=test_labels[:1000],
            train_images=train_images[pick],
            train_labels=train_labels[pick],
            train_index=pick.astype(np.int32),  # where in the official train split each came from
        )
    os.replace(aside, a.out)
    print(f"{a.out}: {a.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
