"""The definition of the long convolution, in float64: slow, obviously right, what every backend is tested against."""

import torch
from torch import Tensor

from . import cost
from .backend import Backend


def long_conv(x: Tensor, taps: Tensor) -> Tensor:
    """Depthwise convolution over the whole length, summed in float64; O(L^2) time and memory.

        y[b, c, t] = sum_{s=0}^{L-1} K[c, t - s] x[b, c, s]

    Args:
        x: signal (B, C, L).
        taps: K (C, 2L-1) for the lags -(L-1) .. L-1, or (C, L) for the lags 0 .. L-1 (causal).

    Returns:
        y (B, C, L) in the dtype of x.
    """
    length = x.shape[-1]
    first_lag = length - taps.shape[-1]
    time = torch.arange(length, device=x.device)
    lag = time[:, None] - time[None, :]  # (t, s)
    matrix = taps.double()[:, (lag - first_lag).clamp(min=0)]  # (C, t, s)
    matrix = torch.where(lag >= first_lag, matrix, 0.0)
    return torch.einsum("cts,bcs->bct", matrix, x.double()).to(x.dtype)


BACKEND = Backend(cost.toeplitz_conv, plain=long_conv)
