"""Long convolution as one matrix product per channel: O(L^2), but at matrix-multiply speed; good for short lengths."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import full_precision, without_autocast


def _toeplitz(taps: Tensor, length: int) -> Tensor:
    """T (C, s, t) = K[c, t - s], with zeros where a causal kernel has no lag."""
    taps = F.pad(taps, (2 * length - 1 - taps.shape[-1], 0))
    return taps.unfold(-1, length, 1).flip(1)  # window i holds the lags i-(L-1) .. i, the row s = L-1-i of T


def _diagonal_sums(product: Tensor) -> Tensor:
    """sum_s G[c, s, s + lag] for the lags -(L-1) .. L-1: the adjoint of `_toeplitz`."""
    channels, length, _ = product.shape
    # rows padded to 2L and re-read 2L-1 wide: row i moves i columns right, so diagonals become columns
    skewed = F.pad(product.flip(1), (0, length)).flatten(1)[:, :-length]
    return skewed.view(channels, length, 2 * length - 1).sum(1)


def freeze(taps: Tensor, length: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The convolution with fixed taps, whose matrix is built once; see `sgconvnext.longconv.freeze`."""
    matrix = _toeplitz(taps.to(dtype), length)
    return lambda x: torch.bmm(x.transpose(0, 1), matrix).transpose(0, 1).contiguous()


class _ToeplitzConv(torch.autograd.Function):
    """Saves x and the taps only; the matrix is L times larger than the taps and is built again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        with without_autocast(x):
            matrix = _toeplitz(taps.to(x.dtype), x.shape[-1])
            return torch.bmm(x.transpose(0, 1), matrix).transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, taps = ctx.saved_tensors
        length, num_taps = x.shape[-1], taps.shape[-1]
        dx = dtaps = None
        with without_autocast(x):
            dy = dy.to(x.dtype).transpose(0, 1)
            if ctx.needs_input_grad[0]:
                matrix = _toeplitz(taps.to(x.dtype), length)
                dx = torch.bmm(dy, matrix.transpose(1, 2)).transpose(0, 1).contiguous()
            if ctx.needs_input_grad[1]:  # a tap sums B*L products: in float32 even for half-precision x
                dtype = full_precision(x.dtype)
                product = torch.bmm(x.permute(1, 2, 0).to(dtype), dy.to(dtype))
                dtaps = _diagonal_sums(product)[:, 2 * length - 1 - num_taps :].to(taps.dtype)
        return dx, dtaps


def long_conv(x: Tensor, taps: Tensor) -> Tensor:
    """Same contract as reference.long_conv; products in the dtype of x."""
    y: Tensor = _ToeplitzConv.apply(x, taps)
    return y
