"""SGConvNeXt: ConvNeXt with global convolution. ``import sgconvnext`` registers its models with timm."""

from . import flop_counter as flop_counter  # torch counts what we run
from . import registry as registry
from .layer import SGConv, SGConv2d
from .model import SGConvNeXt

__version__ = "0.1.0"
__all__ = ["SGConv", "SGConv2d", "SGConvNeXt", "__version__"]
