"""SGConvNeXt: ConvNeXt with global convolution. ``import sgconvnext`` registers its models with timm."""

import importlib
from typing import Any

from .longconv import flop_counter as flop_counter  # torch counts what we run
from .models import gated_convnext as gated_convnext  # registers the control
from .models.conversion import from_convnext
from .models.layer import SGConv2d
from .models.sgconvnext import SGConvNeXt
from .sequences import networks as networks  # registers the networks for sequences
from .sequences.layer import SGConv
from .sequences.mixer import SGConvMixer
from .sequences.released import from_released

__version__ = "0.1.0"

__all__ = [
    "SGConv",
    "SGConv2d",
    "SGConvMixer",
    "SGConvNeXt",
    "Tuning",
    "__version__",
    "from_convnext",
    "from_released",
    "tune",
]


def __getattr__(name: str) -> Any:
    """`tune` and `Tuning` come when they are asked for: they import the tables of the profiler."""
    if name in ("Tuning", "tune"):
        return getattr(importlib.import_module(".profile.tune", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
