"""What the post-training quantizers share: which layers they quantize, and on which grids."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..processor import saturates
from ..steps import Step
from .coverage import coverage
from .layers import FakeQuantizer, QuantConv2d, Quantizer, QuantLinear, quant_layers
from .linears import as_linears, attention_blocks, is_linear


@dataclass(frozen=True)
class PostTraining(Step):
    """Quantizes linear layers (convolutions of single pixels too) and patch embedding, and in plain blocks the operands of the
    attention products.

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
    floats: names of modules that stay in floats with all inside them, as "blocks.11.mlp".
    """

    weights: int = 8
    activations: int = 8
    softmax: bool | None = None
    reduce_range: bool | None = None
    floats: tuple[str, ...] = ()

    needs_calibration: ClassVar[bool] = True
    wide: ClassVar[bool] = True
    plans: ClassVar[dict[str, Any]] = {
        "reduce_range": bool,
        "layers": dict[str, list[str]],
        "bits": dict[str, list[Literal[2, 3, 4, 5, 6, 7, 8]]],
    }

    def __post_init__(self) -> None:
        for field in ("weights", "activations"):
            if not 2 <= getattr(self, field) <= 8:
                raise VitreousError(f"{self.name}: {field} must be 2 to 8 bits, not {getattr(self, field)}")

    @property
    def deployable(self) -> bool:
        """Whether runtimes can execute the model's quantized layers in integers."""
        return self.weights == self.activations == 8

    # ---- what a method may decide for itself, beside `fit`

    def softmax_quantizer(self, bits: int) -> FakeQuantizer:
        """For the softmax of a block, when it is quantized at all."""
        return Quantizer(bits)

    def input_quantizer(self, reads: str, bits: int) -> FakeQuantizer:
        """For the input of a linear layer that reads a "norm", an activation function ("act") or something else ("")."""
        return Quantizer(bits)

    def allot(self, model: nn.Module, calibration: Tensor, layers: dict[str, Read]) -> dict[str, tuple[int, int]]:
        """Bits of weight and input for the layers where they differ from `weights` and `activations`.

        The products of an attention "blocks.0.attn" are called "blocks.0.attn.qk" (bits of queries and of keys) and
        "blocks.0.attn.av" (of softmax and of values).
        """
        return {}

    # ---- the common structure

    def refuse_after(self, done: Sequence[Step]) -> str:
        if any(s.family == "quant" for s in done):
            return "the model is quantized already, a second grid would only add its error; start from the float model"
        return ""

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        assert calibration is not None
        if len(calibration) == 0:
            raise VitreousError(f"{self.name} was given no calibration images: give at least one, 32 are usual")
        as_linears(model)
        reduce_range = saturates() if self.reduce_range is None else self.reduce_range
        layers = self._without_floats(survey(model, calibration[:1]))
        bits = {name: list(pair) for name, pair in self.allot(model, calibration, layers).items()}
        return {"reduce_range": self.deployable and reduce_range, "layers": layers, "bits": bits}

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        as_linears(model)
        limit = 63 if plan["reduce_range"] else None
        usual = (self.weights, self.activations)
        for block in attention_blocks(model):
            name, own = f"{block.name}.attn", (self.activations, self.activations)
            if inside(name, self.floats):
                continue
            qk, av = (plan["bits"].get(f"{name}.{product}", own) for product in ("qk", "av"))
            block.attn.operands = self._operands(qk, av, limit).to(next(block.parameters()).device)
        for name, (reads, norm) in plan["layers"].items():
            layer = model.get_submodule(name)
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            if norm:
                give_bias(layer)
                give_bias(model.get_submodule(norm))
            w_bits, x_bits = plan["bits"].get(name, usual)
            w = Quantizer(w_bits, symmetric=w_bits == 8, limit=limit if w_bits == 8 else None, channels=layer.weight.shape[0])
            if isinstance(layer, nn.Linear):
                new: nn.Module = QuantLinear(layer, self.input_quantizer(reads, x_bits), w, norm)
            else:
                images = layer.kernel_size != (1, 1)  # they stay at 8 bits, as published
                new = QuantConv2d(layer, Quantizer(8 if images else x_bits), w)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to(layer.weight.device))
        if not self.deployable:
            bits = f"{self.weights}-bit weights and {self.activations}-bit activations"
            mixed = ", mixed by layer within that budget," if plan["bits"] else ""
            model.simulated = f"{bits}{mixed} are computed in floats: no runtime executes them"  # type: ignore[assignment]

    def _without_floats(self, layers: dict[str, Read]) -> dict[str, Read]:
        """A LayerNorm that a layer of floats reads too has to stay as it is."""
        for name in self.floats:
            if not any(inside(layer, (name,)) for layer in layers):
                raise VitreousError(f"{self.name}: floats names '{name}', in which there is no layer to quantize")
        kept = {norm for layer, (_, norm) in layers.items() if inside(layer, self.floats)}
        return {
            layer: (reads, "" if norm in kept else norm)
            for layer, (reads, norm) in layers.items()
            if not inside(layer, self.floats)
        }

    def covers(self, model: nn.Module, calibration: Tensor | None) -> str:
        return str(coverage(model, calibration))

    def _operands(self, qk: tuple[int, int], av: tuple[int, int], limit: int | None) -> nn.ModuleDict:
        """Rows of softmax sum to 1, so products with them cannot overflow; of queries and keys one must be halved."""

        def signed(bits: int, limit: int | None = None) -> Quantizer:
            return Quantizer(bits, symmetric=bits == 8, limit=limit if bits == 8 else None)

        operands: dict[str, nn.Module] = {"q": signed(qk[0]), "k": signed(qk[1], limit)}
        if self.softmax if self.softmax is not None else not self.deployable:
            operands |= {"v": signed(av[1]), "probs": self.softmax_quantizer(av[0])}
        else:
            operands |= {"v": nn.Identity(), "probs": nn.Identity()}
        return nn.ModuleDict(operands)


# What a layer reads: "norm", "act" or "", and the name of the LayerNorm of a plain block whose very output it is, or "".
Read = tuple[str, str]


def inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of `modules`, or in one."""
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def survey(model: nn.Module, image: Tensor) -> dict[str, Read]:
    """The layers to quantize, in the order in which they run, each with what it reads."""
    model = copy.deepcopy(model)
    names: dict[nn.Module, str] = {}
    made: dict[int, tuple[Tensor, Read]] = {}
    found: dict[str, Read] = {}

    def after_norm(norm: nn.Module, _: Any, out: Tensor) -> None:
        made[id(out)] = (out, ("norm", names[norm]))  # the tensor is kept, so that its id stays its own

    def after_act(act: nn.Module, _: Any, out: Tensor) -> None:
        made[id(out)] = (out, ("act", ""))

    def before_layer(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        reads, name = made[id(given[0])][1] if id(given[0]) in made else ("", ""), names[layer]
        found[name] = reads if found.get(name, reads) == reads else ("", "")  # called again, for something else

    for block in attention_blocks(model):
        for norm in (block.norm1, block.norm2):
            if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
                norm.register_forward_hook(after_norm)
    for name, m in model.named_modules():
        names[m] = name
        if is_linear(m) or (isinstance(m, nn.Conv2d) and _patchifies(m)):
            m.register_forward_pre_hook(before_layer)
        elif name.rpartition(".")[2] == "act":  # as timm calls the function of an MLP
            m.register_forward_hook(after_act)
    with torch.no_grad():
        model(image.to(next(model.parameters())))
    return found


def norm_readers(model: nn.Module) -> dict[str, dict[str, QuantLinear]]:
    """Of each LayerNorm whose scales can move into the layers that read it, these layers by the name of their `quant_x`."""
    readers: dict[str, dict[str, QuantLinear]] = {}
    for name, layer in quant_layers(model).items():
        if isinstance(layer, QuantLinear) and layer.after:
            readers.setdefault(layer.after, {})[f"{name}.quant_x"] = layer
    return readers


def _patchifies(conv: nn.Conv2d) -> bool:
    """Whether it reads each pixel once: a patch embedding, or a linear layer on single pixels."""
    return conv.kernel_size == conv.stride and conv.groups == 1 and conv.padding in ((0, 0), "valid")


def give_bias(layer: Any) -> None:
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
