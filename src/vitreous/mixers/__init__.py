"""Parts that several architectures share, under the field's usual names."""

from .block import MetaBlock
from .depthwise import ConditionalPosition, DepthwiseMlp, conv_norm
from .dilated import DilatedReparam
from .distilled import DistilledHead
from .ela import ELA
from .fourier import irfft2, rfft2
from .monarch import MonarchLinear, block_diagonal
from .neighbourhood import NeighbourhoodAttention, adaptive_avg_pool, neighbourhoods
from .polyphase import CircularConv2d, anchored
from .positions import patch_grid, require_size, resample_position, sinusoid
from .scan import SelectiveScan, gated_linear_attention, linear_recurrence, selective_scan, state_space_dual
from .spacings import DCLS, repulsion, spaced_kernel

__all__ = [
    "DCLS",
    "ELA",
    "CircularConv2d",
    "ConditionalPosition",
    "DepthwiseMlp",
    "DilatedReparam",
    "DistilledHead",
    "MetaBlock",
    "MonarchLinear",
    "NeighbourhoodAttention",
    "SelectiveScan",
    "adaptive_avg_pool",
    "anchored",
    "block_diagonal",
    "conv_norm",
    "gated_linear_attention",
    "irfft2",
    "linear_recurrence",
    "neighbourhoods",
    "patch_grid",
    "repulsion",
    "require_size",
    "resample_position",
    "rfft2",
    "selective_scan",
    "sinusoid",
    "spaced_kernel",
    "state_space_dual",
]
