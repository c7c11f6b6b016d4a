"""Long convolution by real FFT: O(L log L), in float32 (float64 for float64) whatever the dtype of x."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import cost
from .backend import Backend, Operations
from .context import is_open, is_traced_to_onnx
from .precision import full_precision, without_autocast

# Bytes of padded signals that are transformed at a time. On a CPU a chunk and its spectrum should stay in the cache:
# 32 images of tiny's first stage take 125 ms at once, 45 ms one by one. Elsewhere it only bounds the memory.
CPU_CHUNK_BYTES, CHUNK_BYTES = 2**21, 2**28


def fft_length(length: int) -> int:
    """A transform that a linear convolution of L samples and 2L-1 lags fits: the shortest n >= 2L-1 of 16 2^a 3^b 5^c.

    Any n >= 2L-1 is exact: of the lags l and l - n at most one lies within -(L-1) .. L-1. Lengths of this form are
    fast in every FFT library (at 224 px: 6400, 1600, 400, 128; on a CPU 400 takes 15 % less time than 392 = 8 * 7^2).
    An export that leaves L open cannot search, and takes 2L.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out an if, but no half of a condition
        if is_open((length,)):
            return 2 * length
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
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out an if, but no half of a condition
        if not is_open(taps.shape) and behind == 0:  # the vmap of is_grads_batched joins no empty part
            return torch.fft.rfft(torch.cat([taps, gap], dim=1))
    return torch.fft.rfft(torch.cat([taps[:, behind:], gap, taps[:, :behind]], dim=1))


def plain_long_conv(x: Tensor, taps: Tensor) -> Tensor:
    """Same contract as reference.long_conv in operators that write nowhere: for TorchScript, and for what traces."""
    length = x.shape[-1]
    n = fft_length(length)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    spectrum = torch.fft.rfft(x.to(dtype), n) * _spectrum(taps.to(dtype), length)
    return torch.fft.irfft(spectrum, n)[..., :length].to(x.dtype)


def _chunks(x: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the channels, and for each of them slices of the images: the chunks that are transformed at a time."""
    batch, channels, length = x.shape
    limit = CPU_CHUNK_BYTES if x.device.type == "cpu" else CHUNK_BYTES
    # one signal per thread at least
    signals = max(torch.get_num_threads(), limit // (fft_length(length) * full_precision(x.dtype).itemsize))
    width = -(-channels // -(-channels // signals))  # channels of a chunk: all chunks but the last have as many
    images = max(1, signals // max(1, width))
    for first in range(0, channels, width):
        yield slice(first, first + width), [slice(i, i + images) for i in range(0, batch, images)]


class _Padded:
    """Transforms of chunks of one signal. The zeros behind the samples are written once, not for every chunk."""

    def __init__(self, x: Tensor) -> None:
        self.length, self.n = x.shape[-1], fft_length(x.shape[-1])
        self.memory = torch.empty(0, dtype=full_precision(x.dtype), device=x.device)

    def transform(self, part: Tensor) -> Tensor:
        """The spectrum (b, c, n/2+1) of signals (b, c, L)."""
        size = part.shape[0] * part.shape[1] * self.n
        if self.memory.numel() < size:  # the first chunk is the largest
            self.memory = self.memory.new_zeros(size)
        rows = self.memory[:size].view(part.shape[0], part.shape[1], self.n)
        rows[..., : self.length] = part  # in the dtype of the transform
        return torch.fft.rfft(rows)

    def back(self, spectrum: Tensor) -> Tensor:
        """The signals of a spectrum."""
        return torch.fft.irfft(spectrum, self.n)[..., : self.length]


def _convolve(x: Tensor, spectrum_of: Callable[[slice], Tensor]) -> Tensor:
    """x (B, C, L) convolved with taps, given by a function from a slice of channels to their spectra (c, n/2+1)."""
    y, padded = torch.empty_like(x), _Padded(x)
    for channels, batch in _chunks(x):
        spectrum = spectrum_of(channels)
        for images in batch:
            y[images, channels] = padded.back(padded.transform(x[images, channels]).mul_(spectrum))
    return y


def _freeze(taps: Tensor, length: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The convolution with fixed taps, which are transformed once."""
    spectrum = _spectrum(taps.to(full_precision(dtype)), length)

    return lambda x: _convolve(x, spectrum.__getitem__)


def _conv(x: Tensor, taps: Tensor, adjoint: bool) -> Tensor:
    dtype = full_precision(x.dtype)

    def spectrum_of(channels: slice) -> Tensor:
        spectrum = _spectrum(taps[channels].to(dtype), x.shape[-1])
        return spectrum.conj() if adjoint else spectrum

    with without_autocast(x):
        return _convolve(x, spectrum_of)


def _correlate(x: Tensor, dy: Tensor, num_taps: int, dx: Tensor | None = None, taps: Tensor | None = None) -> Tensor:
    """The gradient of the taps. If dx and the taps are given, the gradient of x is written into dx."""
    length, dtype, padded = x.shape[-1], full_precision(x.dtype), _Padded(x)
    dtaps = torch.zeros(x.shape[1], num_taps, dtype=dtype, device=x.device)  # zero without images
    with without_autocast(x):
        for channels, batch in _chunks(x):
            spectrum = None if taps is None else _spectrum(taps[channels].to(dtype), length).conj()
            correlation: Tensor | None = None
            for images in batch:
                transformed = padded.transform(dy[images, channels])
                if dx is not None and spectrum is not None:
                    dx[images, channels] = padded.back(transformed * spectrum)
                product = transformed.mul_(padded.transform(x[images, channels]).conj_physical_()).sum(0)
                correlation = product if correlation is None else correlation.add_(product)
            if correlation is not None:
                dtaps[channels] = torch.fft.irfft(correlation, padded.n).roll(num_taps - length, -1)[..., :num_taps]
    return dtaps


def _gradients(x: Tensor, taps: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dtaps; dy is transformed once for both."""
    dx = torch.empty_like(x)
    return dx, _correlate(x, dy, taps.shape[1], dx, taps)


def _flops(batch: int, channels: int, length: int, num_taps: int) -> int:
    return cost.fft_conv(batch, channels, fft_length(length))


def _refusal(x: Tensor) -> str | None:
    if not is_traced_to_onnx():
        return None
    return (
        "backend 'fft' cannot be exported to ONNX with dynamo=False, which has no FFT; build the model with "
        "backend='auto' or 'dft', or export it with dynamo=True"
    )


BACKEND = Backend(
    _flops, Operations(_conv, _correlate, _gradients), plain=plain_long_conv, refusal=_refusal, freeze=_freeze
)


def _plain_conv(x: Tensor, taps: Tensor, adjoint: bool) -> Tensor:
    if not adjoint:
        return plain_long_conv(x, taps)
    length, dtype = x.shape[-1], full_precision(x.dtype)
    n = fft_length(length)
    product = torch.fft.rfft(x.to(dtype), n) * _spectrum(taps.to(dtype), length).conj_physical()
    return torch.fft.irfft(product, n)[..., :length].to(x.dtype)


def _plain_correlate(x: Tensor, dy: Tensor, num_taps: int) -> Tensor:
    length, dtype = x.shape[-1], full_precision(x.dtype)
    n = fft_length(length)
    product = torch.fft.rfft(dy.to(dtype), n) * torch.fft.rfft(x.to(dtype), n).conj_physical()
    by_lag = torch.fft.irfft(product.sum(0), n)
    return torch.cat([by_lag[:, n + length - num_taps :], by_lag[:, :length]], dim=1)


def _plain_gradients(x: Tensor, taps: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _plain_conv(dy, taps, True), _plain_correlate(x, dy, taps.shape[1])


PLAIN = Operations(_plain_conv, _plain_correlate, _plain_gradients)
