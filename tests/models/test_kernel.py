"""Parameters -> taps: the equation worked out by hand, F.interpolate, and the sizes that follow from the length."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import mixers, relative_error, small_model
from torch import Tensor

from sgconvnext.models.kernel import (
    kernel_of_lags,
    kernel_options,
    l2_norm,
    lag_taps,
    multiscale_kernel,
    nearest_weight,
    num_scales_for,
    scale_dim_for,
)


def rows(*scales: list[float]) -> Tensor:
    """Parameters (1, N, 1, d) of one channel in one direction."""
    return torch.tensor(scales, dtype=torch.float32)[None, :, None, :]


# d = 2, N = 4. Upsampling 2 -> 4 reads w at -1/4, 1/4, 3/4, 5/4, and 2 -> 8 at -3/8, -1/8, 1/8, ... 11/8; positions
# outside 0 .. 1 are clamped. So (4, 8) becomes (4, 5, 7, 8) and (8, 16) becomes (8, 8, 9, 11, 13, 15, 16, 16).
BY_HAND = rows([1, 2], [3, -1], [4, 8], [8, 16])


@pytest.mark.parametrize("length", [16, 13, 9, 8, 5, 3, 1])
def test_kernel_matches_the_equation_worked_out_by_hand(length: int) -> None:
    scales = [1, 2], [1.5, -0.5], [1, 1.25, 1.75, 2], [1, 1, 1.125, 1.375, 1.625, 1.875, 2, 2]
    want = torch.tensor([tap for scale in scales for tap in scale][:length])
    got = multiscale_kernel(BY_HAND, length, kernel_options())
    assert got.shape == (1, 1, length)
    assert relative_error(got[0, 0], want) <= 1e-6


@pytest.mark.parametrize(
    ("exponent", "want"),
    [
        (1.0, [1, 1, 1, -1 / 4, 4 / 5, 5 / 6, 1]),
        (2.0, [1, 1 / 2, 1 / 3, -1 / 16, 4 / 25, 5 / 36, 1 / 7]),
        (0.0, [1, 2, 3, -1, 4, 5, 7]),
    ],
)
def test_decay_by_position_is_a_power_law_without_alpha(exponent: float, want: list[float]) -> None:
    got = multiscale_kernel(BY_HAND[:, :3], 7, kernel_options(decay="position", exponent=exponent))
    assert relative_error(got[0, 0], torch.tensor(want)) <= 1e-6


def test_alpha_runs_over_the_channels_evenly_in_its_inverse() -> None:
    got = multiscale_kernel(torch.ones(1, 3, 3, 1), 4, kernel_options(alpha=(1.0, 1 / 3)))
    want = torch.tensor([[1, 1, 1, 1], [1, 1 / 2, 1 / 4, 1 / 4], [1, 1 / 3, 1 / 9, 1 / 9]])
    assert relative_error(got[0], want) <= 1e-6


@pytest.mark.parametrize("length", [48, 33, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_are_upsampled_as_interpolate_does(dtype: torch.dtype, length: int) -> None:
    weight = torch.randn(2, 5, 4, 3, dtype=dtype)
    got = multiscale_kernel(weight, length, kernel_options(alpha=0.7))
    for direction in range(2):
        for channel in range(4):
            scales = [
                0.7**i * F.interpolate(weight[direction, i, channel][None, None], size=size, mode="linear")[0, 0]
                for i, size in enumerate([3, 3, 6, 12, 24])
            ]
            assert relative_error(got[direction, channel], torch.cat(scales)[:length]) <= 1e-6
    assert got.dtype == dtype


def test_norm_is_the_l2_norm_of_each_kernel() -> None:
    kernel = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[-8.0, 6.0], [5.0, 12.0]]])
    assert torch.equal(l2_norm(kernel), torch.tensor([[[5.0], [2.0]], [[10.0], [13.0]]]))


def test_kernels_of_every_stage_start_with_unit_norm() -> None:
    layers = mixers(small_model(img_size=224))
    assert [layer.length for layer in layers] == [3136, 784, 196, 49]
    for layer in layers:
        kernel = layer.kernel()
        assert kernel.shape == (2, layer.channels, layer.length)
        assert relative_error(kernel.norm(dim=-1), torch.ones(2, layer.channels)) <= 1e-6
        # the norm counts the taps in use: the cut scales alone are longer, and would give another Z
        whole = multiscale_kernel(layer.weight, 16 * layer.weight.shape[-1], kernel_options())
        cut = whole[..., : layer.length].double().norm(dim=-1, keepdim=True)
        assert relative_error(layer.kernel_norm, cut) <= 1e-6


@pytest.mark.parametrize(("length", "scale_dim"), [(3136, 196), (784, 49), (196, 13), (49, 4)])
def test_stages_at_224_px_have_five_scales_of_known_width(length: int, scale_dim: int) -> None:
    assert scale_dim_for(length, 5) == scale_dim
    assert num_scales_for(length, scale_dim) == 5


def test_number_of_scales_is_one_plus_the_ceiling_of_the_logarithm() -> None:
    for length in range(1, 300):
        for scale_dim in range(1, 80):
            want = max(1, 1 + math.ceil(math.log2(length / scale_dim)))
            assert num_scales_for(length, scale_dim) == want, (length, scale_dim)


def test_scale_width_is_the_least_that_covers_the_length() -> None:
    for length in range(1, 300):
        for num_scales in range(1, 12):
            scale_dim = scale_dim_for(length, num_scales)
            assert scale_dim >= 1
            assert scale_dim * 2 ** (num_scales - 1) >= length, (length, num_scales)
            assert (scale_dim - 1) * 2 ** (num_scales - 1) < length, (length, num_scales)


def test_taps_run_from_the_last_negative_lag_to_the_last_positive() -> None:
    kernel = torch.tensor([[[1.0, 2.0, 3.0]], [[10.0, 20.0, 30.0]]])  # k- starts at lag -1
    assert lag_taps(kernel, torch.tensor([100.0])).tolist() == [[20.0, 10.0, 101.0, 2.0, 3.0]]


def test_causal_taps_start_at_lag_zero() -> None:
    kernel = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    assert lag_taps(kernel, torch.tensor([100.0, 200.0])).tolist() == [[101.0, 2.0, 3.0], [204.0, 5.0, 6.0]]


def test_one_tap_is_lag_zero_in_both_directions() -> None:
    assert lag_taps(torch.tensor([[[1.0]], [[10.0]]]), torch.tensor([100.0])).tolist() == [[101.0]]
    assert lag_taps(torch.tensor([[[1.0]]]), torch.tensor([100.0])).tolist() == [[101.0]]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_kernel_of_lags_is_the_inverse_of_lag_taps(length: int, directions: int) -> None:
    kernel = torch.randn(directions, 3, length)
    kernel[1:, :, -1] = 0  # no output reaches lag -L
    assert torch.equal(kernel_of_lags(lag_taps(kernel, torch.zeros(3)), directions == 2), kernel)


OPTIONS = [{}, {"alpha": (1.0, 1 / 3)}, {"decay": "position"}, {"decay": "position", "exponent": 0.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [96, 75, 49, 13, 6])  # of 6 taps a scale: whole, cut in the last scale, few scales
def test_nearest_weight_has_the_kernel_of_the_weight_that_made_it(length: int, options: dict[str, Any]) -> None:
    chosen, weight = kernel_options(**options), torch.randn(2, 5, 3, 6, dtype=torch.float64)
    kernel = multiscale_kernel(weight, length, chosen)
    got = nearest_weight(kernel, 5, 6, chosen)
    assert relative_error(multiscale_kernel(got, length, chosen), kernel) <= 1e-12
    if length == 96:
        assert relative_error(got, weight) <= 1e-12


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("num_scales", "length"), [(1, 6), (1, 4), (2, 12), (2, 9)])
def test_every_kernel_of_one_or_two_scales_has_a_weight(num_scales: int, length: int, options: dict[str, Any]) -> None:
    chosen, kernel = kernel_options(**options), torch.randn(2, 3, length)
    got = nearest_weight(kernel, num_scales, 6, chosen)
    assert got.shape == (2, num_scales, 3, 6)
    assert relative_error(multiscale_kernel(got, length, chosen), kernel) <= 1e-6


@pytest.mark.parametrize("length", [48, 41, 25])
def test_nearest_weight_leaves_the_least_squares(length: int) -> None:
    """No step in any direction comes nearer."""
    kernel = torch.randn(1, 2, length, dtype=torch.float64)
    weight = nearest_weight(kernel, 4, 6, kernel_options()).requires_grad_()
    loss = (multiscale_kernel(weight, length, kernel_options()) - kernel).square().sum()
    (slope,) = torch.autograd.grad(loss, weight)
    assert float(loss) > 0.1
    assert float(slope.abs().max()) <= 1e-10


def test_nearest_weight_of_no_far_taps_has_none() -> None:
    kernel = torch.zeros(2, 3, 40)
    kernel[..., :12] = torch.randn(2, 3, 12)
    weight = nearest_weight(kernel, 4, 6, kernel_options(alpha=1.0))
    assert not weight[:, 2:].any()
    assert relative_error(weight[:, :2].transpose(1, 2).flatten(2), kernel[..., :12]) == 0
