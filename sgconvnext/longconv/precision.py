"""What every fast backend computes in, whatever mixed-precision context it is called from."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Leave autocast for the device of x: the backend, not autocast, decides the dtype of each product."""
    device = x.device.type
    # the meta device has no autocast to leave; torch 2.6 cannot compile the question torch.amp.is_autocast_available
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: FFTs have no bfloat16, and half only for powers of two."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """What a convolution would multiply x in: autocast's dtype where that is on, but for float64, else that of x."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
