"""Parts that several architectures share, under the field's usual names."""

from .block import MetaBlock
from .depthwise import ConditionalPosition, DepthwiseMlp, conv_norm

__all__ = ["ConditionalPosition", "DepthwiseMlp", "MetaBlock", "conv_norm"]
