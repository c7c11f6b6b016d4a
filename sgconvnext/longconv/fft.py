"""Long convolution by real FFT: O(L log L), in float32 (float64 for float64) whatever the dtype of x."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import full_precision, without_autocast

# Bytes of padded signals that are transformed at a time. On a CPU a piece and its spectrum should stay in the cache:
# 32 images of tiny's first stage take 125 ms at once, 45 ms one by one. Elsewhere it only bounds the memory.
CPU_PIECE, PIECE = 2**21, 2**28


def fft_length(length: int) -> int:
    """A transform that a linear convolution of L samples and 2L-1 lags fits: the shortest n >= 2L-1 of 16 2^a 3^b 5^c.

    Any n >= 2L-1 is exact: lags l and l - n then never both lie within -(L-1) .. L-1. These are fast in every
    FFT library (at 224 px: 6400, 1600, 400, 128; on a CPU 400 takes 15 % less time than the shorter 392 = 8 * 7^2).
    """
    n = -(-(2 * length - 1) // 16) * 16
    while not _is_smooth(n):
        n += 16
    return n


def _is_smooth(n: int) -> bool:
    for prime in (2, 3, 5):
        while n % prime == 0:
            n = n // prime  # TorchScript has no //=
    return n == 1


def _spectrum(taps: Tensor, length: int) -> Tensor:
    """Transform of the taps in circular order: lag 0 first, the negative lags at the end."""
    behind = taps.shape[-1] - length  # negative lags
    gap = taps.new_zeros(taps.shape[0], fft_length(length) - taps.shape[-1])
    return torch.fft.rfft(torch.cat([taps[:, behind:], gap, taps[:, :behind]], dim=1))


def plain_long_conv(x: Tensor, taps: Tensor) -> Tensor:
    """Same contract as reference.long_conv in plain operators: for TorchScript and torch.func, blind to `_FFTConv`."""
    length = x.shape[-1]
    n = fft_length(length)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    spectrum = torch.fft.rfft(x.to(dtype), n) * _spectrum(taps.to(dtype), length)
    return torch.fft.irfft(spectrum, n)[..., :length].to(x.dtype)


def _pieces(x: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the channels, and for each of them slices of the images, that are transformed at a time."""
    batch, channels, length = x.shape
    if torch.compiler.is_compiling():  # a graph has no use for the loops, only their length
        yield slice(0, channels), [slice(0, batch)]
        return
    limit = CPU_PIECE if x.device.type == "cpu" else PIECE
    # no fewer than threads, which take one each
    signals = max(torch.get_num_threads(), limit // (fft_length(length) * full_precision(x.dtype).itemsize))
    width = -(-channels // -(-channels // signals))  # of as many equal groups of channels as it takes
    images = max(1, signals // max(1, width))
    for first in range(0, channels, width):
        yield slice(first, first + width), [slice(i, i + images) for i in range(0, batch, images)]


def _convolve(x: Tensor, spectrum_of: Callable[[slice], Tensor]) -> Tensor:
    """x (B, C, L) convolved with the taps whose spectrum (c, n/2+1) that function gives for channels."""
    length, dtype = x.shape[-1], full_precision(x.dtype)
    n = fft_length(length)
    y = torch.empty_like(x)
    for channels, pieces in _pieces(x):
        spectrum = spectrum_of(channels)
        for images in pieces:
            transformed = torch.fft.rfft(x[images, channels].to(dtype), n)
            y[images, channels] = torch.fft.irfft(transformed.mul_(spectrum), n)[..., :length]
    return y


def freeze(taps: Tensor, length: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The convolution with fixed taps, which are transformed once; see `sgconvnext.longconv.freeze`."""
    spectrum = _spectrum(taps.to(full_precision(dtype)), length)

    return lambda x: _convolve(x, spectrum.__getitem__)


class _FFTConv(torch.autograd.Function):
    """Saves x and the taps only; autograd through the plain operators would keep two spectra, four times as much."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        dtype = full_precision(x.dtype)
        with without_autocast(x):
            return _convolve(x, lambda channels: _spectrum(taps[channels].to(dtype), x.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, taps = ctx.saved_tensors
        length, num_taps = x.shape[-1], taps.shape[-1]
        n, dtype = fft_length(length), full_precision(x.dtype)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dtaps = torch.zeros_like(taps) if ctx.needs_input_grad[1] else None  # zero without images
        with without_autocast(x):
            for channels, pieces in _pieces(x):
                taps_spectrum = _spectrum(taps[channels].to(dtype), length).conj() if dx is not None else None
                correlation: Tensor | None = None
                for images in pieces:
                    dy_spectrum = torch.fft.rfft(dy[images, channels].to(dtype), n)
                    if dx is not None:
                        dx[images, channels] = torch.fft.irfft(dy_spectrum * taps_spectrum, n)[..., :length]
                    if dtaps is not None:
                        product = dy_spectrum.mul_(torch.fft.rfft(x[images, channels].to(dtype), n).conj()).sum(0)
                        correlation = product if correlation is None else correlation.add_(product)
                if dtaps is not None and correlation is not None:
                    by_lag = torch.fft.irfft(correlation, n).roll(num_taps - length, -1)
                    dtaps[channels] = by_lag[..., :num_taps]
        return dx, dtaps


def long_conv(x: Tensor, taps: Tensor) -> Tensor:
    """Same contract as reference.long_conv; float32 inside (float64 for float64)."""
    y: Tensor = _FFTConv.apply(x, taps)
    return y
