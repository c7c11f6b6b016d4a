"""The dtypes that backends compute in, under autocast and without it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Leave autocast for the device of x: the backend, not autocast, decides the dtype of each product."""
    device = x.device.type
    # the meta device has no autocast; torch.amp.is_autocast_available would tell, but torch 2.6 cannot compile it
    if device == "meta":
        return nullcontext()
    # where autocast is off, entering it takes longer than a small transform, and torch.export twice as long
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: FFTs take no bfloat16, and float16 only for powers of two."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution multiplies x: that of x, or autocast's where autocast is on and casts x."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
