"""What a long convolution costs, as functions of shapes.

FLOPs are real additions and multiplications; a multiply-add (MAC) is two.
"""

import math
from collections.abc import Callable, Sequence

from .dft import block_shape
from .fft import fft_length
from .triton import tiles

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


def image_interpolation(rows: int, shape: Sequence[int]) -> int:
    """FLOPs of interpolating an image of so many rows to (..., H, W); a single row only along itself."""
    outputs = math.prod(shape)
    return linear_interpolation(outputs if rows == shape[-2] == 1 else 3 * outputs)


def algorithm(batch: int, channels: int, length: int) -> int:
    """FLOPs of the convolution as the paper has it, by FFTs of 2L points, whatever backend runs it."""
    return fft_conv(batch, channels, 2 * length)


# FLOPs that each backend executes for x (B, C, L) and so many taps per channel
EXECUTED: dict[str, Callable[[int, int, int, int], int]] = {
    "fft": lambda batch, channels, length, _: fft_conv(batch, channels, fft_length(length)),
    "toeplitz": lambda batch, channels, length, _: toeplitz_conv(batch, channels, length),
    "dft": lambda batch, channels, length, _: dft_conv(batch, channels, *block_shape(length)),
    "triton": tiled_conv,
    "reference": lambda batch, channels, length, _: toeplitz_conv(batch, channels, length),
}
