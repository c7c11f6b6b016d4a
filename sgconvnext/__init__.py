"""SGConvNeXt: ConvNeXt with global convolution. ``import sgconvnext`` registers its models with timm."""

from .longconv import flop_counter as flop_counter  # torch counts what we run
from .models import gated_convnext as gated_convnext  # registers the control
from .models.conversion import from_convnext
from .models.layer import SGConv, SGConv2d
from .models.sgconvnext import SGConvNeXt

__version__ = "0.1.0"

from .profile.tune import tune  # its tables tell the version
from .tuning import Tuning

__all__ = ["SGConv", "SGConv2d", "SGConvNeXt", "Tuning", "__version__", "from_convnext", "tune"]
