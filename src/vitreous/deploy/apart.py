"""A split model run in processes, one a device, over this machine's own network; what goes over it is counted."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import VitreousError
from .ed_vit import EDViT

WAIT = 60.0  # seconds until a device is given up


class Apart:
    """`with Apart(whole) as devices: devices(x)`: each part computes in a process of its own, and sends its features.

    received, sent: bytes that came from the devices, and that went to them, since the beginning. start: how processes begin;
    "fork" where nothing else runs in threads.
    """

    def __init__(self, whole: EDViT, start: Literal["spawn", "fork"] = "spawn") -> None:
        self.whole, self.start = whole.eval(), start
        self.sent = self.received = 0
        self.links: list[Connection] = []
        self.processes: list[Any] = []

    def __enter__(self) -> Apart:
        context: Any = multiprocessing.get_context(self.start)
        with Listener(("127.0.0.1", 0)) as listener:
            for i in range(len(self.whole.parts)):
                process = context.Process(target=_device, args=(listener.address, self.whole, i), daemon=True)
                process.start()
                self.processes.append(process)
                self.links.append(listener.accept())
        return self

    def __exit__(self, *_: object) -> None:
        for link in self.links:
            link.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.terminate()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of images `[B, C, H, W]`. Raises `VitreousError` when a device is gone."""
        given = x.numpy().tobytes()
        head = np.array(x.shape, np.int64).tobytes()
        found = []
        try:
            for link in self.links:
                link.send_bytes(head)
                link.send_bytes(given)
                self.sent += len(head) + len(given)
            for i, link in enumerate(self.links):
                if not link.poll(WAIT):
                    raise EOFError("no answer")
                answer = link.recv_bytes()
                self.received += len(answer)
                values = np.frombuffer(answer, np.float32).reshape(len(x), self.whole.widths[i])
                found.append(torch.from_numpy(values.copy()))
        except (EOFError, OSError) as error:
            raise VitreousError(f"a device is gone ({error or type(error).__name__}): start it again") from error
        with torch.inference_mode():
            return self.whole.fusion(torch.cat(found, 1))


def _device(address: Any, whole: EDViT, i: int) -> None:
    torch.set_num_threads(1)
    with Client(address) as link, torch.inference_mode():
        while True:
            try:
                shape = np.frombuffer(link.recv_bytes(), np.int64).tolist()
                images = torch.from_numpy(np.frombuffer(link.recv_bytes(), np.float32).reshape(shape).copy())
            except (EOFError, OSError):
                return
            link.send_bytes(whole.features(i, images).float().numpy().tobytes())
