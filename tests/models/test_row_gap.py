"""SGConv2d with rows kept apart and a bias: against loops over pairs of pixels, and torch's depthwise convolution."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS_HERE, refused, relative_error
from torch import Tensor, nn

from sgconvnext import SGConv2d
from sgconvnext.models.convnext import mixer_state
from sgconvnext.models.kernel import kernel_options, multiscale_kernel

each_side = pytest.mark.parametrize("bidirectional", [True, False], ids=["two-sided", "causal"])
# H, W and g: both even and odd, rows narrower than the gap, one row, one column, one pixel
CASES = [((4, 6), 1), ((5, 3), 2), ((3, 2), 3), ((1, 7), 5), ((4, 1), 3), ((1, 1), 2), ((3, 8), 3)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
KINDS: list[dict[str, Any]] = [{}, {"decay": "position"}, {"alpha": (1.0, 1 / 3)}, {"bidirectional": False}]


def gapped(size: Any, row_gap: int = 3, channels: int = 2, **options: Any) -> SGConv2d:
    layer = SGConv2d(channels, size, row_gap=row_gap, bias=True, **options)
    nn.init.normal_(layer.bias)
    return layer


def offset(lag: int, row: int) -> tuple[int, int]:
    """(dy, dx), found by search: lag = dy * row + dx with -row/2 <= dx < row/2."""
    (dx,) = (dx for dx in range(-row, row) if -row / 2 <= dx < row / 2 and (lag - dx) % row == 0)
    return (lag - dx) // row, dx


def tap(layer: SGConv2d, lag: int, size: tuple[int, int]) -> Tensor:
    """K[lag] (C) on a map of that size, in float64, without the skip."""
    (height, width), row = layer.input_size, layer.input_size[1] + layer.row_gap
    if size != layer.input_size:
        dy, dx = offset(lag, size[1] + layer.row_gap)
        lag = dy * row + dx
        if abs(dy) >= height or abs(dx) >= width or offset(lag, row) != (dy, dx):
            return torch.zeros(layer.channels, dtype=torch.float64)  # the built map has no such offset
    kernel = layer.kernel().detach().double()
    if lag < 0:
        return kernel[1, :, -lag - 1] if layer.bidirectional else torch.zeros_like(kernel[0, :, 0])
    return kernel[0, :, lag]


def by_loops(layer: SGConv2d, x: Tensor) -> Tensor:
    """K[t - s] x[s] summed over the pixels s, D x[t] and the bias, in float64; t = row * (W + g) + column."""
    height, width = x.shape[2:]
    row = width + layer.row_gap
    taps = {lag: tap(layer, lag, (height, width)) for lag in range(1 - height * row, height * row)}
    y = layer.skip.detach().double()[:, None, None] * x.double() + layer.bias.detach().double()[:, None, None]
    for i, j in torch.cartesian_prod(torch.arange(height), torch.arange(width)).tolist():
        for k in range(height):
            for m in range(width):
                y[:, :, i, j] += taps[(i - k) * row + j - m] * x[:, :, k, m].double()
    return y


# The definition


@each_side
@pytest.mark.parametrize("backend", ["auto", *BACKENDS_HERE])
def test_layer_matches_its_equation_written_as_loops(backend: str, bidirectional: bool) -> None:
    for size, gap in CASES:
        layer = gapped(size, gap, bidirectional=bidirectional, backend=backend)
        assert layer.length == size[0] * (size[1] + gap)
        x = torch.randn(2, 2, *size).to(memory_format=torch.channels_last)
        want = by_loops(layer, x)
        assert relative_error(layer(x), want) <= 2e-6
        layer.reparameterize()
        with torch.no_grad():
            assert relative_error(layer(x), want) <= 2e-6


@each_side
@pytest.mark.parametrize("gap", [1, 2, 3, 5])
def test_map_of_another_size_matches_the_equation_written_as_loops(gap: int, bidirectional: bool) -> None:
    for built in [(3, 5), (2, 2), (1, 1)]:
        layer = gapped(built, gap, bidirectional=bidirectional)
        for size in [(5, 4), (2, 7), (3, 1), (1, 1)]:
            x = torch.randn(1, 2, *size)
            assert relative_error(layer(x), by_loops(layer, x)) <= 2e-6, (built, size)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("how", ["input", "both", "autocast"])
def test_layer_matches_the_loops_in_every_dtype(how: str, dtype: torch.dtype) -> None:
    layer, x = gapped((4, 5)), torch.randn(2, 2, 4, 5, dtype=torch.float64).to(dtype)
    layer = layer.to(dtype) if how == "both" else layer
    want = by_loops(layer, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = layer(x)
    assert y.dtype == dtype
    taps_in_float32 = how != "both" or dtype != torch.float64
    tolerance = max(TOLERANCE[dtype], 2e-6 if taps_in_float32 else 0.0)
    assert relative_error(y, want) <= tolerance
    if dtype == torch.float32:
        layer.reparameterize()
        with torch.no_grad():
            assert relative_error(layer(x), want) <= 2e-6


def test_triton_gives_what_the_loops_give() -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = gapped((3, 4), channels=16, backend="triton", device=device)
    x = torch.randn(2, 16, 3, 4, device=device, dtype=torch.float16)
    assert relative_error(layer(x).cpu(), by_loops(copy.deepcopy(layer).cpu(), x.cpu())) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("dilation", [2, 4])
def test_dilated_layer_keeps_the_rows_of_every_subsampled_map_apart(dilation: int) -> None:
    layer = gapped((2, 3), dilation=dilation)
    for height, width in [(2 * dilation, 3 * dilation), (5, 7), (1, 9)]:
        x = torch.randn(1, 2, height, width)
        filled = F.pad(x, (0, -width % dilation, 0, -height % dilation))
        want = torch.zeros_like(filled, dtype=torch.float64)
        for i in range(dilation):
            for j in range(dilation):
                want[:, :, i::dilation, j::dilation] = by_loops(layer, filled[:, :, i::dilation, j::dilation])
        assert relative_error(layer(x), want[:, :, :height, :width]) <= 2e-6


@each_side
def test_gradients_match_finite_differences(bidirectional: bool) -> None:
    layer = gapped((2, 3), 2, bidirectional=bidirectional, dtype=torch.float64)
    names = ["weight", "skip", "bias"]
    for size in [(2, 3), (3, 2)]:
        x = torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True)
        inputs = [*(layer.get_parameter(name) for name in names), x]
        assert torch.autograd.gradcheck(
            lambda *p: torch.func.functional_call(layer, dict(zip(names, p, strict=False)), (p[-1],)), inputs
        )


def test_without_gap_and_bias_the_layer_is_the_one_of_before() -> None:
    layer, x = SGConv2d(2, (4, 6), row_gap=0, bias=False), torch.randn(2, 2, 4, 6)
    plain = SGConv2d(2, (4, 6))
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    assert list(layer.state_dict()) == ["weight", "skip", "kernel_norm"]
    assert str(layer) == str(plain)
    assert str(gapped((4, 6))).endswith("input_size=(4, 6), row_gap=3, bias=True)")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"row_gap": -1}, ["row_gap=-1", "at least 0"]),
        ({"row_gap": True}, ["row_gap=True", "whole number"]),
        ({"row_gap": "3"}, ["row_gap='3'", "whole number"]),
        ({"row_gap": 2.5}, ["row_gap=2.5", "whole number"]),
        ({"bias": 1}, ["bias=1", "True or False"]),
        ({"bias": "yes"}, ["bias='yes'", "True or False"]),
    ],
    ids=str,
)
def test_impossible_gap_or_bias_is_refused(options: dict[str, Any], words: list[str]) -> None:
    with refused(*words):
        SGConv2d(2, 4, **options)


# A k x k convolution as one setting of the layer


def converted(conv: nn.Conv2d, size: tuple[int, int], **options: Any) -> SGConv2d:
    layer = SGConv2d(conv.in_channels, size, **{"row_gap": conv.kernel_size[0] // 2, "bias": True} | options)
    layer.load_state_dict(mixer_state(conv.weight.detach(), layer) | {"bias": conv.bias.detach()})
    return layer


def depthwise(side: int, channels: int = 3, dilation: int = 1, **options: Any) -> nn.Conv2d:
    padding = dilation * (side // 2)
    return nn.Conv2d(channels, channels, side, padding=padding, dilation=dilation, groups=channels, **options)


@pytest.mark.parametrize("options", [{}, {"decay": "position"}, {"alpha": (1.0, 1 / 3)}, {"row_gap": 4}], ids=str)
@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("built", [(4, 4), (8, 5), (14, 14)], ids=str)
def test_depthwise_convolution_is_one_setting_at_every_size(
    built: tuple[int, int], side: int, options: dict[str, Any]
) -> None:
    conv = depthwise(side)
    layer = converted(conv, built, **options)
    for size in [built, (1, 1), (1, 5), (5, 1), (2, 3), (4, 4), (7, 3), (9, 16), (17, 15)]:
        x = torch.randn(1, 3, *size)
        assert relative_error(layer(x), conv(x)) <= 1e-6, size


@pytest.mark.parametrize("built", [(1, 1), (2, 2), (3, 2), (1, 6)], ids=str)
def test_convolution_is_exact_at_sizes_with_offsets_that_the_kernel_has_none_of(built: tuple[int, int]) -> None:
    conv = depthwise(7)
    layer = converted(conv, built)
    for size in [built, (1, 1), (1, built[1])]:
        x = torch.randn(1, 3, *size)
        assert relative_error(layer(x), conv(x)) <= 1e-6, size
    x = torch.randn(1, 3, 8, 8)  # where further offsets were left out, and nothing else is in their place
    kept = torch.zeros_like(conv.weight)
    rows, columns = (slice(3 - min(side - 1, 3), 4 + min(side - 1, 3)) for side in built)
    kept[:, :, rows, columns] = conv.weight.detach()[:, :, rows, columns]
    assert relative_error(layer(x), F.conv2d(x, kept, conv.bias, padding=3, groups=3)) <= 1e-6


@pytest.mark.parametrize("dilation", [2, 4])
def test_dilated_convolution_is_one_setting(dilation: int) -> None:
    conv = depthwise(7, dilation=dilation)
    layer = converted(conv, (5, 6), dilation=dilation)
    for size in [(5 * dilation, 6 * dilation), (13, 11), (1, 3), (20, 27)]:
        x = torch.randn(1, 3, *size)
        assert relative_error(layer(x), conv(x)) <= 1e-6, size


def test_gradients_of_a_converted_layer_are_those_of_the_convolution() -> None:
    conv, x, dy = depthwise(7), torch.randn(2, 3, 8, 9, requires_grad=True), torch.randn(2, 3, 8, 9)
    layer = converted(conv, (8, 9))
    want = torch.autograd.grad(conv(x), [x, conv.bias, conv.weight], dy)
    dx, dbias, dweight = torch.autograd.grad(layer(x), [x, layer.bias, layer.weight], dy)
    assert relative_error(dx, want[0]) <= 1e-6
    assert relative_error(dbias, want[1]) <= 1e-6
    middle = want[2][:, 0, 3, 3]  # lag 0: a parameter of w_0, scale 1 and norm 1
    assert relative_error(dweight[0, 0, :, 0], middle) <= 1e-5


@pytest.mark.parametrize("side", [3, 7])
def test_a_layer_that_cannot_hold_the_kernel_is_refused(side: int) -> None:
    conv, reach = depthwise(side), side // 2
    for options, words in [
        ({"row_gap": reach - 1}, [f"row_gap={reach - 1}", f"build it with row_gap={reach}"]),
        ({"bias": False}, ["no bias", "bias=True"]),
        ({"bidirectional": False}, ["causal", "bidirectional=True"]),
        ({"num_scales": 5}, ["too few taps", "num_scales=5"]),
    ]:
        with refused("conv_dw", *words):
            converted(conv, (8, 8), **options)


def test_gap_of_two_wraps_the_same_taps_into_the_next_row() -> None:
    """What the refusal above keeps from happening."""
    conv, x = depthwise(7), torch.randn(2, 3, 8, 8)
    layer = SGConv2d(3, (8, 8), row_gap=2, bias=True, scale_dim=40)
    padded = F.pad(conv.weight.detach(), (2, 1, 2, 1))  # on a map of rows of 10, lag 0 in the middle
    lags = {-(dy * 10 + dx): padded[:, 0, dy + 5, dx + 5] for dy in range(-3, 4) for dx in range(-3, 4)}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.kernel_norm.fill_(1)
        layer.bias.copy_(conv.bias)
        for lag, tap in lags.items():
            layer.weight[int(lag < 0), 0, :, lag if lag >= 0 else -lag - 1] = tap
    assert relative_error(layer(x)[..., 2:-2], conv(x)[..., 2:-2]) <= 1e-6  # away from the sides nothing wraps
    assert relative_error(layer(x), conv(x)) > 1e-2


# Another input size


SIZES = [(4, 4), (6, 9), (12, 5), (14, 14), (2, 3), (1, 1)]


@pytest.mark.parametrize("options", KINDS[:3], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_converted_layer_stays_the_convolution_when_it_is_rebuilt(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    conv = depthwise(7)
    layer = converted(conv, (8, 7), **options)
    layer.weight.requires_grad_(False)
    layer.set_input_size(size)
    built = gapped(size, channels=3, **options)
    assert (layer.input_size, layer.length) == (size, built.length)
    assert layer.weight.shape == built.weight.shape
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    for side in [size, (min(size[0], 3), min(size[1], 2))]:
        x = torch.randn(1, 3, *side)
        assert relative_error(layer(x), conv(x)) <= 1e-6
    if min(size) >= 4:  # no offset was lost on the way
        want = mixer_state(conv.weight.detach(), built)["weight"]
        assert relative_error(layer.weight, want) <= 1e-6
        layer.set_input_size((8, 7))
        assert relative_error(layer.weight, converted(conv, (8, 7), **options).weight) <= 1e-6


@pytest.mark.parametrize("num_scales", [None, 4])
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("size", [(6, 12), (9, 7), (16, 20)], ids=str)
def test_rebuilt_layer_has_the_kernel_nearest_to_the_taps_of_a_forward(
    size: tuple[int, int], options: dict[str, Any], num_scales: int | None
) -> None:
    layer = gapped((8, 10), dtype=torch.float64, num_scales=num_scales, **options)
    with torch.no_grad():  # as after training
        layer.weight.mul_(torch.rand_like(layer.weight) + 0.5)
    lags = range(size[0] * (size[1] + 3))
    want = [torch.stack([tap(layer, lag, size) for lag in lags])]
    if layer.bidirectional:
        want.append(torch.stack([tap(layer, -lag - 1, size) for lag in lags[:-1]] + [torch.zeros(2)]))
    layer.set_input_size(size)
    assert layer.weight.shape[1] == (num_scales or gapped(size, **options).weight.shape[1])
    assert layer.num_scales == num_scales
    got = layer.kernel().mT
    # one least-squares problem for all scales, whose decay only scales the solution; of positions, before the decay
    _, scales, _, scale_dim = layer.weight.shape
    unit = torch.eye(scales * scale_dim, dtype=torch.float64).reshape(1, -1, scales, scale_dim).transpose(1, 2)
    basis = multiscale_kernel(unit, layer.length, kernel_options(alpha=1.0))[0].T  # (L, N d)
    exponent = layer.options.exponent if layer.options.decay == "position" else 0.0
    growth = torch.arange(1, layer.length + 1).double()[:, None] ** exponent
    for side, taps in enumerate(want):
        best = basis @ torch.linalg.lstsq(basis, taps * growth, driver="gelsd").solution
        assert relative_error(got[side] * growth, best) <= 1e-10
    assert relative_error(got[0], want[0]) > 1e-3  # the far scales have fewer parameters than taps


@each_side
def test_way_to_a_smaller_map_and_back_loses_only_offsets_that_it_has_not(bidirectional: bool) -> None:
    """Where every offset has a parameter: with one or two scales."""
    layer = gapped((6, 7), bidirectional=bidirectional, num_scales=2, dtype=torch.float64)
    before = copy.deepcopy(layer)
    layer.set_input_size((4, 5))
    layer.set_input_size((6, 7))
    for lag in range(0 if not bidirectional else -50, 51):
        dy, dx = offset(lag, 10)
        kept = abs(dy) < 4 and -4 <= dx < 4  # rows of 5 + 3
        want = tap(before, lag, (6, 7)) if kept else torch.zeros(2, dtype=torch.float64)
        assert torch.allclose(tap(layer, lag, (6, 7)), want, rtol=1e-12, atol=0), (dy, dx)


def test_rebuilding_for_the_same_size_changes_nothing() -> None:
    layer = gapped((4, 6))
    weight, norm = layer.weight, layer.kernel_norm.clone()
    layer.set_input_size((4, 6))
    assert layer.weight is weight
    assert torch.equal(layer.kernel_norm, norm)
    with refused("at least 1"):
        layer.set_input_size(0)
    assert layer.input_size == (4, 6)


def test_layer_without_memory_can_be_rebuilt_and_then_filled() -> None:
    layer = gapped((4, 6), device="meta")
    layer.set_input_size((9, 5))
    assert layer.weight.shape == gapped((9, 5)).weight.shape
    layer.to_empty(device="cpu").reset_parameters()
    norms = layer.kernel().norm(dim=-1)
    assert relative_error(norms, torch.ones_like(norms)) <= 1e-6
    assert not layer.bias.any()


def test_state_of_another_size_is_told_though_it_has_another_number_of_scales() -> None:
    layer = gapped((8, 8))
    with pytest.raises(RuntimeError, match="1 scales of 4 taps, the layer 4 of 19: it is of another"):
        layer.load_state_dict(gapped((1, 1)).state_dict())
