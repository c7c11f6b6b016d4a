"""Every backend against the float64 definition, and the definition against loops, literal numbers and F.conv1d."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS_HERE,
    Case,
    case,
    channels_last,
    contiguous,
    laid_out,
    refused,
    relative_error,
    run,
    saved_bytes,
    sliced,
)
from torch import Tensor

from sgconvnext.longconv import BACKENDS, choose_backend, dft, fft, long_conv, reference

LENGTHS = [1, 2, 7, 16, 49, 97, 196, 784, 3136]
FAST = [name for name in BACKENDS_HERE if name != "reference"]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 5e-3}

each_backend = pytest.mark.parametrize("backend", BACKENDS_HERE)
each_fast_backend = pytest.mark.parametrize("backend", FAST)
each_length = pytest.mark.parametrize("length", LENGTHS)
each_side = pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])


def check_against_definition(inputs: Case, backend: str) -> None:
    """The check that every backend has to pass, and that every broken backend below has to fail."""
    x, taps, dy, truth = inputs
    x, taps = x.detach().requires_grad_(), taps.detach().requires_grad_()
    y = long_conv(x, taps, backend)
    check_close("y", y, truth, x.dtype)
    dx, dtaps = torch.autograd.grad(y, [x, taps], dy)
    check_close("dx", dx, truth, x.dtype)
    check_close("dtaps", dtaps, truth, x.dtype)


def check_close(name: str, got: Tensor, truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    error = relative_error(got, truth[name])
    assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("layout", [contiguous, sliced, channels_last])
@each_side
@each_length
@each_backend
def test_backend_matches_definition(
    backend: str, length: int, causal: bool, layout: Callable[[Tensor], Tensor]
) -> None:
    check_against_definition(laid_out(case(length, causal), layout), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_side
@each_length
@each_fast_backend
def test_backend_matches_definition_in_half_precision(
    backend: str, length: int, causal: bool, dtype: torch.dtype
) -> None:
    check_against_definition(case(length, causal, dtype), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_side
@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS_HERE if name != "dft"]
)  # which rounds x and dy transformed
def test_gradient_of_the_taps_is_summed_in_float32(backend: str, causal: bool, dtype: torch.dtype) -> None:
    inputs = case(784, causal, dtype)
    x, taps = inputs.x.clone(), inputs.taps.clone().requires_grad_()
    (dtaps,) = torch.autograd.grad(long_conv(x, taps, backend), taps, inputs.dy)
    assert relative_error(dtaps, inputs.truth["dtaps"]) <= 2e-6


@pytest.mark.parametrize("layout", [sliced, channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@each_side
@pytest.mark.parametrize("length", [2, 97])
@each_backend
def test_backend_matches_definition_in_any_dtype_and_layout(
    backend: str, length: int, causal: bool, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    inputs = laid_out(case(length, causal, dtype), layout)
    assert not any(tensor.is_contiguous() for tensor in inputs[:3])
    check_against_definition(inputs, backend)


@each_side
@each_backend
def test_backend_takes_an_expanded_gradient(backend: str, causal: bool) -> None:
    x, taps, dy, _ = case(49, causal)
    ones = torch.ones(()).expand_as(dy)  # what y.sum().backward() sends, stride 0 everywhere
    want = run(x, taps, ones.contiguous(), backend)
    got = run(x, taps, ones, backend)
    assert relative_error(got["dx"], want["dx"]) <= 1e-6
    assert relative_error(got["dtaps"], want["dtaps"]) <= 1e-6


BROKEN = {
    "a zero answer": lambda x, taps: 0 * (x + taps.sum()),
    "no gradient of x": lambda x, taps: reference.long_conv(x.detach(), taps) + 0 * x,
    "no gradient of taps": lambda x, taps: reference.long_conv(x, taps.detach()) + 0 * taps.sum(),
    "taps one lag late": lambda x, taps: reference.long_conv(x, taps.roll(1, -1)),
    "taps reversed in time": lambda x, taps: reference.long_conv(x, taps.flip(-1)),
    "products in bfloat16": lambda x, taps: reference.long_conv(x.bfloat16(), taps).to(x.dtype),
}


@pytest.mark.parametrize("fault", BROKEN)
@each_side
@pytest.mark.parametrize("length", [2, 49, 784])
def test_check_fails_on_a_broken_backend(
    length: int, causal: bool, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "broken", BROKEN[fault])
    with pytest.raises(AssertionError, match="relative error"):
        check_against_definition(case(length, causal), "broken")


@each_side
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_check_fails_on_a_transform_that_is_one_step_too_short(
    length: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fft, "fft_length", lambda length: 2 * length - 2)
    # two-sided taps do not even fit
    with pytest.raises((AssertionError, RuntimeError), match=r"relative error|negative dimension -1"):
        check_against_definition(case(length, causal), "fft")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_check_fails_on_a_zero_answer_in_every_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "zero", lambda x, taps: 0 * (x + taps.sum().to(x.dtype)))
    with pytest.raises(AssertionError, match=r"y: relative error 1\.0e\+00"):
        check_against_definition(case(49, False, dtype), "zero")


@pytest.mark.parametrize(
    ("taps", "want"),
    [
        ([5.0, 7, 11, 13, 17], [11 * 1 + 7 * 2 + 5 * 3, 13 * 1 + 11 * 2 + 7 * 3, 17 * 1 + 13 * 2 + 11 * 3]),
        ([11.0, 13, 17], [11 * 1, 13 * 1 + 11 * 2, 17 * 1 + 13 * 2 + 11 * 3]),
    ],
    ids=["two-sided", "causal"],
)
def test_definition_matches_literal_numbers(taps: list[float], want: list[float]) -> None:
    y = reference.long_conv(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([taps]))
    assert y.tolist() == [[want]]


@each_side
@pytest.mark.parametrize("length", [1, 2, 5])
def test_definition_matches_its_equation_written_as_loops(length: int, causal: bool) -> None:
    x, taps, _, truth = case(length, causal)
    want = torch.zeros(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            by_lag = dict(zip(range(0 if causal else 1 - length, length), taps[c].tolist(), strict=True))
            for t in range(length):
                want[b, c, t] = sum(by_lag.get(t - s, 0.0) * float(x[b, c, s]) for s in range(length))
    assert relative_error(truth["y"], want) <= 1e-14


@each_side
@pytest.mark.parametrize("length", [1, 2, 49, 196])
def test_definition_matches_conv1d(length: int, causal: bool) -> None:
    x, taps, dy, truth = case(length, causal)
    inputs = [x.double().requires_grad_(), taps.double().requires_grad_()]
    padded = F.pad(inputs[0], (length - 1, 0 if causal else length - 1))
    y = F.conv1d(padded, inputs[1].flip(-1)[:, None], groups=x.shape[1])
    dx, dtaps = torch.autograd.grad(y, inputs, dy.double())
    assert relative_error(truth["y"], y) <= 1e-13
    assert relative_error(truth["dx"], dx) <= 1e-13
    assert relative_error(truth["dtaps"], dtaps) <= 1e-13


@each_side
@pytest.mark.parametrize("length", [1, 5])
@each_backend
def test_gradients_match_finite_differences(backend: str, length: int, causal: bool) -> None:
    x, taps, _, _ = case(length, causal, torch.float64)
    inputs = (x.clone().requires_grad_(), taps.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, taps: long_conv(x, taps, backend), inputs)


@pytest.mark.parametrize("only", ["x", "taps"])
@each_backend
def test_gradient_of_one_input_alone_is_the_same(backend: str, only: str) -> None:
    x, taps, dy, truth = case(49, False)
    inputs = {"x": x.detach().clone(), "taps": taps.detach().clone()}
    inputs[only].requires_grad_()
    (got,) = torch.autograd.grad(long_conv(**inputs, backend=backend), inputs[only], dy)
    assert relative_error(got, truth[f"d{only}"]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_side
@each_fast_backend
def test_autograd_saves_x_and_taps_only(backend: str, causal: bool, dtype: torch.dtype) -> None:
    x, taps, _, _ = case(196, causal, dtype)
    want = x.nbytes + taps.nbytes
    assert saved_bytes(x, taps, BACKENDS[backend]) == want
    assert saved_bytes(x, taps, fft.plain_long_conv) > 2 * want  # so the hooks do see what is kept


@each_side
@pytest.mark.parametrize("backend", [name for name in BACKENDS_HERE if name != "dft"])
def test_result_is_the_same_under_autocast(backend: str, causal: bool) -> None:
    x, taps, dy, _ = case(49, causal)
    want = run(x, taps, dy, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x[0] @ x[0].mT).dtype == torch.bfloat16  # autocast is on
        got = run(x, taps, dy, backend)  # backward too
    for name in want:
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], want[name]), name


@each_side
def test_matrix_products_cast_under_autocast_as_convolutions_do(causal: bool) -> None:
    x, taps, dy, _ = case(49, causal)
    want = run(x.bfloat16(), taps, dy.bfloat16(), "dft")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(x, taps, dy.bfloat16(), "dft")
        assert run(x.double(), taps, dy.double(), "dft")["y"].dtype == torch.float64
    assert [got[name].dtype for name in ("y", "dx", "dtaps")] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(got[name], want[name].to(got[name].dtype)) for name in want)
    assert long_conv(x.to("meta"), taps.to("meta"), "dft").shape == x.shape  # a device without autocast


@pytest.mark.parametrize("taps_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_backend
def test_dtypes_of_output_and_gradients_are_those_of_the_inputs(
    backend: str, dtype: torch.dtype, taps_dtype: torch.dtype
) -> None:
    x, taps, dy, truth = case(7, False, torch.bfloat16)
    got = run(x.to(dtype), taps.to(taps_dtype), dy.to(dtype), backend)
    assert (got["y"].dtype, got["dx"].dtype, got["dtaps"].dtype) == (dtype, dtype, taps_dtype)
    assert all(relative_error(got[name], truth[name]) <= 1e-2 for name in truth)


@each_side
@pytest.mark.parametrize("backend", ["auto", *FAST])
def test_compiles_without_a_graph_break(backend: str, causal: bool) -> None:
    torch.compiler.reset()
    x, taps, dy, truth = case(49, causal)
    compiled = torch.compile(lambda x, taps: long_conv(x, taps, backend), fullgraph=True, backend="aot_eager")
    inputs = [x.clone().requires_grad_(), taps.clone().requires_grad_()]
    y = compiled(*inputs)
    dx, dtaps = torch.autograd.grad(y, inputs, dy)
    assert relative_error(y, truth["y"]) <= 2e-6
    assert relative_error(dx, truth["dx"]) <= 2e-6
    assert relative_error(dtaps, truth["dtaps"]) <= 2e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit:Warning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_side
def test_plain_path_can_be_scripted_and_matches_definition(causal: bool, dtype: torch.dtype) -> None:
    scripted = torch.jit.script(fft.plain_long_conv)
    for length in (1, 7, 196):
        x, taps, dy, truth = case(length, causal, dtype)
        inputs = [x.clone().requires_grad_(), taps.clone().requires_grad_()]
        y = scripted(*inputs)
        dx, dtaps = torch.autograd.grad(y, inputs, dy)
        assert y.dtype == dtype
        assert relative_error(y, truth["y"]) <= TOLERANCE[dtype]
        assert relative_error(dx, truth["dx"]) <= TOLERANCE[dtype]
        assert relative_error(dtaps, truth["dtaps"]) <= TOLERANCE[dtype]


@each_side
@each_length
def test_auto_runs_one_of_the_fast_backends(length: int, causal: bool) -> None:
    x, taps, _, _ = case(length, causal)
    assert choose_backend(x) in FAST
    assert torch.equal(long_conv(x, taps), long_conv(x, taps, choose_backend(x)))


def test_auto_chooses_by_length_batch_dtype_and_device() -> None:
    def chosen(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
        return choose_backend(torch.empty(shape[0], 4, shape[1], dtype=dtype, device=device))

    assert [chosen(8, length) for length in (1, 36, 37, 3136)] == ["toeplitz", "toeplitz", "fft", "fft"]
    assert [chosen(1, length) for length in (25, 36)] == ["toeplitz", "fft"]
    assert [chosen(8, length, dtype=torch.bfloat16) for length in (49, 50)] == ["toeplitz", "fft"]
    assert chosen(8, 16, device="meta") == "fft"  # nothing is known of it


@pytest.mark.timeout(5)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS_HERE])
def test_signal_without_samples_is_refused(backend: str) -> None:
    with refused("(1, 2, 0)"):
        long_conv(torch.empty(1, 2, 0), torch.empty(2, 0), backend)


def test_unknown_backend_is_refused_with_the_known_ones() -> None:
    x, taps, _, _ = case(7, False)
    with refused("'ftt'", "auto", *BACKENDS):
        long_conv(x, taps, "ftt")


@pytest.mark.parametrize("shape", [(7,), (2, 7), (3, 2, 7, 1)])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS_HERE])
def test_signal_of_another_rank_is_refused(backend: str, shape: tuple[int, ...]) -> None:
    with refused(str(shape), "(B, C, L)"):
        long_conv(torch.zeros(shape), torch.zeros(2, 13), backend)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS_HERE])
def test_signal_that_is_not_floating_point_is_refused(backend: str, dtype: torch.dtype) -> None:
    with refused(str(dtype), "floating point"):
        long_conv(torch.zeros(3, 2, 7, dtype=dtype), torch.zeros(2, 13), backend)


@pytest.mark.parametrize("shape", [(2, 12), (2, 14), (2, 6), (2, 8), (3, 13), (1, 7), (13,), (1, 2, 13)])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS_HERE])
def test_taps_of_another_shape_are_refused(backend: str, shape: tuple[int, ...]) -> None:
    with refused(str(shape), "(2, 13)", "(2, 7)"):
        long_conv(torch.zeros(3, 2, 7), torch.zeros(shape), backend)


@pytest.mark.parametrize(("length", "want"), [(3136, 6400), (784, 1600), (196, 400), (49, 128), (2, 16), (1, 16)])
def test_transform_length_of_known_signals(length: int, want: int) -> None:
    assert fft.fft_length(length) == want


def test_transform_length_is_the_shortest_smooth_multiple_of_16_that_fits() -> None:
    limit = 5000
    smooth = sorted(2**a * 3**b * 5**c for a in range(4, 14) for b in range(8) for c in range(6))
    for length in range(1, limit // 2):
        assert fft.fft_length(length) == next(n for n in smooth if n >= 2 * length - 1), length


@pytest.mark.parametrize(
    ("length", "want"), [(3136, (56, 56)), (784, (20, 40)), (196, (28, 8)), (49, (8, 8)), (16, (1, 16)), (1, (1, 8))]
)
def test_blocks_of_known_signals(length: int, want: tuple[int, int]) -> None:
    assert dft.block_shape(length) == want


def test_blocks_are_the_cheapest_that_the_signal_fits_in() -> None:
    for length in [*range(1, 300), 784, 1000, 3136, 3137, 9216]:
        blocks = [1, *range(4, length + 4, 4)]
        shapes = [(n, 8 * -(-length // (8 * n))) for n in blocks]
        cheapest = min(n * b * (n + b) for n, b in shapes)
        n, b = dft.block_shape(length)
        assert (n, b) in shapes, length
        assert n * b * (n + b) == cheapest, length


@pytest.mark.parametrize("n", [1, 4, 56])
def test_transform_of_blocks_is_an_isometry_that_loses_nothing(n: int) -> None:
    transform = dft._isometry(dft._waves(n, torch.float64, torch.device("cpu")))
    assert transform.shape == (2 * n, n)
    assert relative_error(transform.mT @ transform, torch.eye(n, dtype=torch.float64)) <= 1e-14


@each_side
def test_half_precision_does_not_overflow_between_the_products(causal: bool) -> None:
    """A mean of 100 over 3136 samples, summed by a transform that is not an isometry, leaves float16's range."""
    _, taps, dy, _ = case(3136, causal, torch.float16)
    x, taps = torch.full_like(dy, 100.0), taps / 1000
    got = run(x, taps, dy, "dft")
    want = run(x.double(), taps.double(), dy.double(), "fft")
    assert all(relative_error(got[name], want[name]) <= TOLERANCE[torch.float16] for name in want)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_no_image_is_no_output(backend: str) -> None:
    x, taps = torch.randn(0, 3, 5, requires_grad=True), torch.randn(3, 9, requires_grad=True)
    y = long_conv(x, taps, backend)
    assert y.shape == (0, 3, 5)
    dx, dtaps = torch.autograd.grad(y.sum(), [x, taps])
    assert dx.shape == x.shape
    assert torch.equal(dtaps, torch.zeros(3, 9))
