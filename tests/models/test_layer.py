"""SGConv on signals and SGConv2d on feature maps: against loops, against each other, and at every size."""

import copy
import math
from typing import Any

import pytest
import torch
from helpers import BACKENDS_HERE, GAP, refused, relative_error
from torch import Tensor, nn

from sgconvnext import SGConv, SGConv2d
from sgconvnext.longconv import BACKENDS, reference
from sgconvnext.models import generator
from sgconvnext.models.input_size import resize_taps
from sgconvnext.models.kernel import lag_taps

HALVES = [torch.bfloat16, torch.float16]
scripting = pytest.mark.filterwarnings("ignore:.*torch.jit:Warning")
each_side = pytest.mark.parametrize("bidirectional", [True, False], ids=["two-sided", "causal"])


def by_loops(x: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
    """The equation of the class, in float64: K[lag] = k+[lag], K[-lag] = k-[lag - 1], and D x."""
    kernel, skip = kernel.detach(), skip.detach()
    y = torch.zeros(x.shape, dtype=torch.float64)
    for b, c, t in torch.cartesian_prod(*(torch.arange(size) for size in x.shape)).tolist():
        total = float(skip[c]) * float(x[b, c, t])
        for s in range(x.shape[2]):
            if t >= s:
                total += float(kernel[0, c, t - s]) * float(x[b, c, s])
            elif kernel.shape[0] == 2:
                total += float(kernel[1, c, s - t - 1]) * float(x[b, c, s])
        y[b, c, t] = total
    return y


def definition(layer: SGConv | SGConv2d, x: Tensor) -> Tensor:
    """What the layer must give for a signal that is as long as its kernel or shorter, in float64."""
    taps = lag_taps(layer.kernel()[..., : x.shape[-1]], layer.skip)
    return reference.long_conv(x.double(), taps.double())


@each_side
@pytest.mark.parametrize("length", [1, 4, 9])
def test_layer_matches_its_equation_written_as_loops(length: int, bidirectional: bool) -> None:
    layer = SGConv(2, 9, scale_dim=2, bidirectional=bidirectional)
    x = torch.randn(2, 2, length)
    assert relative_error(layer(x), by_loops(x, layer.kernel(), layer.skip)) <= 2e-6


@pytest.mark.parametrize("options", [{}, {"decay": "position"}, {"alpha": (1, 1 / 3)}, {"init": "cosine"}], ids=str)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS_HERE])
@each_side
def test_layer_matches_the_definition(bidirectional: bool, backend: str, options: dict[str, object]) -> None:
    layer = SGConv(3, 100, bidirectional=bidirectional, backend=backend, **options)
    for length in (100, 64, 17, 1):  # as long as the kernel, and shorter
        x = torch.randn(2, 3, length)
        y = layer(x)
        assert relative_error(y, definition(layer, x)) <= 2e-6
        assert y.dtype == x.dtype


@each_side
def test_gradients_of_the_parameters_match_finite_differences(bidirectional: bool) -> None:
    layer = SGConv(2, 6, scale_dim=2, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)

    def forward(weight: Tensor, skip: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "skip": skip}, (x,))

    assert torch.autograd.gradcheck(forward, (layer.weight, layer.skip, x))


def test_causal_is_bidirectional_without_a_future() -> None:
    causal, both = SGConv(3, 50), SGConv(3, 50, bidirectional=True)
    with torch.no_grad():
        both.weight[0], both.weight[1] = causal.weight[0], 0.0
        both.kernel_norm[0] = causal.kernel_norm[0]
        both.skip.copy_(causal.skip)
    x = torch.randn(2, 3, 50)
    assert relative_error(causal(x), both(x)) <= 2e-6
    with torch.no_grad():
        both.weight[1] = 1.0
    assert relative_error(causal(x), both(x)) >= 0.1


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_causal_output_does_not_depend_on_later_inputs(backend: str) -> None:
    causal, both = SGConv(3, 50, backend=backend), SGConv(3, 50, bidirectional=True, backend=backend)
    x = torch.randn(2, 3, 50)
    other = torch.cat([x[..., :20], torch.randn(2, 3, 30)], dim=-1)
    assert relative_error(causal(x)[..., :20], causal(other)[..., :20]) <= 2e-6
    assert relative_error(causal(x)[..., 20:], causal(other)[..., 20:]) >= 0.1
    assert relative_error(both(x)[..., :20], both(other)[..., :20]) >= 0.1


@each_side
def test_longer_signal_is_refused(bidirectional: bool) -> None:
    layer = SGConv(3, 50, bidirectional=bidirectional)
    with refused("51", "50", "length=51"):
        layer(torch.zeros(2, 3, 51))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("layer_dtype", [torch.float32, torch.float64], ids=str)
def test_step_gives_what_forward_gives_position_by_position(layer_dtype: torch.dtype, dtype: torch.dtype) -> None:
    layer = SGConv(3, 20, scale_dim=3, dtype=layer_dtype)
    x = torch.randn(2, 3, 20, dtype=torch.float64).to(dtype)
    want = layer(x)
    state, steps = None, []
    for t in range(20):
        y, state = layer.step(x[..., t], state)
        assert y.dtype == dtype
        assert torch.equal(state.seen()[0].mT, x[..., : t + 1])
        steps.append(y)
    tolerance = 5e-3 if dtype in HALVES else 1e-13 if dtype == layer_dtype == torch.float64 else 2e-6
    assert relative_error(torch.stack(steps, dim=-1), want) <= tolerance
    with refused("21", "20", "length=21"):
        layer.step(x[..., 0], state)


def test_step_refuses_what_it_cannot_generate() -> None:
    with refused("bidirectional=False"):
        SGConv(3, 20, bidirectional=True).step(torch.zeros(2, 3))
    with refused("(2, 3, 1)", "(B, C)"):
        SGConv(3, 20).step(torch.zeros(2, 3, 1))
    with refused("(2, 4)", "C=3"):
        SGConv(3, 20).step(torch.zeros(2, 4))
    with refused("torch.int64", "float"):
        SGConv(3, 20).step(torch.zeros(2, 3, dtype=torch.int64))


@each_side
@pytest.mark.parametrize("length", [20, 7])
def test_return_kernel_gives_the_taps_that_were_used(length: int, bidirectional: bool) -> None:
    layer = SGConv(3, 20, bidirectional=bidirectional)
    x = torch.randn(2, 3, length)
    y, kernel = layer(x, return_kernel=True)
    assert kernel.shape == (2 if bidirectional else 1, 3, length)
    assert torch.equal(kernel, layer.kernel()[..., :length])
    assert relative_error(y, layer(x)) <= 2e-6
    assert relative_error(y, by_loops(x, kernel, layer.skip)) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float64_signal_is_convolved_in_float64(dtype: torch.dtype) -> None:
    layer = SGConv(3, 50, dtype=dtype)
    x = torch.randn(2, 3, 50, dtype=torch.float64)
    assert layer(x).dtype == torch.float64
    assert relative_error(layer(x), reference.long_conv(x, layer.built_taps())) <= 1e-13
    assert layer.kernel().dtype == dtype


def test_million_tokens_match_the_definition_where_it_is_affordable() -> None:
    length = 2**20
    layer = SGConv(1, length)
    x = torch.randn(1, 1, length)
    y = layer(x)[0, 0]
    taps = lag_taps(layer.kernel(), layer.skip)[0].double()
    at = [0, 1, 12345, length - 1]
    want = torch.stack([taps[: t + 1].flip(0) @ x[0, 0, : t + 1].double() for t in at])
    assert relative_error(y[at], want) <= 2e-6


@pytest.mark.parametrize("shape", [(3, 50), (2, 4, 50), (2, 3, 5, 10), (50,)])
def test_layer_refuses_another_shape(shape: tuple[int, ...]) -> None:
    with refused(str(shape), "(B, C, L)", "C=3"):
        SGConv(3, 50)(torch.zeros(shape))


def test_parameters_have_the_documented_shapes_and_defaults() -> None:
    signals, images = SGConv(6, 1000), SGConv2d(6, (14, 10))
    assert signals.weight.shape == (1, 5, 6, 64)  # causal, d = 64, N = 1 + ceil(log2(1000 / 64))
    assert images.weight.shape == (2, 5, 6, 9)  # bidirectional, N = 5, d = ceil(140 / 16)
    for layer in (signals, images):
        assert [name for name, _ in layer.named_parameters()] == ["weight", "skip"]
        assert set(layer.state_dict()) == {"weight", "skip", "kernel_norm"}
        assert layer.skip.shape == (6,)
        assert layer.kernel_norm.shape == (layer.weight.shape[0], 6, 1)


@pytest.mark.parametrize(
    ("given", "want"), [({"num_scales": 3}, (3, 25)), ({"scale_dim": 10}, (5, 10)), ({"scale_dim": 100}, (1, 100))]
)
def test_scales_and_their_width_follow_from_each_other(given: dict[str, int], want: tuple[int, int]) -> None:
    for layer in (SGConv(2, 100, **given), SGConv2d(2, 10, **given)):
        assert (layer.weight.shape[1], layer.weight.shape[3]) == want


def test_parameters_start_as_standard_normal() -> None:
    layer = SGConv(1000, 64, bidirectional=True)
    for values in (layer.weight[0], layer.weight[1], layer.skip):
        sigma = 1 / math.sqrt(values.numel())  # of the mean, and about that of the standard deviation
        assert abs(float(values.detach().mean())) <= 5 * sigma
        assert abs(float(values.detach().std()) - 1) <= 5 * sigma


def test_cosine_init_gives_every_channel_its_own_frequency() -> None:
    layer = SGConv(8, 256, scale_dim=32, bidirectional=True, init="cosine")
    j = torch.arange(32) / 32
    waves = torch.stack([torch.cos(2 * math.pi * f * j) for f in range(8)])
    frequencies = set()
    for scale in layer.weight.detach().flatten(0, 1):
        distance, frequency = torch.cdist(scale, waves).min(dim=1)
        assert float(distance.max()) <= 1e-4
        assert sorted(frequency.tolist()) == list(range(8))
        frequencies.add(tuple(frequency.tolist()))
    assert len(frequencies) > 1  # drawn anew for each scale and direction


@pytest.mark.parametrize("options", [{}, {"decay": "position"}, {"alpha": (1, 1 / 3)}, {"init": "cosine"}], ids=str)
@pytest.mark.parametrize("length", [1, 2, 16, 100])
@each_side
def test_every_kernel_starts_with_unit_norm(bidirectional: bool, length: int, options: dict[str, object]) -> None:
    layer = SGConv(5, length, scale_dim=min(7, length), bidirectional=bidirectional, **options)
    norms = layer.kernel().norm(dim=-1)
    assert relative_error(norms, torch.ones_like(norms)) <= 1e-6


def test_options_change_the_kernel() -> None:
    kernels = []
    for options in ({}, {"decay": "position"}, {"decay": "position", "exponent": 2.0}, {"alpha": 0.9}):
        torch.manual_seed(1)
        kernels.append(SGConv(3, 50, scale_dim=8, **options).kernel())
    for i in range(len(kernels)):
        for j in range(i):
            assert relative_error(kernels[i], kernels[j]) >= 0.05


@pytest.mark.parametrize("layer", [SGConv(3, 16), SGConv2d(3, 4)], ids=["SGConv", "SGConv2d"])
def test_norm_is_a_constant_from_construction_on(layer: nn.Module) -> None:
    before = layer.state_dict()["kernel_norm"].clone()
    x = torch.randn(2, 3, 16) if isinstance(layer, SGConv) else torch.randn(2, 3, 4, 4)
    layer.train()(x).sum().backward()
    with torch.no_grad():
        layer.weight.mul_(3)
    y = layer(x)
    assert torch.equal(layer.kernel_norm, before)
    assert relative_error(layer.kernel().norm(dim=-1), torch.full(before.shape[:2], 3.0)) <= 1e-6
    other = copy.deepcopy(layer)
    other.reset_parameters()
    assert not torch.equal(other(x), y)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("how", ["constructed", "converted"])
def test_half_precision_parameters_make_float32_taps(how: str, dtype: torch.dtype) -> None:
    exact = SGConv2d(3, 8)
    layer = copy.deepcopy(exact).to(dtype)
    if how == "constructed":
        layer = SGConv2d(3, 8, dtype=dtype)
        layer.load_state_dict(exact.state_dict())
    x = torch.randn(2, 3, 8, 8)
    y = layer(x.to(dtype))
    assert {parameter.dtype for parameter in layer.state_dict().values()} == {dtype}
    assert y.dtype == dtype
    assert layer.kernel().dtype == torch.float32
    assert relative_error(y, exact(x)) <= 1e-2


@pytest.mark.parametrize("backend", [name for name in BACKENDS_HERE if name != "dft"])  # which does as autocast says
def test_layer_is_the_same_under_autocast(backend: str) -> None:
    layer, x = SGConv2d(3, (4, 6), backend=backend), torch.randn(2, 3, 5, 5)
    layer(x).square().sum().backward()
    want, layer.weight.grad = layer.weight.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.square().sum().backward()
    assert torch.equal(y, layer(x))
    assert torch.equal(layer.weight.grad, want)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 0}, ["channels=0", "at least 1"]),
        ({"num_scales": 0}, ["num_scales=0", "at least 1"]),
        ({"scale_dim": -3}, ["scale_dim=-3", "at least 1"]),
        ({"num_scales": 5, "scale_dim": 4}, ["num_scales=5", "scale_dim=4"]),
        ({"alpha": 0.0}, ["alpha", "positive"]),
        ({"alpha": (0.5, -0.5)}, ["alpha", "-0.5", "positive"]),
        ({"alpha": "half"}, ["alpha='half'", "positive"]),
        ({"alpha": "12"}, ["alpha='12'", "positive"]),
        ({"alpha": None}, ["alpha=None", "positive"]),
        ({"exponent": "1"}, ["exponent='1'", "finite"]),
        ({"exponent": float("nan")}, ["exponent=nan", "finite"]),
        ({"decay": "exponential"}, ["decay", "'exponential'", "scale", "position"]),
        ({"init": "zeros"}, ["init", "'zeros'", "normal", "cosine"]),
        ({"backend": "cudnn"}, ["backend", "'cudnn'", "auto", *BACKENDS]),
    ],
    ids=str,
)
def test_impossible_option_is_refused(options: dict[str, object], words: list[str]) -> None:
    with refused(*words):
        SGConv(**{"channels": 4, "length": 16} | options)
    with refused(*words):
        SGConv2d(**{"channels": 4, "input_size": 4} | options)


def test_impossible_size_is_refused() -> None:
    with refused("length=0", "at least 1"):
        SGConv(4, 0)
    with refused("(0, 4)", "at least 1"):
        SGConv2d(4, (0, 4))
    with refused("(4, -1)", "at least 1"):
        SGConv2d(4, (4, -1))
    with refused("dilation=0", "at least 1"):
        SGConv2d(4, 4, dilation=0)


def offsets(num_taps: int, size: tuple[int, int]) -> list[tuple[int, int]]:
    """(dy, dx) of every tap, found by search: lag = dy * W + dx with -W/2 <= dx < W/2."""
    length, width = size[0] * size[1], size[1]
    lags = range(length - num_taps, length)
    near = [dx for dx in range(-width, width) if -width / 2 <= dx < width / 2]
    return [next(((lag - dx) // width, dx) for dx in near if (lag - dx) % width == 0) for lag in lags]


def resized_by_offsets(taps: Tensor, built: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Taps for another size through a dictionary of 2-D offsets."""
    causal = taps.shape[1] == built[0] * built[1]
    trained = {offset: taps[:, i] for i, offset in enumerate(offsets(taps.shape[1], built))}
    length = size[0] * size[1]
    wanted = offsets(length if causal else 2 * length - 1, size)
    return torch.stack([trained.get(offset, torch.zeros(len(taps))) for offset in wanted], dim=1)


SIZES = [(4, 6), (6, 4), (8, 12), (7, 13), (3, 3), (2, 5), (5, 2), (1, 1), (1, 9), (9, 1)]


@each_side
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("built", [(4, 6), (5, 7), (6, 5), (1, 4), (3, 1)], ids=str)
def test_resized_taps_keep_their_2d_offsets(
    built: tuple[int, int], size: tuple[int, int], bidirectional: bool
) -> None:
    length = built[0] * built[1]
    taps = torch.randn(2, 2 * length - 1 if bidirectional else length)
    assert torch.equal(resize_taps(taps, built, size), resized_by_offsets(taps, built, size))


def test_resized_taps_worked_out_by_hand() -> None:
    # built for 2x3: the lags -5 .. 5 are the offsets (-2,1) (-1,-1) (-1,0) (-1,1) (0,-1) (0,0) (0,1) (1,-1) ... (2,-1)
    taps = torch.arange(1.0, 12.0)[None]
    # on 2x4 the lags -7 .. 7 are (-2,1) (-1,-2) (-1,-1) (-1,0) (-1,1) (0,-2) (0,-1) (0,0) (0,1) (1,-2) (1,-1) ...
    want = [[1, 0, 2, 3, 4, 0, 5, 6, 7, 0, 8, 9, 10, 0, 11]]
    assert resize_taps(taps, (2, 3), (2, 4)).tolist() == want


@each_side
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_taps_at_the_built_size_are_the_built_taps(size: tuple[int, int], bidirectional: bool) -> None:
    length = size[0] * size[1]
    taps = torch.randn(2, 2 * length - 1 if bidirectional else length)
    assert torch.equal(resize_taps(taps, size, size), taps)


@each_side
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_map_at_the_built_size_is_a_signal_read_row_by_row(size: tuple[int, int], bidirectional: bool) -> None:
    layer = SGConv2d(3, size, bidirectional=bidirectional)
    flat = SGConv(3, size[0] * size[1], num_scales=5, bidirectional=bidirectional)
    flat.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, *size)
    rows = torch.cat(list(x.unbind(2)), dim=-1)
    assert torch.equal(layer(x), torch.stack(flat(rows).split(size[1], dim=-1), dim=2))


@each_side
@pytest.mark.parametrize("built", [(4, 6), (5, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_map_of_any_size_matches_the_definition(
    size: tuple[int, int], built: tuple[int, int], bidirectional: bool
) -> None:
    layer = SGConv2d(3, built, bidirectional=bidirectional)
    x = torch.randn(2, 3, *size).to(memory_format=torch.channels_last)
    taps = resized_by_offsets(lag_taps(layer.kernel(), layer.skip).detach(), built, size)
    want = reference.long_conv(x.flatten(2).double(), taps.double()).unflatten(2, size)
    y = layer(x)
    assert relative_error(y, want) <= 2e-6
    assert y.dtype == x.dtype


def footprint(layer: SGConv2d, size: tuple[int, int], at: tuple[int, int], reach: int) -> Tensor:
    """What an impulse becomes within ``reach`` pixels of where it was."""
    x = torch.zeros(1, layer.channels, *size)
    x[:, :, at[0], at[1]] = 1
    y = layer(x)[0].detach()
    assert reach <= at[0] < size[0] - reach
    assert reach <= at[1] < size[1] - reach
    return y[:, at[0] - reach : at[0] + reach + 1, at[1] - reach : at[1] + reach + 1]


@each_side
@pytest.mark.parametrize("size", [(12, 11), (9, 20), (6, 5), (5, 30)], ids=str)
def test_impulse_has_the_same_2d_footprint_at_any_size(size: tuple[int, int], bidirectional: bool) -> None:
    layer = SGConv2d(3, 8, bidirectional=bidirectional)
    want = footprint(layer, (8, 8), (4, 4), reach=2)
    assert relative_error(footprint(layer, size, (2, 2), reach=2), want) <= 2e-6
    assert relative_error(footprint(layer, size, (size[0] - 3, size[1] - 3), reach=2), want) <= 2e-6


@each_side
@pytest.mark.parametrize("dilation", [2, 3])
@pytest.mark.parametrize("size", [(6, 6), (12, 12), (7, 10), (1, 5), (2, 1)], ids=str)
def test_dilated_layer_convolves_every_subsampled_map(
    size: tuple[int, int], dilation: int, bidirectional: bool
) -> None:
    layer = SGConv2d(3, (4, 6), bidirectional=bidirectional)
    dilated = SGConv2d(3, (4, 6), bidirectional=bidirectional, dilation=dilation)
    dilated.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, *size)
    # zeros up to a multiple of the dilation, so that all subsampled maps have one size
    filled = torch.zeros(2, 3, *(-(-side // dilation) * dilation for side in size))
    filled[:, :, : size[0], : size[1]] = x
    want = torch.zeros_like(filled)
    for row in range(dilation):
        for column in range(dilation):
            want[:, :, row::dilation, column::dilation] = layer(filled[:, :, row::dilation, column::dilation])
    assert relative_error(dilated(x), want[:, :, : size[0], : size[1]]) <= 2e-6


def test_dilation_spreads_the_footprint() -> None:
    layer = SGConv2d(3, 6)
    dilated = SGConv2d(3, 6, dilation=2)
    dilated.load_state_dict(layer.state_dict())
    spread = footprint(dilated, (12, 12), (6, 6), reach=4)
    want = torch.zeros_like(spread)
    want[:, ::2, ::2] = footprint(layer, (6, 6), (3, 3), reach=2)
    assert relative_error(spread, want) <= 2e-6


@each_side
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (3, 7), (1, 1), (4, 6)], ids=str)
def test_set_input_size_keeps_norms_dtype_and_trainability(
    size: tuple[int, int], dtype: torch.dtype, bidirectional: bool
) -> None:
    layer = SGConv2d(3, (4, 6), bidirectional=bidirectional).to(dtype)
    with torch.no_grad():  # as after training: the norms of the kernels are no longer 1
        layer.weight.mul_(torch.tensor([0.5, 1.0, 3.0], dtype=dtype)[:, None])
    layer.weight.requires_grad_(False)
    before = layer.kernel().norm(dim=-1)
    assert float(before.max() / before.min()) > 4

    layer.set_input_size(size)
    assert (layer.input_size, layer.length) == (size, size[0] * size[1])
    assert layer.weight.shape == (len(before), 5, 3, math.ceil(layer.length / 16))
    tolerance = 1e-2 if dtype in HALVES else 1e-6
    assert relative_error(layer.kernel().norm(dim=-1), before) <= tolerance
    assert {value.dtype for value in layer.state_dict().values()} == {dtype}
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    assert "kernel_norm" in dict(layer.named_buffers())

    layer.set_input_size((4, 4))
    layer.weight.requires_grad_()
    layer.set_input_size(size)
    assert layer.weight.requires_grad


@each_side
def test_set_input_size_gives_every_offset_a_tap(bidirectional: bool) -> None:
    layer = SGConv2d(3, (4, 6), bidirectional=bidirectional)
    taps = resize_taps(lag_taps(layer.kernel(), layer.skip), (4, 6), (9, 7))
    assert (taps == 0).any()
    layer.set_input_size((9, 7))
    taps = lag_taps(layer.kernel(), layer.skip)
    assert taps.shape == (3, 125 if bidirectional else 63)
    assert (taps != 0).all()
    x = torch.randn(2, 3, 9, 7)
    assert relative_error(layer(x).flatten(2), definition(layer, x.flatten(2))) <= 2e-6
    layer(x).square().sum().backward()
    assert (layer.weight.grad[:, :-1] != 0).all()  # the last scale is cut and may keep parameters that reach no tap


def test_set_input_size_stretches_each_scale() -> None:
    layer = SGConv2d(2, 4, num_scales=4)  # d = 2, and 8 on an 8x8 map
    first, last = layer.weight.detach().unbind(-1)
    layer.set_input_size(8)
    share_of_last = torch.tensor([0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1])
    want = torch.lerp(first[..., None], last[..., None], share_of_last)
    assert relative_error(layer.weight, want) <= 1e-6


def test_set_input_size_keeps_a_zero_kernel_zero() -> None:
    layer = SGConv2d(3, (4, 6))
    with torch.no_grad():
        layer.weight[1] = 0  # only the past
    layer.set_input_size((5, 6))
    assert torch.equal(layer.kernel()[1], torch.zeros(3, 30))
    assert relative_error(layer.kernel()[0].norm(dim=-1), torch.ones(3)) <= 1e-6


def test_set_input_size_to_the_same_size_changes_nothing() -> None:
    layer, x = SGConv2d(3, (4, 6)), torch.randn(2, 3, 4, 6)
    want, weight = layer(x), layer.weight
    layer.set_input_size((4, 6))
    assert torch.equal(layer(x), want)
    assert layer.weight is weight


@pytest.mark.parametrize("size", [(0, 4), (4, -1), 0])
def test_set_input_size_refuses_an_impossible_size_and_leaves_the_layer_alone(size: tuple[int, int] | int) -> None:
    layer, x = SGConv2d(3, (4, 6)), torch.randn(2, 3, 4, 6)
    want = layer(x)
    with refused("at least 1"):
        layer.set_input_size(size)
    assert layer.input_size == (4, 6)
    assert torch.equal(layer(x), want)


@scripting
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": False}, {"decay": "position"}, {"alpha": (1, 1 / 3)}, {"dilation": 2}, GAP],
    ids=str,
)
def test_scripted_layer_equals_eager_at_any_size(options: dict[str, object]) -> None:
    layer = SGConv2d(3, (4, 6), **options)
    scripted = torch.jit.script(layer)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        assert relative_error(scripted(x), layer(x)) <= 2e-6


@scripting
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": False}, {"decay": "position"}, {"dilation": 2}, GAP], ids=str
)
def test_traced_layer_equals_eager(options: dict[str, object]) -> None:
    """Tracing makes tensors of sizes, which `+=` and `*=` change in place."""
    layer, x = SGConv2d(3, (16, 16), **options), torch.randn(2, 3, 16, 16)
    traced = torch.jit.trace(layer, torch.randn(2, 3, 16, 16), check_trace=False)
    assert relative_error(traced(x), layer(x)) <= 2e-6


@pytest.mark.parametrize("options", [{}, GAP], ids=str)
@pytest.mark.parametrize("size", [(4, 6), (5, 3)], ids=str)
def test_layer_compiles_without_a_graph_break(size: tuple[int, int], options: dict[str, Any]) -> None:
    torch.compiler.reset()
    layer, x = SGConv2d(3, (4, 6), **options), torch.randn(2, 3, *size)
    (want,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    (got,) = torch.autograd.grad(y.square().sum(), layer.weight)
    assert relative_error(y, layer(x)) <= 1e-6
    assert relative_error(got, want) <= 1e-6


@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 4, 4, 6), (2, 3, 24), (1, 2, 3, 4, 6)])
def test_map_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with refused(str(shape), "(B, C, H, W)", "C=3"):
        SGConv2d(3, (4, 6))(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_input_that_is_not_floating_point_is_refused(dtype: torch.dtype) -> None:
    with refused(str(dtype), "x.float()"):
        SGConv2d(3, (4, 6))(torch.zeros(2, 3, 4, 6, dtype=dtype))
    with refused(str(dtype), "x.float()"):
        SGConv(3, 24)(torch.zeros(2, 3, 24, dtype=dtype))


@pytest.mark.parametrize("length", [50, 37])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "alpha": (1, 1 / 3)}, {"decay": "position"}], ids=str)
def test_chunks_of_channels_equal_all_at_once(
    options: dict[str, object], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    whole = SGConv(7, 50, scale_dim=4, **options)
    x, dy = torch.randn(2, 7, length, requires_grad=True), torch.randn(2, 7, length)
    inputs = [x, *whole.parameters()]
    y = whole(x)
    want = torch.autograd.grad(y, inputs, dy)
    monkeypatch.setattr(generator, "TAPS_BYTES", 1)
    monkeypatch.setattr(generator, "CHUNK_BYTES", 2 * 4 * 50)  # two channels, and one is left over
    torch.manual_seed(0)
    cut = SGConv(7, 50, scale_dim=4, **options)
    assert relative_error(cut.kernel_norm, whole.kernel_norm) <= 1e-6
    assert relative_error(cut(x), y) <= 1e-6
    assert relative_error(cut.eval()(x.detach()), y) <= 1e-6
    for got, wanted in zip(torch.autograd.grad(cut(x), [x, *cut.parameters()], dy), want, strict=True):
        assert relative_error(got, wanted) <= 1e-5
