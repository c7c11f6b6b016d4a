"""What an operation costs, as functions of shapes; torch's FlopCounterMode counts by them once this is imported.

FLOPs are real additions and multiplications; a multiply-add (MAC) is two. Importing sgconvnext.profile adds what torch
lacks: FFTs, complex products, linear interpolation and our own operators, forward and backward.

    from torch.utils.flop_counter import FlopCounterMode
    import sgconvnext.profile
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..longconv import tiles

COMPLEX_PRODUCT = 6  # four multiplications and two additions
INTERPOLATION = 3  # a + t (b - a), per output


def real_fft(n: int) -> int:
    """FLOPs of one transform of n real numbers, either way: 2.5 n log2 n, half of the complex one's 5 n log2 n."""
    return round(2.5 * n * math.log2(n))


def fft_conv(batch: int, channels: int, n: int) -> int:
    """FLOPs of a depthwise convolution by real FFTs of n points: x and y per image, the taps once, their product."""
    spectrum = n // 2 + 1
    return channels * ((2 * batch + 1) * real_fft(n) + batch * spectrum * COMPLEX_PRODUCT)


def toeplitz_conv(batch: int, channels: int, length: int) -> int:
    """FLOPs of a depthwise convolution as a product with an L x L matrix per channel, its zeros included."""
    return 2 * batch * channels * length**2


def tiled_conv(batch: int, channels: int, length: int, num_taps: int) -> int:
    """FLOPs of a depthwise convolution on tensor cores, with the zeros that fill tiles up to their size.

    Tiles of outputs that a causal kernel cannot reach from an input are left out.
    """
    return 2 * tiles.conv_macs(batch, channels, length, length - num_taps, length - 1)


def dft_conv(batch: int, channels: int, blocks: int, size: int) -> int:
    """FLOPs of a depthwise convolution by matrix products over n blocks of b samples.

    Per image W, M and W^T of longconv.dft, and once the transform of the taps.
    """
    per_image = 2 * (2 * blocks * blocks * size) + blocks * (2 * size) ** 2
    return 2 * channels * (batch * per_image + dft_response(blocks, size))


def dft_response(blocks: int, size: int) -> int:
    """MACs of transforming the taps of one channel, over the 2n-1 distances between blocks, for 2b-1 lags each."""
    return 2 * blocks * (2 * blocks - 1) * (2 * size - 1)


def linear_interpolation(outputs: int) -> int:
    """FLOPs of interpolating that many outputs linearly, each between two inputs."""
    return INTERPOLATION * outputs


def _real_forward(x: Tensor, dim: list[int], *_: Any, **__: Any) -> int:
    return _transforms(x.shape, dim, math.prod(x.shape[axis] for axis in dim))


def _real_inverse(x: Tensor, dim: list[int], normalization: int, last: int, *_: Any, **__: Any) -> int:
    return _transforms(x.shape, dim, math.prod(x.shape[axis] for axis in dim[:-1]) * last)


def _complex(x: Tensor, dim: list[int], *_: Any, **__: Any) -> int:
    return 2 * _real_forward(x, dim)


def _transforms(shape: torch.Size, dim: list[int], n: int) -> int:
    """All transforms of n points, over one dimension or several, in a tensor of that shape."""
    return math.prod(size for axis, size in enumerate(shape) if axis not in dim) * real_fft(n)


def _product(x: Any, y: Any, *_: Any, out_val: Tensor, **__: Any) -> int:
    """A product of real numbers is elementwise, which FlopCounterMode counts for nobody."""
    complex_pair = all(isinstance(factor, Tensor) and factor.is_complex() for factor in (x, y))
    return COMPLEX_PRODUCT * out_val.numel() if complex_pair else 0


def _interpolation(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return linear_interpolation(out_val.numel())


def _interpolation_backward(dy: Tensor, *_: Any, **__: Any) -> int:
    return linear_interpolation(dy.numel())


def _tiled_conv(x: Tensor, taps: Tensor, *_: Any, **__: Any) -> int:
    batch, channels, length = x.shape
    return tiled_conv(batch, channels, length, taps.shape[1])


def _tiled_conv_dx(dy: Tensor, taps: Tensor, *_: Any, **__: Any) -> int:
    batch, channels, length = dy.shape
    return 2 * tiles.conv_macs(batch, channels, length, 1 - length, taps.shape[1] - length)


def _tiled_conv_dtaps(dy: Tensor, x: Tensor, num_taps: int, *_: Any, **__: Any) -> int:
    batch, channels, length = x.shape
    return 2 * tiles.dtaps_macs(batch, channels, length, length - num_taps)


TORCH_FORMULAS: dict[Any, Any] = {
    torch.ops.aten._fft_r2c: _real_forward,
    torch.ops.aten._fft_c2r: _real_inverse,
    torch.ops.aten._fft_c2c: _complex,
    torch.ops.aten.mul: _product,
    torch.ops.aten.mul_: _product,
    torch.ops.aten.upsample_linear1d: _interpolation,
    torch.ops.aten.upsample_linear1d_backward: _interpolation_backward,
    torch.ops.sgconvnext.toeplitz_conv: _tiled_conv,
    torch.ops.sgconvnext.toeplitz_conv_dx: _tiled_conv_dx,
    torch.ops.sgconvnext.toeplitz_conv_dtaps: _tiled_conv_dtaps,
}
for _operator, _formula in TORCH_FORMULAS.items():
    if _operator not in flop_registry:  # a later torch may bring its own
        register_flop_formula(_operator, get_raw=True)(_formula)
