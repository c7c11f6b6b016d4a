"""FLOP formulas against sums written out by hand, and torch's own counter."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS_HERE
from torch.utils.flop_counter import FlopCounterMode

from sgconvnext.longconv import BACKENDS, cost, long_conv


def counted(function: object, *arguments: object) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)  # type: ignore[operator]
    return counter.get_total_flops()


def test_transform_of_a_power_of_two_by_hand() -> None:
    assert cost.real_fft(8) == 60  # 2.5 * 8 * 3
    assert cost.real_fft(6272) == 197_799  # 2.5 * 6272 * 12.61471


def test_fft_convolution_by_hand() -> None:
    # 3 images of 2 channels: 6 transforms of x, 6 of y, 2 of the taps, and 6 spectra of 5 products
    assert cost.fft_conv(3, 2, 8) == 14 * 60 + 6 * 5 * 6


def test_toeplitz_convolution_by_hand() -> None:
    assert BACKENDS["toeplitz"].flops(3, 2, 5, 9) == 3 * 2 * 5 * 5 * 2


def test_convolution_by_matrix_products_by_hand() -> None:
    # 4 blocks of 8 samples. Taps: 8 waves at 7 distances for 15 lags. An image: 8 x 4 x 8, 4 x 16 x 16, 4 x 8 x 8
    assert BACKENDS["dft"].flops(3, 2, 32, 63) == 2 * (2 * 8 * 7 * 15 + 3 * 2 * (256 + 1024 + 256))


def test_torch_counts_a_real_transform_both_ways() -> None:
    assert counted(torch.fft.rfft, torch.randn(3, 8)) == 3 * 60
    assert counted(torch.fft.irfft, torch.randn(3, 5, dtype=torch.complex64), 8) == 3 * 60
    assert counted(lambda x: torch.fft.rfft(x, dim=0), torch.randn(8, 3)) == 3 * 60


def test_torch_counts_complex_products_and_leaves_real_ones_out() -> None:
    z = torch.randn(4, 5, dtype=torch.complex64)
    assert counted(torch.mul, z, z) == 6 * 20
    assert counted(torch.mul, z.real, z.real) == 0
    assert counted(torch.mul, z, 2.0) == 0


def test_torch_counts_interpolation_and_its_gradient() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)

    def both() -> None:
        F.interpolate(x, size=8, mode="linear").sum().backward()

    assert counted(both) == 2 * (3 * 2 * 3 * 8)


def test_torch_counts_transforms_over_two_dimensions_and_complex_ones() -> None:
    assert counted(torch.fft.rfft2, torch.randn(3, 2, 8)) == 3 * 160  # 2.5 * 16 * 4
    assert counted(torch.fft.irfft2, torch.randn(3, 2, 5, dtype=torch.complex64)) >= 3 * 160
    assert counted(torch.fft.fft, torch.randn(3, 8, dtype=torch.complex64)) == 3 * 120  # 5 * 8 * 3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [16, 49, 50])
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_torch_counts_what_the_formula_of_a_backend_says(backend: str, length: int, causal: bool) -> None:
    x, taps = torch.randn(3, 2, length), torch.randn(2, length if causal else 2 * length - 1)
    assert counted(long_conv, x, taps, backend) == BACKENDS[backend].flops(3, 2, length, taps.shape[1])


def test_torch_counts_the_backward_pass_of_the_fft() -> None:
    x, taps = torch.randn(3, 2, 49, requires_grad=True), torch.randn(2, 97, requires_grad=True)

    def both() -> None:
        long_conv(x, taps, "fft").sum().backward()

    # backward: transforms of dy, x and the taps, two inverse ones, dX's product and dK's
    once, spectrum = cost.real_fft(128), 65
    transforms = (6 + 6 + 2) + (6 + 6 + 2 + 6 + 2)
    assert counted(both) == transforms * once + 3 * 6 * spectrum * 6


def test_torch_counts_the_backward_pass_of_matrix_products() -> None:
    x, taps = torch.randn(3, 2, 32, requires_grad=True), torch.randn(2, 63, requires_grad=True)

    def both(backend: str) -> None:
        long_conv(x, taps, backend).sum().backward()

    assert counted(both, "toeplitz") == 3 * BACKENDS["toeplitz"].flops(3, 2, 32, 63)  # y, dX and dK
    # 4 blocks of 8: W or W^T five times (x, y, dy, dx, and x again), M three (y, dX and dK), and the taps three
    assert counted(both, "dft") == 2 * (6 * (5 * 256 + 3 * 1024) + 2 * 3 * (8 * 7 * 15))
