"""Every backend against its contract and the definition; the definition against loops, numbers and F.conv1d."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Case,
    case,
    channels_last,
    laid_out,
    refused,
    relative_error,
    run,
    saved_bytes,
    sliced,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sgconvnext import SGConv2d
from sgconvnext.longconv import BACKENDS, Backend, available_backends, choose_backend, dft, fft, long_conv, reference
from sgconvnext.profile.flops import count

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
LENGTHS = [1, 2, 7, 49, 97, 196, 784]
ROUNDED_TWICE = ("dft",)  # in half precision these round x and dy once more before they sum the gradient of the taps
INTERPRETED = ("triton",)  # on a CPU, by an interpreter that takes seconds for a long signal
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


class Subject(NamedTuple):
    """A backend, a dtype that it takes, and the first device on which it takes that."""

    backend: str
    dtype: torch.dtype
    device: str

    def case(self, length: int, causal: bool = False, size: tuple[int, int] | None = None) -> Case:
        inputs = case(length, causal, self.dtype, size)
        return Case(*(t.to(self.device) for t in inputs[:3]), {k: v.to(self.device) for k, v in inputs.truth.items()})

    def takes(self, length: int) -> bool:
        """Whether that takes less than seconds."""
        return length < 784 or not (self.backend in INTERPRETED and self.device == "cpu")

    def __str__(self) -> str:
        return f"{self.backend} {str(self.dtype).removeprefix('torch.')}"


def subjects() -> Iterator[Subject]:
    for backend in BACKENDS:
        for dtype in DTYPES:
            for device in DEVICES:
                if backend in available_backends(torch.zeros(1, 1, 1, dtype=dtype, device=device)):
                    yield Subject(backend, dtype, device)
                    break


SUBJECTS = list(subjects())
FIRST = list({subject.backend: subject for subject in reversed(SUBJECTS)}.values())  # in one dtype each
FAST = [subject for subject in FIRST if BACKENDS[subject.backend].operations]

each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
each_backend = pytest.mark.parametrize("subject", FIRST, ids=str)
each_fast_backend = pytest.mark.parametrize("subject", FAST, ids=str)
each_side = pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])


# The contract


def check_against_definition(inputs: Case, backend: str) -> None:
    """The check that every backend has to pass, and that every broken backend below has to fail."""
    dtype, in_full = inputs.x.dtype, torch.float64 if inputs.x.dtype == torch.float64 else torch.float32
    for name, got in run(*inputs[:3], backend).items():
        in_half = name != "dtaps" or backend in ROUNDED_TWICE
        error = relative_error(got, inputs.truth[name])
        assert error <= TOLERANCE[dtype if in_half else in_full], f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("subject", "length"),
    [(subject, length) for subject in SUBJECTS for length in LENGTHS if subject.takes(length)],
    ids=str,
)
@each_side
def test_backend_matches_definition(subject: Subject, length: int, causal: bool) -> None:
    size = (16, 4) if length == 1 else None  # of a few numbers the interpreter may round all the wrong way
    check_against_definition(subject.case(length, causal, size), subject.backend)


@pytest.mark.parametrize("subject", [subject for subject in FAST if subject.takes(784)], ids=str)
@each_side
def test_backend_matches_definition_at_the_length_of_the_first_stage(subject: Subject, causal: bool) -> None:
    check_against_definition(subject.case(3136, causal), subject.backend)


@pytest.mark.parametrize("layout", [sliced, channels_last])
@each_side
@each_subject
def test_backend_takes_any_layout(subject: Subject, causal: bool, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = laid_out(subject.case(97, causal), layout)
    assert not any(tensor.is_contiguous() for tensor in inputs[:3])
    check_against_definition(inputs, subject.backend)


@each_side
@each_backend
def test_backend_takes_an_expanded_gradient(subject: Subject, causal: bool) -> None:
    x, taps, dy, _ = subject.case(49, causal)
    ones = torch.ones((), dtype=dy.dtype, device=dy.device).expand_as(dy)  # what y.sum().backward() sends
    want = run(x, taps, ones.contiguous(), subject.backend)
    for name, got in run(x, taps, ones, subject.backend).items():
        assert relative_error(got, want[name]) <= 1e-6, name


def test_toeplitz_rounds_alike_for_taps_of_every_layout() -> None:
    x, taps = torch.randn(64, 320, 4, requires_grad=True), torch.randn(320, 7)
    dy = torch.randn(64, 320, 4)
    results = []
    for laid_out_taps in (taps, taps.t().contiguous().t()):
        y = long_conv(x, laid_out_taps, "toeplitz")
        results.append(torch.stack([y, *torch.autograd.grad(y, [x], dy)]))
    assert torch.equal(*results)


@pytest.mark.parametrize("only", ["x", "taps"])
@each_backend
def test_gradient_of_one_input_alone_is_the_same(subject: Subject, only: str) -> None:
    x, taps, dy, _ = subject.case(49)
    inputs = {"x": x.clone(), "taps": taps.clone()}
    inputs[only].requires_grad_()
    (got,) = torch.autograd.grad(long_conv(**inputs, backend=subject.backend), inputs[only], dy)
    assert relative_error(got, run(x, taps, dy, subject.backend)[f"d{only}"]) <= 1e-6


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if BACKENDS[s.backend].operations], ids=str)
@each_side
def test_autograd_saves_x_and_taps_only(subject: Subject, causal: bool) -> None:
    x, taps, _, _ = subject.case(196, causal)
    want = x.nbytes + taps.nbytes
    assert saved_bytes(x, taps, functools.partial(long_conv, backend=subject.backend)) == want
    assert saved_bytes(x, taps, fft.plain_long_conv) > 2 * want  # so the hooks do see what is kept


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_what_prepare_does_and_nothing_else(
    backend: str, x_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    device = next(subject.device for subject in SUBJECTS if subject.backend == backend)
    x, taps, dy = (tensor.to(device) for tensor in case(49, False, x_dtype)[:3])
    with torch.autocast(device, dtype=dtype):
        assert (x.float()[0] @ x.float()[0].mT).dtype == dtype  # autocast is on
        if backend not in available_backends(x):
            pytest.skip(f"{backend} takes no {x_dtype}")
        prepared = BACKENDS[backend].prepare(x)
        dy = dy.to(prepared.dtype)
        got = run(x, taps, dy, backend)  # backward too
    want = run(prepared, taps, dy, backend)
    assert [got[name].dtype for name in ("y", "dx", "dtaps")] == [prepared.dtype, x.dtype, taps.dtype]
    assert prepared.dtype == (x.dtype if x.dtype == torch.float64 or backend not in ("dft", "triton") else dtype)
    assert all(torch.equal(got[name], want[name].to(got[name].dtype)) for name in want)


@pytest.mark.parametrize("taps_dtype", DTYPES, ids=str)
@each_subject
def test_dtypes_of_output_and_gradients_are_those_of_the_inputs(subject: Subject, taps_dtype: torch.dtype) -> None:
    x, taps, dy, truth = subject.case(7)
    got = run(x, taps.to(taps_dtype), dy, subject.backend)
    assert [got[name].dtype for name in ("y", "dx", "dtaps")] == [x.dtype, x.dtype, taps_dtype]
    assert all(relative_error(got[name], truth[name]) <= 1e-2 for name in truth)


@each_backend
def test_no_image_is_no_output(subject: Subject) -> None:
    x, taps, dy, _ = subject.case(5, size=(0, 3))
    got = run(x, taps, dy, subject.backend)
    assert got["y"].shape == got["dx"].shape == x.shape
    assert torch.equal(got["dtaps"], torch.zeros_like(taps))


@each_side
@each_fast_backend
def test_compiles_without_a_graph_break(subject: Subject, causal: bool) -> None:
    torch.compiler.reset()
    function = functools.partial(long_conv, backend=subject.backend)
    compiled = torch.compile(lambda x, taps: 2 * function(x, taps), fullgraph=True, backend="aot_eager")
    x, taps, dy, _ = subject.case(49, causal)
    inputs = [x.clone().requires_grad_(), taps.clone().requires_grad_()]
    y = compiled(*inputs)
    want = run(x, taps, 2 * dy, subject.backend)
    for got, name in zip([y / 2, *torch.autograd.grad(y, inputs, dy)], want, strict=True):
        assert relative_error(got, want[name]) <= 1e-6, name


def test_new_backend_needs_its_registration_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def toy_conv(x: Tensor, taps: Tensor) -> Tensor:
        return 3 * reference.long_conv(x, taps)  # so that one sees who ran

    def refusal(x: Tensor) -> str | None:
        return "backend 'toy' takes no bfloat16" if x.dtype == torch.bfloat16 else None

    flops = lambda batch, channels, length, num_taps: 2 * num_taps  # noqa: E731
    x, taps, _, _ = case(49, False)
    with refused("'toy'", *BACKENDS):
        SGConv2d(2, 7, backend="toy")
    monkeypatch.setitem(BACKENDS, "toy", Backend(flops, plain=toy_conv, refusal=refusal))
    assert "toy" in available_backends(x)
    assert "toy" not in available_backends(x.bfloat16())
    with refused("'toy'", "bfloat16"):
        long_conv(x.bfloat16(), taps, "toy")
    assert torch.equal(long_conv(x, taps, "toy"), 3 * long_conv(x, taps, "reference"))
    layer, same = SGConv2d(2, 7, backend="toy"), SGConv2d(2, 7, backend="reference")
    same.load_state_dict(layer.state_dict())
    images = x.unflatten(2, (7, 7))
    assert torch.equal(layer(images), 3 * same(images))
    assert count(layer, images).total().executed - count(same, images).total().executed == 97 - 3 * 2 * 49**2
    with FlopCounterMode(display=False) as counter:
        long_conv(x, taps, "toy")
    assert counter.get_total_flops() == BACKENDS["reference"].flops(3, 2, 49, 97)  # torch counts what runs


# The check itself


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
    monkeypatch.setitem(BACKENDS, "broken", Backend(BACKENDS["reference"].flops, plain=BROKEN[fault]))
    with pytest.raises(AssertionError, match="relative error"):
        check_against_definition(case(length, causal), "broken")


@each_side
@pytest.mark.parametrize("length", [2, 49, 784])
def test_check_fails_on_a_transform_that_is_one_step_too_short(
    length: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fft, "fft_length", lambda length: 2 * length - 2)
    # two-sided taps do not even fit
    with pytest.raises((AssertionError, RuntimeError), match=r"relative error|negative dimension -1"):
        check_against_definition(case(length, causal), "fft")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_check_fails_on_a_zero_answer_in_every_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = Backend(BACKENDS["reference"].flops, plain=lambda x, taps: 0 * (x + taps.sum().to(x.dtype)))
    monkeypatch.setitem(BACKENDS, "zero", zero)
    with pytest.raises(AssertionError, match=r"y: relative error 1\.0e\+00"):
        check_against_definition(case(49, False, dtype), "zero")


# The definition


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


# What single backends have beside the contract


@functools.cache
def scripted() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.jit.script(fft.plain_long_conv)


@pytest.mark.filterwarnings("ignore:.*torch.jit:Warning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_side
def test_plain_path_can_be_scripted_and_matches_definition(causal: bool, dtype: torch.dtype) -> None:
    for length in (1, 7, 196):
        x, taps, dy, truth = case(length, causal, dtype)
        inputs = [x.clone().requires_grad_(), taps.clone().requires_grad_()]
        y = scripted()(*inputs)
        assert y.dtype == dtype
        for got, name in zip([y, *torch.autograd.grad(y, inputs, dy)], truth, strict=True):
            assert relative_error(got, truth[name]) <= TOLERANCE[dtype], name


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


# Choice and refusal


@pytest.mark.parametrize("length", LENGTHS)
def test_auto_runs_one_of_the_fast_backends(length: int) -> None:
    x, taps, _, _ = case(length, False)
    assert BACKENDS[choose_backend(x)].operations
    assert torch.equal(long_conv(x, taps), long_conv(x, taps, choose_backend(x)))


def test_auto_chooses_by_length_batch_dtype_and_device() -> None:
    def chosen(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
        return choose_backend(torch.empty(shape[0], 4, shape[1], dtype=dtype, device=device))

    assert [chosen(8, length) for length in (1, 36, 37, 3136)] == ["toeplitz", "toeplitz", "fft", "fft"]
    assert [chosen(1, length) for length in (25, 36)] == ["toeplitz", "fft"]
    assert [chosen(8, length, dtype=torch.bfloat16) for length in (49, 50)] == ["toeplitz", "fft"]
    assert chosen(8, 16, device="meta") == "fft"  # nothing is known of it


@pytest.mark.timeout(5)
def test_signal_without_samples_is_refused() -> None:
    with refused("(1, 2, 0)"):
        long_conv(torch.empty(1, 2, 0), torch.empty(2, 0))


def test_unknown_backend_is_refused_with_the_known_ones() -> None:
    x, taps, _, _ = case(7, False)
    with refused("'ftt'", "auto", *BACKENDS):
        long_conv(x, taps, "ftt")


@pytest.mark.parametrize("shape", [(7,), (2, 7), (3, 2, 7, 1)])
def test_signal_of_another_rank_is_refused(shape: tuple[int, ...]) -> None:
    with refused(str(shape), "(B, C, L)"):
        long_conv(torch.zeros(shape), torch.zeros(2, 13))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_signal_that_is_not_floating_point_is_refused(dtype: torch.dtype) -> None:
    with refused(str(dtype), "floating point"):
        long_conv(torch.zeros(3, 2, 7, dtype=dtype), torch.zeros(2, 13))


@pytest.mark.parametrize("shape", [(2, 12), (2, 14), (2, 6), (2, 8), (3, 13), (1, 7), (13,), (1, 2, 13)])
def test_taps_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with refused(str(shape), "(2, 13)", "(2, 7)"):
        long_conv(torch.zeros(3, 2, 7), torch.zeros(shape))
