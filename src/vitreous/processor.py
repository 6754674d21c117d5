"""What this machine's processor multiplies exactly, and fast, and how much memory is free."""

from __future__ import annotations

import platform
import sys

import torch


def saturates() -> bool:
    """Whether int8 kernels may overflow on this machine: x86 without VNNI and AMX."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.9
    exact = any(known.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return not (exact or torch.cpu._is_vnni_supported())


def multiplies_bf16() -> bool:
    """Whether it multiplies bf16; where it is emulated it takes ten times as long as float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def free_memory() -> int:
    """Bytes that can be had without swapping, or as many as are counted where the system does not tell."""
    try:
        with open("/proc/meminfo") as told:
            lines = dict(line.split(":", 1) for line in told)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return sys.maxsize
