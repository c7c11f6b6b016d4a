"""Long convolution by real FFT: O(L log L), in float32 (float64 for float64) whatever the dtype of x."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import cost
from .backend import Backend, Operations
from .context import is_open, is_traced_to_onnx
from .precision import full_precision, without_autocast

# Bytes of padded signals that are transformed at a time. On a CPU a chunk and its spectrum should stay in the cache:
# 16 images of tiny's first stage take 80 ms all at once, forward and backward, and 55 in chunks. In chunks of a
# quarter of the size they take 77, since each call computes its roots of unity anew. Elsewhere it bounds the memory.
CPU_CHUNK_BYTES, CHUNK_BYTES = 2**23, 2**28
# Samples of all channels that are transposed at a time on a CPU: of one image, and of all images of a chunk.
BLOCK, CALL = 2**15, 2**17
FEW = 2**19  # samples of all signals, up to which fewer steps are worth more than fewer copies


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


def _write(rows: Tensor, part: Tensor) -> None:
    """Copy a part into rows whose samples lie side by side; of channels last, as many samples as the cache holds."""
    length, step = part.shape[-1], max(1, part.shape[-1])
    if part.device.type == "cpu" and part.stride(-1) != 1:
        images = part.shape[0] if part.ndim == 3 else 1
        step = max(1, BLOCK // part.shape[-2], CALL // (images * part.shape[-2]))
    for first in range(0, length, step):
        rows[..., first : first + step] = part[..., first : first + step]


class _Padded:
    """Transforms of chunks of signals like x. The zeros behind the samples are written once, not for every chunk."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.length, self.n = x.shape, x.shape[-1], fft_length(x.shape[-1])
        self.memory = torch.empty(0, 0, self.n, dtype=full_precision(x.dtype), device=x.device)

    def chunks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Slices of the channels, and for each of them slices of the images, that are transformed at a time."""
        batch, channels, _ = self.shape
        limit = CPU_CHUNK_BYTES if self.memory.device.type == "cpu" else CHUNK_BYTES
        # a few signals per thread at least: for a million tokens MKL's roots of unity take as long as four transforms
        signals = max(4 * torch.get_num_threads(), limit // (self.n * self.memory.itemsize))
        width = -(-channels // -(-channels // signals))  # channels of a chunk: all chunks but the last have as many
        images = max(1, signals // max(1, width))
        for first in range(0, channels, width):
            yield slice(first, first + width), [slice(i, i + images) for i in range(0, batch, images)]

    def transform(self, part: Tensor, taps: Tensor | None = None) -> Tensor:
        """The spectra (b, c, n/2+1) of signals (b, c, L); with taps (c, T), theirs (1, c, n/2+1) before them.

        In one call, since each call computes its roots of unity anew.
        """
        rows = self._rows(*part.shape[:2])
        _write(rows[1:, :, : self.length], part)
        if taps is None:
            return torch.fft.rfft(rows[1:])
        behind = taps.shape[1] - self.length  # negative lags: in circular order they are at the end
        rows[0, :, self.length : self.n - behind] = 0
        _write(rows[0, :, : self.length], taps[:, behind:])
        _write(rows[0, :, self.n - behind :], taps[:, :behind])
        return torch.fft.rfft(rows)

    def _rows(self, count: int, channels: int) -> Tensor:
        """Rows (1 + count, c, n), zero behind the samples; the first is for taps."""
        if channels != self.memory.shape[1] or count >= len(self.memory):  # the first chunk is the largest
            self.memory = self.memory.new_empty(1 + count, channels, self.n)
            self.memory[1:, :, self.length :] = 0
        return self.memory[: 1 + count]

    def back(self, spectrum: Tensor) -> Tensor:
        """The signals of a spectrum."""
        return torch.fft.irfft(spectrum, self.n)[..., : self.length]


def _freeze(taps: Tensor, length: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The convolution with fixed taps, which are transformed once."""
    spectrum = _spectrum(taps.to(full_precision(dtype)), length)

    def convolve(x: Tensor) -> Tensor:
        if _are_few(x):
            return _few(torch.fft.rfft(x.to(full_precision(dtype)), fft_length(length)).mul_(spectrum), x)
        y, padded = torch.empty_like(x), _Padded(x)
        for channels, batch in padded.chunks():
            for images in batch:
                y[images, channels] = padded.back(padded.transform(x[images, channels]).mul_(spectrum[channels]))
        return y

    return convolve


def _are_few(x: Tensor) -> bool:
    return x.device.type == "cpu" and 0 < x.numel() <= FEW


def _few(spectrum: Tensor, x: Tensor) -> Tensor:
    """The signals of a spectrum, laid out as x is."""
    return torch.empty_like(x).copy_(torch.fft.irfft(spectrum, fft_length(x.shape[-1]))[..., : x.shape[-1]])


def _few_gradients(x: Tensor, taps: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    length, num_taps, dtype = x.shape[-1], taps.shape[1], full_precision(x.dtype)
    n = fft_length(length)
    with without_autocast(x):
        of_dy = torch.fft.rfft(dy.to(dtype), n)
        by_lag = torch.fft.irfft(torch.fft.rfft(x.to(dtype), n).conj_physical_().mul_(of_dy).sum(0), n)
        dtaps = torch.cat([by_lag[:, n + length - num_taps :], by_lag[:, :length]], dim=1)
        return _few(of_dy.mul_(_spectrum(taps.to(dtype), length).conj_physical_()), x), dtaps


def _conv(x: Tensor, taps: Tensor, adjoint: bool) -> Tensor:
    if _are_few(x):
        with without_autocast(x):
            return torch.empty_like(x).copy_(_plain_conv(x, taps, adjoint))
    y, padded = torch.empty_like(x), _Padded(x)
    with without_autocast(x):
        for channels, batch in padded.chunks():
            kernel: Tensor | None = None
            for images in batch:
                spectra = padded.transform(x[images, channels], taps[channels] if kernel is None else None)
                if kernel is None:
                    kernel, spectra = spectra[0], spectra[1:]
                    if adjoint:
                        kernel.conj_physical_()
                y[images, channels] = padded.back(spectra.mul_(kernel))
    return y


def _correlate(x: Tensor, dy: Tensor, num_taps: int, dx: Tensor | None = None, taps: Tensor | None = None) -> Tensor:
    """The gradient of the taps. If dx and the taps are given, the gradient of x is written into dx."""
    length, padded = x.shape[-1], _Padded(x)
    behind = num_taps - length
    # channels last, as taps are; zero without images
    dtaps = torch.zeros(num_taps, x.shape[1], dtype=full_precision(x.dtype), device=x.device).t()
    with without_autocast(x):
        for channels, batch in padded.chunks():
            kernel = correlation = None
            for images in batch:
                with_taps = taps[channels] if taps is not None and kernel is None else None
                of_dy = padded.transform(dy[images, channels], with_taps)
                if with_taps is not None:
                    kernel, of_dy = of_dy[0].conj_physical_(), of_dy[1:]
                product = padded.transform(x[images, channels]).conj_physical_().mul_(of_dy)
                total = product[0] if len(product) == 1 else product.sum(0)
                correlation = total if correlation is None else correlation.add_(total)
                if dx is not None and kernel is not None:
                    dx[images, channels] = padded.back(of_dy.mul_(kernel))
            if correlation is not None:
                by_lag = torch.fft.irfft(correlation, padded.n)
                dtaps[channels, behind:] = by_lag[:, :length]
                dtaps[channels, :behind] = by_lag[:, padded.n - behind :]
    return dtaps


def _gradients(x: Tensor, taps: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dtaps; dy is transformed once for both."""
    if _are_few(x):
        return _few_gradients(x, taps, dy)
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
