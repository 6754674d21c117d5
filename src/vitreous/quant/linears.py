"""Linear layers by what they compute: subclasses, Hugging Face's Conv1D, and those inside of nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..anatomy import read
from ..blocks import PlainBlock, plain_blocks


def is_linear(module: nn.Module) -> bool:
    """Whether it computes what `nn.Linear` does, and is called to do it (nn.MultiheadAttention reads its projection's weight)."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and not isinstance(module, NonDynamicallyQuantizableLinear)


def as_linears(model: nn.Module) -> None:
    """Put `nn.Linear` in the place of layers that are linear under another name, in place. Doing it again changes nothing."""
    for name, m in list(model.named_modules()):
        if type(m).__name__ == "Conv1D" and hasattr(m, "nf"):  # of Hugging Face: weight [inputs, outputs]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _turned(m))
    if any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
        attention_blocks(model)


def attention_blocks(model: nn.Module) -> list[PlainBlock]:
    """The blocks of `model` as `PlainBlock`s, in place; none when they are not plain."""
    return plain_blocks(model, "quantization") if read(model).plain else []


def _turned(conv: Any) -> nn.Linear:
    inputs, outputs = conv.weight.shape
    new = nn.Linear(inputs, outputs, device="meta")
    new.weight = nn.Parameter(conv.weight.detach().T.contiguous(), conv.weight.requires_grad)
    new.bias = conv.bias
    return new.train(conv.training)
