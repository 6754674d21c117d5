"""Multiply-accumulates, counted from the operators that really run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .errors import VitreousError

# Torch's own counter knows another choice of operators in every version, and counts what it does not know as nothing.


class Uncounted(VitreousError):
    """An operator multiplies, or may, in a way that nothing here knows."""


class CountMacs(TorchDispatchMode):
    """While it is active, `total` adds up the multiply-accumulates of matrix products, convolutions and attention.

    Counted densely: a mask saves nothing. An operator made of others is taken apart, a custom one written in Python looked
    into; of one in another language, torch's `register_flop_formula` may say what it does. Raises `Uncounted` with the
    name of an operator that multiplies matrices, or may, in a way that is not known here: a count without it would be wrong.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._higher(func, args, kwargs)
        packet = func._overloadpacket
        name = packet._qualified_op_name
        formula = FORMULAS.get(name)
        if formula is None:
            with self:
                out = func.decompose(*args, **kwargs)
                if out is NotImplemented and name in OPDEFS and packet not in flop_registry:
                    out = OPDEFS[name]._init_fn(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(args, out)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out) // 2
        elif _multiplies(name):
            raise _unknown(name)
        return out

    def _higher(self, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        if func.name() != "flex_attention":
            raise _unknown(func.name())
        out = func(*args, **kwargs)
        self.total += _attention(args, out)
        return out


def _unknown(name: str) -> Uncounted:
    return Uncounted(
        f"cannot count multiply-accumulates: what the operator {name} multiplies is not known; "
        "torch.utils.flop_counter.register_flop_formula tells it"
    )


# Namespaces of torch itself, in which operators are called for what they do; of all others nothing is known.
OF_TORCH = re.compile(r"aten|prims?|_?quantized\w*|mkl\w*|onednn|inductor\w*|sparse|torchvision|\w*c10d\w*")
PRODUCT = re.compile(
    r"(?<![a-z])[a-z]*mm(?![a-z])|[a-z]*gemm|matmul|conv(?!ert)|linear|attention|attn|(?<![a-z])v?dot|[a-z]*mv(?![a-z])"
    r"|rnn|gru|lstm|einsum|encoder_layer|matrix_(exp|power)"
)
HARMLESS = re.compile(r"pack(?!ed)|upsample|_cell|reorder|flatten_weight|linear_combination|quantize_weight")


def _multiplies(name: str) -> bool:
    """Whether an operator that is not made of others multiplies matrices, or is somebody's own and may."""
    space, _, short = name.partition("::")
    if not OF_TORCH.fullmatch(space):
        return True
    return bool(PRODUCT.search(short)) and not HARMLESS.search(short)


# ---- formulas: of an operator's arguments and its result


def _product(args: Any, out: Tensor) -> int:
    """`[..., k]` times a matrix in whatever form."""
    return out.numel() * args[0].shape[-1]


def _added(args: Any, out: Tensor) -> int:
    return out.numel() * args[1].shape[-1]


def _added_batch(args: Any, out: Tensor) -> int:
    return out.numel() * args[1].shape[-1] * args[1].shape[0]


def _grouped(args: Any, out: Tensor) -> int:
    a, b = args[:2]
    if a.ndim == b.ndim == 2:  # the sum over k is what is cut into groups
        return a.shape[0] * a.shape[1] * b.shape[1]
    return out.numel() * a.shape[-1]


def _convolution(args: Any, out: Tensor) -> int:
    return out.numel() * math.prod(args[1].shape[1:])


def _either_convolution(args: Any, out: Tensor) -> int:
    """x, weight, bias, stride, padding, dilation, whether it is transposed: then every input meets the whole kernel."""
    return _convolution(args, args[0] if args[6] else out)


def _attention(args: Any, out: Any) -> int:
    """q `[..., heads, Nq, D]`, k `[..., Nk, D]`, v `[..., Nk, Dv]`: each head of q meets one of k and v."""
    q, k, v = args[:3]
    return math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(args: Any, out: Any) -> int:
    """The gradient of the output, then q, k, v: the scores anew, and four products of gradients."""
    q, k, v = args[1:4]
    return math.prod(q.shape[:-1]) * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


def _attention_over_tokens(args: Any, out: Any) -> int:
    """q `[B, Nq, heads, D]`, k and v `[B, Nk, heads, D]`."""
    q, k, v = args[:3]
    if q.ndim != 4:
        raise _unknown("attention over sequences of unequal length")
    return math.prod(q.shape[:-1]) * k.shape[1] * (q.shape[-1] + v.shape[-1])


def _whole_attention(args: Any, out: Any) -> int:
    """query, key, value `[B, N, C]`, then width and number of heads, and the weights of all four projections."""
    q, k, v, width = args[:4]
    rows = q.shape[0] * (2 * q.shape[1] + k.shape[1] + v.shape[1])
    return rows * width**2 + 2 * q.shape[0] * q.shape[1] * k.shape[1] * width


def _whole_layer(args: Any, out: Any) -> int:
    """x `[B, N, C]`, width, heads, …; the 15th argument is the first weight `[hidden, C]` of the MLP."""
    x, width, hidden = args[0], args[1], args[14].shape[0]
    return _whole_attention((x, x, x, width), out) + 2 * x.shape[0] * x.shape[1] * width * hidden


def _convolved_tokens(args: Any, out: Tensor) -> int:
    return out.numel() * math.prod(args[1].shape[:2])


FORMULAS: dict[str, Callable[[Any, Any], int]] = {
    **dict.fromkeys(
        (
            "aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot", "aten::_int_mm", "aten::_weight_int8pack_mm",
            "aten::_weight_int4pack_mm", "aten::_weight_int4pack_mm_for_cpu", "aten::_weight_int4pack_mm_with_scales_and_zeros",
            "aten::_dyn_quant_matmul_4bit", "aten::_scaled_mm", "aten::_scaled_mm_v2", "aten::mkldnn_linear",
            "aten::_sparse_semi_structured_linear", "aten::_mixed_dtypes_linear", "mkl::_mkl_linear", "mkldnn::_linear_pointwise",
            "quantized::linear", "quantized::linear_dynamic", "quantized::linear_relu", "quantized::linear_relu_dynamic",
            "quantized::linear_dynamic_fp16", "quantized::linear_relu_dynamic_fp16", "quantized::matmul",
            "quantized::linear_leaky_relu", "quantized::linear_tanh", "onednn::qlinear_pointwise",
        ),
        _product,
    ),
    **dict.fromkeys(("aten::addmm", "aten::addmv", "aten::baddbmm", "aten::_addmm_activation"), _added),
    "aten::addbmm": _added_batch,
    **dict.fromkeys(("aten::_grouped_mm", "aten::_scaled_grouped_mm", "aten::_scaled_grouped_mm_v2"), _grouped),
    **dict.fromkeys(
        (
            "aten::cudnn_convolution", "aten::cudnn_convolution_relu", "aten::cudnn_convolution_add_relu",
            "aten::mkldnn_convolution", "aten::_slow_conv2d_forward", "aten::slow_conv3d_forward", "aten::_conv_depthwise2d",
            "aten::conv_depthwise3d", "aten::slow_conv_dilated2d", "aten::slow_conv_dilated3d", "aten::miopen_convolution",
            "aten::_mps_convolution", "mkldnn::_convolution_pointwise",
        ),
        _convolution,
    ),
    **dict.fromkeys(("aten::convolution", "aten::_convolution", "aten::convolution_overrideable"), _either_convolution),
    "aten::conv_tbc": _convolved_tokens,
    **dict.fromkeys(
        (
            "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
            "aten::_scaled_dot_product_fused_attention_overrideable", "aten::_scaled_dot_product_attention_math_for_mps",
        ),
        _attention,
    ),
    **dict.fromkeys(
        (
            "aten::_scaled_dot_product_flash_attention_backward", "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
            "aten::_scaled_dot_product_efficient_attention_backward", "aten::_scaled_dot_product_cudnn_attention_backward",
            "aten::_scaled_dot_product_fused_attention_overrideable_backward",
        ),
        _attention_backward,
    ),
    **dict.fromkeys(("aten::_flash_attention_forward", "aten::_efficient_attention_forward"), _attention_over_tokens),
    "aten::_native_multi_head_attention": _whole_attention,
    "aten::_transformer_encoder_layer_fwd": _whole_layer,
}  # fmt: skip
