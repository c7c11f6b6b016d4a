"""What the parts of a long convolution cost, as functions of shapes; each backend puts them together for itself.

FLOPs are real additions and multiplications; a multiply-add (MAC) is two.
"""

import math
from collections.abc import Sequence

COMPLEX_PRODUCT = 6  # four multiplications and two additions
INTERPOLATION = 3  # a + t (b - a), per output


def real_fft(n: int) -> int:
    """FLOPs of one transform of n real numbers, either way: 2.5 n log2 n, half of the complex one's 5 n log2 n."""
    return round(2.5 * n * math.log2(n))


def fft_conv(batch: int, channels: int, n: int) -> int:
    """FLOPs of a depthwise convolution by real FFTs of n points: x and y per image, the taps once, their product."""
    spectrum = n // 2 + 1
    return channels * ((2 * batch + 1) * real_fft(n) + batch * spectrum * COMPLEX_PRODUCT)


def toeplitz_conv(batch: int, channels: int, length: int, num_taps: int) -> int:
    """FLOPs of a depthwise convolution as a product with an L x L matrix per channel, the zeros of causal taps too."""
    return 2 * batch * channels * length**2


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
