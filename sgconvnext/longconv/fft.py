"""Long convolution by real FFT: O(L log L), in float32 (float64 for float64) whatever the dtype of x."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import full_precision, without_autocast


def fft_length(length: int) -> int:
    """The shortest even 7-smooth transform that a linear convolution of L samples and 2L-1 lags fits: n >= 2L-1.

    Any n >= 2L-1 is exact: lags l and l - n then never both lie within -(L-1) .. L-1. Of those, even 7-smooth n are
    fast in every FFT library (at 224 px: 6272, 1568, 392, 98).
    """
    n = 2 * length - 1
    n += n % 2
    while not _is_smooth(n):
        n += 2
    return n


def _is_smooth(n: int) -> bool:
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n = n // prime  # TorchScript has no //=
    return n == 1


def _taps_spectrum(taps: Tensor, length: int, n: int) -> Tensor:
    """Transform of the taps in circular order: lag 0 first, the negative lags at the end."""
    num_taps = taps.shape[-1]
    return torch.fft.rfft(F.pad(taps, (0, n - num_taps)).roll(length - num_taps, -1))


def plain_long_conv(x: Tensor, taps: Tensor) -> Tensor:
    """Same contract as reference.long_conv in plain operators: for TorchScript, which cannot see `_FFTConv`."""
    length = x.shape[-1]
    n = fft_length(length)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    spectrum = torch.fft.rfft(x.to(dtype), n) * _taps_spectrum(taps.to(dtype), length, n)
    return torch.fft.irfft(spectrum, n)[..., :length].to(x.dtype)


class _FFTConv(torch.autograd.Function):
    """Saves x and the taps only; autograd through the plain operators would keep two spectra, four times as much."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        with without_autocast(x):
            return plain_long_conv(x, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, taps = ctx.saved_tensors
        length, num_taps = x.shape[-1], taps.shape[-1]
        n, dtype = fft_length(length), full_precision(x)
        dx = dtaps = None
        with without_autocast(x):
            dy_spectrum = torch.fft.rfft(dy.to(dtype), n)
            if ctx.needs_input_grad[0]:
                taps_spectrum = _taps_spectrum(taps.to(dtype), length, n)
                dx = torch.fft.irfft(dy_spectrum * taps_spectrum.conj(), n)[..., :length].to(x.dtype)
            if ctx.needs_input_grad[1]:
                correlation = (dy_spectrum * torch.fft.rfft(x.to(dtype), n).conj()).sum(0)
                dtaps = torch.fft.irfft(correlation, n).roll(num_taps - length, -1)[..., :num_taps].to(taps.dtype)
        return dx, dtaps


def long_conv(x: Tensor, taps: Tensor) -> Tensor:
    """Same contract as reference.long_conv; float32 inside (float64 for float64)."""
    y: Tensor = _FFTConv.apply(x, taps)
    return y
