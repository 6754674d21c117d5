"""2:4 sparsity: of every four consecutive weights two stay; how it is packed, and run where there are kernels for it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..anatomy import read
from ..copies.working import bare
from ..errors import VitreousError
from ..files import write_whole
from ..steps import history_of, remember, step
from .zeros import Zeros


def two_of_four(w: Tensor) -> Tensor:
    """Which weights of `[out, in]` stay, of bool: of every four consecutive inputs of a row the two largest by magnitude."""
    fours = w.abs().unflatten(1, (-1, 4))
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(2, fours.topk(2).indices, True).flatten(1)


def two_of_four_both(w: Tensor) -> Tensor:
    """As `two_of_four` along rows and columns at once: in every 4 × 4 tile, of the 90 patterns with two in each row and column,
    the one that keeps the largest sum of magnitudes. Its transpose is 2:4 too, which speeds up training."""
    rows = [r for r in itertools.product((0, 1), repeat=4) if sum(r) == 2]
    patterns = [p for p in itertools.product(rows, repeat=4) if all(sum(c) == 2 for c in zip(*p, strict=True))]
    choices = torch.tensor(patterns, dtype=w.dtype, device=w.device).flatten(1)  # [90, 16]
    tiles = w.abs().unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2)  # [out / 4, in / 4, 4, 4]
    best = choices[(tiles.flatten(2) @ choices.T).argmax(2)].view_as(tiles)
    return best.transpose(1, 2).flatten(0, 1).flatten(1).bool()


@step("prune")
@dataclass(frozen=True)
class TwoFour(Zeros):
    """2:4 sparsity, the first stage of Yu et al., "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization" (CVPR
    2023), by the rule of NVIDIA's ASP (Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021).

    In every linear layer, and in convolutions, of each four consecutive inputs of an output the two largest weights stay. Layers
    whose inputs (k·k·in of a convolution) are no multiple of four stay dense, as does the classifier.

    both: along outputs too (4 × 4 tiles), so that the transposed weights are 2:4 as well.

    The paper trains after that with `learn.GPUSQ` (`vt.heal` holds the zeros as well), then to 8 or 4 bits. `write_packed` stores
    two of four; `on_tensor_cores` runs them in the 2:4 kernels of CUDA. Elsewhere simulated: no runtime on processors skips the
    zeros, and the speed is that of the dense model.
    """

    both: bool = False

    def masks(self, model: nn.Module, calibration: Tensor | None) -> tuple[dict[str, Tensor], str]:
        classifier = read(model).classifier
        layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n != classifier}
        found: dict[str, Tensor] = {}
        for name, m in layers.items():
            w = m.weight.detach().flatten(1)
            if w.shape[1] % 4 == 0 and (not self.both or w.shape[0] % 4 == 0):
                mask = two_of_four_both(w) if self.both else two_of_four(w)
                found[f"{name}.weight"] = mask.view_as(m.weight)
        weights = sum(m.numel() for m in found.values()) / max(sum(p.numel() for p in model.parameters()), 1)
        return found, f"2:4 in {len(found)} of {len(layers)} layers, {weights:.0%} of the weights"


def pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """A 2:4 `[out, in]` as what is left, `[out, in / 2]`, and where it was, `[out, in / 8]` bytes of two bits each (one more
    byte a row where in is an odd number of fours). Raises `VitreousError` where more than two of four are not zero."""
    fours = w.unflatten(1, (-1, 4))
    kept = two_of_four(w).unflatten(1, (-1, 4))
    if (fours[~kept] != 0).any():
        raise VitreousError("these weights are not 2:4: apply prune.TwoFour first")
    where = kept.int().argsort(dim=2, descending=True, stable=True)[..., :2].sort(2).values  # [out, fours, 2]
    nibbles = (where[..., 0] | where[..., 1] << 2).to(torch.uint8)
    nibbles = nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2))
    return fours.gather(2, where).flatten(1), nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack(values: Tensor, where: Tensor) -> Tensor:
    """What `pack` was given."""
    pairs = values.unflatten(1, (-1, 2))
    nibbles = torch.stack([where & 15, where >> 4], 2).flatten(1)[:, : pairs.shape[1]].long()
    index = torch.stack([nibbles & 3, nibbles >> 2], 2)
    return values.new_zeros(*pairs.shape[:2], 4).scatter_(2, index, pairs).flatten(1)


def write_packed(model: nn.Module, path: str | Path, bits: Literal[8, 4] = 8) -> int:
    """The weights of a model that went through `TwoFour`, in one file: two of four as integers of `bits` with a scale for each
    output, and where they were; the rest as it is. 5 bits a weight at 8, 3 at 4. Gives the bytes of the file.

    Raises `VitreousError` for a model that did not go through the step, or has learnt other weights since.
    """
    packed = _sparse(model)
    if not packed:
        raise VitreousError("no layer of this model is 2:4: apply prune.TwoFour first")
    tensors: dict[str, Tensor] = {}
    most = 2 ** (bits - 1) - 1
    for name, t in model.state_dict().items():
        if name not in packed:
            tensors[name] = t.contiguous()
            continue
        values, where = pack(t.flatten(1).float())
        scale = values.abs().amax(1, keepdim=True).clamp_min(1e-12) / most
        whole = (values / scale).round().to(torch.int8)
        tensors |= {f"{name}.scale": scale, f"{name}.where": where, f"{name}.values": _nibbles(whole) if bits == 4 else whole}
    content = save(tensors, {"vitreous 2:4": str(bits)})
    write_whole(path, content)
    return len(content)


def read_packed(path: str | Path, base: nn.Module) -> nn.Module:
    """A copy of `base` with the weights of `write_packed`. Raises `VitreousError` for another file, or another model's."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise VitreousError(f"cannot read {path}: {error}") from None
    model = bare(base)
    state: dict[str, Tensor] = {}
    for name, t in model.state_dict().items():
        found = tensors.get(name)
        if f"{name}.where" in tensors:
            values, where, scale = (tensors.get(f"{name}.{part}", torch.empty(0)) for part in ("values", "where", "scale"))
            half = t.flatten(1).shape[1] // 2
            try:
                values = values if values.shape[1] == half else _whole(values)[:, :half]
                found = unpack(values.float() * scale, where).view(t.shape).to(t.dtype)
            except (RuntimeError, IndexError):  # of other sizes
                found = None
        if found is None or found.shape != t.shape:
            raise VitreousError(f"{path} holds no weights for '{name}' of this model: give the model that it was written from")
        state[name] = found
    model.load_state_dict(state)
    return model


def on_tensor_cores(model: nn.Module) -> nn.Module:
    """A copy in half precision on CUDA, whose 2:4 layers run in the kernels that skip the zeros.

    They pay for large products alone: batches of 64 and more. Raises `VitreousError` without such a device (compute capability
    8.0), and for a model that did not go through `TwoFour`.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise VitreousError("2:4 kernels need an NVIDIA GPU of compute capability 8.0 or more: elsewhere zeros save no time")
    if not (names := _sparse(model)):
        raise VitreousError("no layer of this model is 2:4: apply prune.TwoFour first")
    made = bare(model).half().cuda()
    for name in names:
        layer: Any = made.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, nn.Linear) and layer.in_features % 64 == 0 and layer.out_features % 32 == 0:
            layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
    return remember(made, history_of(model))


def _sparse(model: nn.Module) -> set[str]:
    plans: list[Mapping[str, Any]] = [plan for s, plan in history_of(model).done if isinstance(s, TwoFour)]
    return {name for plan in plans for name in plan["zeros"]} & set(model.state_dict())


def _nibbles(whole: Tensor) -> Tensor:
    """Integers from −8 to 7, `[out, n]`, two a byte."""
    low = nn.functional.pad(whole, (0, whole.shape[1] % 2)).to(torch.uint8) & 15
    return low[:, ::2] | low[:, 1::2] << 4


def _whole(packed: Tensor) -> Tensor:
    both = torch.stack([packed & 15, packed >> 4], 2).flatten(1).to(torch.int8)
    return torch.where(both > 7, both - 16, both)
