"""Long convolution as one matrix product per channel: O(L^2), but at matrix-multiply speed; good for short lengths.

Products are in the dtype of x; the gradient of the taps is summed in float32. The matrix is L times larger than the
taps, so it is not kept but built again in backward.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cost
from .backend import Backend, Operations
from .precision import full_precision, without_autocast
from .products import channel_chunks, multiply_into


def _two_sided(taps: Tensor, length: int) -> Tensor:
    """Taps (C, 2L-1) for all lags -(L-1) .. L-1, with zeros where a causal kernel has none."""
    missing = 2 * length - 1 - taps.shape[-1]
    return F.pad(taps, (missing, 0)) if missing else taps


def toeplitz(taps: Tensor) -> Tensor:
    """T (C, s, t) = K[c, t - s] of taps (C, 2L-1)."""
    length = (taps.shape[-1] + 1) // 2
    taps = taps.contiguous()  # T then is laid out, and its products are rounded, the same for taps of every layout
    return taps.unfold(-1, length, 1).flip(1)  # window i holds the lags i-(L-1) .. i, the row s = L-1-i of T


def antidiagonal_sums(padded: Tensor) -> Tensor:
    """sum_{i+j=l} G[c, i, j] for l = 0 .. 2L-2, of G (C, L, L) with L zeros behind every row.

    For a G with its rows in reverse order this is the adjoint of `toeplitz`.
    """
    channels, length, _ = padded.shape
    # rows of 2L numbers are read again as rows of 2L-1: row i moves i columns right, and antidiagonals become columns
    return padded.flatten(1)[:, :-length].view(channels, length, 2 * length - 1).sum(1)


def _with_unit_stride(x: Tensor) -> Tensor:
    """x, or a copy if its samples are apart, as in a channels-last map: there bmm copies too, or is slow."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _convolve(x: Tensor, taps: Tensor, adjoint: bool = False, matrix: Tensor | None = None) -> Tensor:
    """y = x T for every channel, or x T^T; ``matrix`` is T if it has been built already."""
    _, channels, length = x.shape
    with without_autocast(x):
        y = torch.empty_like(x)
        rows, products = _with_unit_stride(x).transpose(0, 1), y.transpose(0, 1)
        if matrix is not None:
            multiply_into(products, rows, matrix)
            return y
        taps = _two_sided(taps.to(x.dtype), length)
        for chunk in channel_chunks(channels, length**2 * x.itemsize, x.device):
            matrix = toeplitz(taps[chunk])
            multiply_into(products[chunk], rows[chunk], matrix.mT if adjoint else matrix)
        return y


def _correlate(x: Tensor, dy: Tensor, num_taps: int) -> Tensor:
    """dK[c, lag] = sum_{b,s} x[b, c, s] dy[b, c, s + lag]: sums of B*L products, so in float32 at least."""
    _, channels, length = x.shape
    dtype = full_precision(x.dtype)
    with without_autocast(x):
        rows, columns = _with_unit_stride(x).flip(-1).permute(1, 2, 0), _with_unit_stride(dy).transpose(0, 1)
        chunks = channel_chunks(channels, 2 * length**2 * dtype.itemsize, x.device)
        sums = torch.empty(channels, 2 * length - 1, dtype=dtype, device=x.device)
        padded = torch.zeros(chunks[0].stop if chunks else 0, length, 2 * length, dtype=dtype, device=x.device)
        for chunk in chunks:
            own = padded[: chunk.stop - chunk.start]
            multiply_into(own[..., :length], rows[chunk], columns[chunk])
            sums[chunk] = antidiagonal_sums(own)
        return sums[:, 2 * length - 1 - num_taps :]


def _freeze(taps: Tensor, length: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The convolution with fixed taps, whose matrix is built once if all channels are one chunk."""
    taps = _two_sided(taps.to(dtype), length)
    chunks = channel_chunks(taps.shape[0], length**2 * dtype.itemsize, taps.device)
    return functools.partial(_convolve, taps=taps, matrix=toeplitz(taps) if len(chunks) == 1 else None)


def _plain(x: Tensor, taps: Tensor) -> Tensor:
    """Same contract as reference.long_conv in operators that write nowhere, for what traces."""
    length = int(x.shape[-1]) if torch.jit.is_tracing() else x.shape[-1]
    with without_autocast(x):
        lag = torch.arange(length, device=x.device)[None, :] - torch.arange(length, device=x.device)[:, None]
        matrix = _two_sided(taps.to(x.dtype), length)[:, lag + length - 1]  # (C, s, t)
        y = torch.matmul(x.transpose(0, 1), matrix).transpose(0, 1)
        return y.to(x.dtype)  # a trace forgets that it left autocast


BACKEND = Backend(cost.toeplitz_conv, Operations(_convolve, _correlate), plain=_plain, freeze=_freeze)
