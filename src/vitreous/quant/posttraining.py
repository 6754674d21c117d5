"""What the post-training quantizers share: which layers they quantize, and on which grids."""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import PlainBlock, plain_blocks
from ..errors import VitreousError
from ..steps import Step
from .layers import LogSqrt2, QuantConv2d, Quantizer, QuantLinear


@dataclass(frozen=True)
class PostTraining(Step):
    """Quantizes linear layers and patch embedding, and in plain blocks the operands of the attention products.

    Calibrated on a few unlabelled images, without training. Of models whose blocks are not plain (windowed, pooled,
    rotary) only the linear layers and the patch embedding are quantized; their attention products stay in floats. So
    do layers that a model does not call as modules.

    weights, activations: bits, 2 to 8. Deployable with 8 and 8; otherwise simulated (`model.simulated` says so).
    softmax: quantize the product of softmax and values too. None: only below 8 bits, where the published method does.
        Softmax over hundreds of tokens hardly fills 256 uniform steps: on DINOv2 ViT-S/14 this product alone doubles
        the error of everything else, and it is a few percent of the work. NNCF leaves it in floats as well.
    reduce_range: keep int8 weights (and keys) within −63 … 63. Kernels for x86 without VNNI add pairs of uint8·int8 in
        16 bits, which overflow otherwise (ONNX Runtime calls it reduce_range, NNCF overflow_fix). None: decided by the
        machine that quantizes, and stored with the model. Without effect on simulated models.
    """

    weights: int = 8
    activations: int = 8
    softmax: bool | None = None
    reduce_range: bool | None = None

    needs_calibration: ClassVar[bool] = True
    log_softmax: ClassVar[bool] = False  # whether softmax below 8 bits lies on powers of √2

    def __post_init__(self) -> None:
        for field in ("weights", "activations"):
            if not 2 <= getattr(self, field) <= 8:
                raise VitreousError(f"{self.name}: {field} must be 2 to 8 bits, not {getattr(self, field)}")

    @property
    def deployable(self) -> bool:
        """Whether runtimes can execute the model's quantized layers in integers."""
        return self.weights == self.activations == 8

    def refuse_after(self, done: Sequence[Step]) -> str:
        if any(s.family == "quant" for s in done):
            return "the model is quantized already, a second grid would only add its error; start from the float model"
        return ""

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        assert calibration is not None
        reduce_range = saturates() if self.reduce_range is None else self.reduce_range
        return {"reduce_range": self.deployable and reduce_range, "layers": survey(model, calibration[:1])}

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        limit = 63 if plan["reduce_range"] else None
        for block in attention_blocks(model):
            block.attn.operands = self._operands(limit).to(next(block.parameters()).device)
        for name, after in plan["layers"].items():
            layer = model.get_submodule(name)
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            if after:
                _give_bias(layer)
                _give_bias(model.get_submodule(after))
            device, rows = layer.weight.device, layer.weight.shape[0]
            w = Quantizer(self.weights, symmetric=self.weights == 8, limit=limit, channels=rows).to(device)
            if isinstance(layer, nn.Linear):
                new: nn.Module = QuantLinear(layer, Quantizer(self.activations).to(device), w, after)
            else:
                new = QuantConv2d(layer, Quantizer(8).to(device), w)  # images stay at 8 bits, as published
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
        if not self.deployable:
            bits = f"{self.weights}-bit weights and {self.activations}-bit activations"
            model.simulated = f"{bits} are computed in floats: no runtime executes them"  # type: ignore[assignment]

    def _operands(self, limit: int | None) -> nn.ModuleDict:
        """Rows of softmax sum to 1, so products with them cannot overflow; of queries and keys one must be halved."""
        kind: dict[str, Any] = {"bits": self.activations, "symmetric": self.activations == 8}
        operands: dict[str, nn.Module] = {"q": Quantizer(**kind), "k": Quantizer(**kind, limit=limit)}
        if self.softmax if self.softmax is not None else not self.deployable:
            log = self.log_softmax and self.activations < 8
            operands |= {"v": Quantizer(**kind), "probs": (LogSqrt2 if log else Quantizer)(self.activations)}
        else:
            operands |= {"v": nn.Identity(), "probs": nn.Identity()}
        return nn.ModuleDict(operands)


def saturates() -> bool:
    """Whether int8 kernels may overflow on this machine: x86 without VNNI and AMX."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.9
    exact = any(known.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return not (exact or torch.cpu._is_vnni_supported())


def attention_blocks(model: nn.Module) -> list[PlainBlock]:
    """The blocks of `model` as `PlainBlock`s, in place; none when they are not plain."""
    return plain_blocks(model, "quantization") if read(model).plain else []


def survey(model: nn.Module, image: Tensor) -> dict[str, str]:
    """The layers to quantize, each with the LayerNorm of a plain block whose very output it reads, or ""."""
    model = copy.deepcopy(model)
    names: dict[nn.Module, str] = {}
    made: dict[int, tuple[Tensor, str]] = {}
    found: dict[str, str] = {}

    def after_norm(norm: nn.Module, _: Any, out: Tensor) -> None:
        made[id(out)] = (out, names[norm])  # the tensor is kept, so that its id stays its own

    def before_layer(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[names[layer]] = made[id(given[0])][1] if id(given[0]) in made else ""

    for block in attention_blocks(model):
        for norm in (block.norm1, block.norm2):
            if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
                norm.register_forward_hook(after_norm)
    for name, m in model.named_modules():
        names[m] = name
        if type(m) is nn.Linear or (isinstance(m, nn.Conv2d) and _patchifies(m)):
            m.register_forward_pre_hook(before_layer)
    with torch.no_grad():
        model(image.to(next(model.parameters())))
    return found


def _patchifies(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride != (1, 1) and conv.groups == 1


def _give_bias(layer: Any) -> None:
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
