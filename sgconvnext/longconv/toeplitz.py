"""Long convolution as one matrix product per channel: O(L^2), but at matrix-multiply speed; good for short lengths."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import full_precision, without_autocast
from .products import channel_chunks, multiply_into


def _two_sided(taps: Tensor, length: int) -> Tensor:
    """Taps (C, 2L-1) for all lags -(L-1) .. L-1, with zeros where a causal kernel has none."""
    missing = 2 * length - 1 - taps.shape[-1]
    return F.pad(taps, (missing, 0)) if missing else taps


def toeplitz(taps: Tensor) -> Tensor:
    """T (C, s, t) = K[c, t - s] of taps (C, 2L-1)."""
    length = (taps.shape[-1] + 1) // 2
    return taps.unfold(-1, length, 1).flip(1)  # window i holds the lags i-(L-1) .. i, the row s = L-1-i of T


def antidiagonal_sums(padded: Tensor) -> Tensor:
    """sum_{i+j=l} G[c, i, j] for l = 0 .. 2L-2, of G (C, L, L) with L zeros behind every row; with rows in reverse
    order the adjoint of `toeplitz`."""
    channels, length, _ = padded.shape
    # rows of 2L re-read 2L-1 wide: row i moves i columns right, so antidiagonals become columns
    return padded.flatten(1)[:, :-length].view(channels, length, 2 * length - 1).sum(1)


def _with_unit_stride(x: Tensor) -> Tensor:
    """A copy where samples are apart, as in a channels-last map: bmm would copy too, or multiply one by one.

    A compiler lays its tensors out itself; torch 2.6 does not even let it ask for strides in a backward pass.
    """
    return x if torch.compiler.is_compiling() or x.stride(-1) == 1 else x.contiguous()


def _convolve(x: Tensor, taps: Tensor, *, adjoint: bool = False, matrix: Tensor | None = None) -> Tensor:
    """y = x T for every channel, or x T^T; T may be known already."""
    _, channels, length = x.shape
    y = torch.empty_like(x)
    rows, products = _with_unit_stride(x).transpose(0, 1), y.transpose(0, 1)
    if matrix is not None:
        multiply_into(products, rows, matrix)
        return y
    for chunk in channel_chunks(channels, length**2 * x.itemsize, x.device):
        matrix = toeplitz(taps[chunk])
        multiply_into(products[chunk], rows[chunk], matrix.mT if adjoint else matrix)
    return y


def _correlate(x: Tensor, dy: Tensor) -> Tensor:
    """dK (C, 2L-1) = sum_{b,s} x[b, c, s] dy[b, c, s + lag], in float32 even for half precision: B*L products each."""
    _, channels, length = x.shape
    dtype = full_precision(x.dtype)
    rows, columns = _with_unit_stride(x).flip(-1).permute(1, 2, 0), _with_unit_stride(dy).transpose(0, 1)
    chunks = channel_chunks(channels, 2 * length**2 * dtype.itemsize, x.device)
    sums = torch.empty(channels, 2 * length - 1, dtype=dtype, device=x.device)
    padded = torch.zeros(chunks[0].stop if chunks else 0, length, 2 * length, dtype=dtype, device=x.device)
    for chunk in chunks:
        own = padded[: chunk.stop - chunk.start]
        multiply_into(own[..., :length], rows[chunk], columns[chunk])
        sums[chunk] = antidiagonal_sums(own)
    return sums


def freeze(taps: Tensor, length: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The convolution with fixed taps, whose matrix is built once if it is no larger than what is built at a time.

    See `sgconvnext.longconv.freeze`.
    """
    taps = _two_sided(taps.to(dtype), length)
    chunks = channel_chunks(taps.shape[0], length**2 * dtype.itemsize, taps.device)
    matrix = toeplitz(taps) if len(chunks) == 1 else None

    def convolve(x: Tensor) -> Tensor:
        with without_autocast(x):
            return _convolve(x, taps, matrix=matrix)

    return convolve


class _ToeplitzConv(torch.autograd.Function):
    """Saves x and the taps only; the matrix is L times larger than the taps and is built again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        with without_autocast(x):
            return _convolve(x, _two_sided(taps.to(x.dtype), x.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, taps = ctx.saved_tensors
        length, num_taps = x.shape[-1], taps.shape[-1]
        dx = dtaps = None
        with without_autocast(x):
            dy = dy.to(x.dtype)
            if ctx.needs_input_grad[0]:
                dx = _convolve(dy, _two_sided(taps.to(x.dtype), length), adjoint=True)
            if ctx.needs_input_grad[1]:
                dtaps = _correlate(x, dy)[:, 2 * length - 1 - num_taps :].to(taps.dtype)
        return dx, dtaps


def long_conv(x: Tensor, taps: Tensor) -> Tensor:
    """Same contract as reference.long_conv; products in the dtype of x, the taps' gradient summed in float32."""
    y: Tensor = _ToeplitzConv.apply(x, taps)
    return y
