"""What lies beside the pictures in a `.npy` file: parsings, volumes, frames."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...errors import VitreousError


def array_of(path: str, name: str) -> np.ndarray:
    """The array in the file, read where it is asked for. Raises `VitreousError` for what is no such file."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise VitreousError(f"{name}: {path} is no .npy file that can be read ({error})") from None


def rows_of(path: str, index: Tensor, name: str) -> Tensor:
    """Rows `index [B]` of the file. Raises `VitreousError` where it has not as many."""
    held = array_of(path, name)
    if len(index) and int(index.max()) >= len(held):
        raise VitreousError(f"{name}: {path} has {len(held)} rows, and there is a picture {int(index.max())}: it must have all")
    return torch.from_numpy(np.array(held[index.cpu().numpy()]))
