"""A block that runs in OpenVINO once it has run so often in torch that translating it pays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..ship.export import to_onnx, trace
from ..ship.openvino_graph import core

HOT = 1.5e11
"""Multiply-accumulates after which a block is translated: some seconds of torch, about what translating takes."""


class Hot:
    """`block` as a function of streams `[B, N, C]`, for any B; once translated, the same to some 1e-6, in "bf16" to some 1e-3.

    What it gives holds until it is called again. Where OpenVINO has nothing to offer (another device, another type than float32)
    or no translation, it stays in torch.
    """

    def __init__(self, block: nn.Module, precision: str = "f32") -> None:
        self.block, self.precision = block, precision
        self.run: Callable[[Tensor], Tensor] = block
        self.weights = sum(p.numel() for p in block.parameters())
        self.left = HOT

    def __call__(self, x: Tensor) -> Tensor:
        if self.left > 0:
            self.left -= self.weights * x[..., 0].numel()
            if self.left <= 0 and x.device.type == "cpu" and x.dtype == torch.float32:
                self.run = translated(self.block, x, self.precision)
        return self.run(x)


def translated(block: nn.Module, stream: Tensor, precision: str) -> Callable[[Tensor], Tensor]:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    try:
        graph = to_onnx(trace(block, stream[:2].clone(), dynamic=True)).SerializeToString()
        run = core().compile_model(core().read_model(graph), "CPU", settings)
    except (VitreousError, RuntimeError):  # OpenVINO's own errors are RuntimeErrors
        return block
    return lambda x: torch.from_numpy(run(x.contiguous().numpy(), share_inputs=True, share_outputs=True)[0])
