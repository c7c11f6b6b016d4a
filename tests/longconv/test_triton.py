"""What "triton" has beside the contract of a backend: on a GPU if there is one, else in Triton's interpreter.

Memory that nothing is written to is NaN here. test_longconv.py checks the contract.
"""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    Case,
    case,
    mixers,
    refused,
    relative_error,
    run,
    small_model,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sgconvnext import SGConv2d
from sgconvnext.longconv import available_backends, choice, choose_backend, long_conv
from sgconvnext.longconv.triton import tiles, toeplitz
from sgconvnext.profile.flops import CONVOLUTION, count

pytest.importorskip("triton")
from sgconvnext.longconv.triton import programs as triton_programs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.bfloat16, torch.float16]

each_side = pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nothing is written to is NaN, and an operator that adds in no fixed order is an error."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def here(length: int, causal: bool, dtype: torch.dtype, size: tuple[int, int] | None = None) -> Case:
    inputs = case(length, causal, dtype, size)
    return Case(*(tensor.to(DEVICE) for tensor in inputs[:3]), {k: v.to(DEVICE) for k, v in inputs.truth.items()})


# The result


def check(inputs: Case) -> None:
    """Taps and results are rounded to half precision, but the gradient of the taps is not."""
    bound = {torch.bfloat16: 5e-3, torch.float16: 1e-3}[inputs.x.dtype]
    for name, got in run(*inputs[:3], "triton").items():
        error = relative_error(got, inputs.truth[name])
        assert error <= (2e-6 if name == "dtaps" else bound), f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("length", "size"),
    [
        (1, (1, 2)),
        (16, (130, 1)),
        (50, (5, 3)),
        (196, (33, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "causal"), [(torch.bfloat16, False), (torch.float16, True)], ids=str)
def test_backend_matches_definition(length: int, size: tuple[int, int], causal: bool, dtype: torch.dtype) -> None:
    check(here(length, causal, dtype, size))


@each_side
@each_half
def test_only_roundings_to_half_precision_separate_it_from_the_definition(dtype: torch.dtype, causal: bool) -> None:
    """With taps that half precision holds, all that is left is the rounding of y and dx, by half a unit each.

    The interpreter cuts bfloat16 off, by up to a unit.
    """
    x, taps, dy, _ = here(196, causal, dtype)
    taps = taps.to(dtype).float()
    got = run(x, taps, dy, "triton")
    exact = run(x.double(), taps.double(), dy.double(), "reference")
    unit = torch.finfo(dtype).eps if (DEVICE, dtype) == ("cpu", torch.bfloat16) else torch.finfo(dtype).eps / 2
    for name in ("y", "dx"):
        error = (got[name].double() - exact[name]).abs()
        assert (error <= unit * exact[name].abs() + 1e-5).all(), name
        assert error.max() > 0
    assert relative_error(got["dtaps"], exact["dtaps"]) <= 1e-6


def drop_a_program(launch: Callable[..., None]) -> Callable[..., None]:
    return lambda program, programs, *rest: launch(program, programs - 1, *rest)


def one_lag_late(copies: Callable[..., Any]) -> Callable[..., Any]:
    return lambda taps, *rest: copies(taps.roll(1, -1), *rest)


BROKEN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a program is missing": ("_launch", drop_a_program),
    "nothing runs": ("_launch", lambda launch: lambda *_: None),
    "taps one lag late": ("_shifted_copies", one_lag_late),
    "zero answers": ("convolve", lambda convolve: lambda x, *_: torch.zeros_like(x)),
    "dtaps summed in half precision": ("correlate", lambda correlate: lambda *a: correlate(*a).half().float()),
    "dtaps reversed in time": ("correlate", lambda correlate: lambda *a: correlate(*a).flip(-1)),
}


@pytest.mark.parametrize("fault", BROKEN)
@each_side
def test_check_fails_on_broken_programs(causal: bool, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, broken = BROKEN[fault]
    check(here(100, causal, torch.float16))
    monkeypatch.setattr(triton_programs, name, broken(getattr(triton_programs, name)))
    with pytest.raises(AssertionError, match="relative error"):
        check(here(100, causal, torch.float16))


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
def test_interpreter_would_multiply_the_bits_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_programs, "_UPCAST", False)
    with pytest.raises(AssertionError, match="relative error"):
        check(here(49, False, torch.bfloat16))


def test_two_runs_are_bit_identical() -> None:
    inputs = here(196, False, torch.bfloat16, (40, 2))
    first, second = (run(*inputs[:3], "triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("only", ["x", "taps"])
def test_gradient_of_one_input_alone_launches_one_program(only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, taps, dy, _ = here(49, False, torch.float16)
    want = run(x, taps, dy, "triton")[f"d{only}"]
    launched, launch = [], triton_programs._launch
    monkeypatch.setattr(triton_programs, "_launch", lambda *a: (launched.append(a[0]), launch(*a)))
    inputs = {"x": x.clone(), "taps": taps.clone()}
    inputs[only].requires_grad_()
    (got,) = torch.autograd.grad(long_conv(**inputs, backend="triton"), inputs[only], dy)
    assert torch.equal(got, want)
    backward = triton_programs._convolve if only == "x" else triton_programs._correlate
    assert launched == [triton_programs._convolve, backward]


# The operators


OPERATORS = {
    "conv": lambda x, taps: (torch.ops.sgconvnext.toeplitz_conv, (x, taps)),
    "dx": lambda x, taps: (torch.ops.sgconvnext.toeplitz_conv_dx, (x, taps)),
    "dtaps": lambda x, taps: (
        torch.ops.sgconvnext.toeplitz_conv_dtaps,
        (x, x + 1, taps.shape[1]),
    ),
}


@pytest.mark.parametrize("operator", OPERATORS)
@each_side
def test_operators_pass_torchs_own_checks(causal: bool, operator: str) -> None:
    x, taps, _, _ = here(20, causal, torch.bfloat16)
    function, arguments = OPERATORS[operator](x, taps)
    torch.library.opcheck(function.default, arguments)


@pytest.mark.end_to_end
def test_layer_compiles_without_a_graph_break_under_autocast() -> None:
    torch.compiler.reset()
    layer = SGConv2d(3, (4, 6), backend="triton", device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch, size in ((2, (4, 6)), (3, (5, 5))):  # the second time with symbolic sizes
        x = torch.randn(batch, 3, *size, device=DEVICE)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(compiled(x), layer(x))


@each_half
@each_side
def test_second_derivatives_are_close_to_the_definitions(causal: bool, dtype: torch.dtype) -> None:
    def product(x: Tensor, taps: Tensor, backend: str) -> list[Tensor]:
        x, taps = x.clone().requires_grad_(), taps.clone().requires_grad_()
        y = long_conv(x, taps / 20, backend)
        first = torch.autograd.grad(y.double().pow(3).sum(), [x, taps], create_graph=True)
        return list(torch.autograd.grad(sum(t.double().square().sum() for t in first), [x, taps]))

    x, taps, _, _ = here(20, causal, dtype)
    want = product(x.double(), taps.double(), "reference")
    for got, exact in zip(product(x, taps, "triton"), want, strict=True):
        assert exact.norm() > 0
        assert relative_error(got, exact) <= 3e-2


def test_transforms_of_torch_func_are_close_to_the_definitions() -> None:
    x, taps, _, _ = here(20, False, torch.float16)

    def mapped(x: Tensor, taps: Tensor, backend: str) -> tuple[Tensor, ...]:
        def loss(x: Tensor, taps: Tensor) -> Tensor:
            return long_conv(x, taps, backend).double().square().sum()

        per_sample = torch.vmap(torch.func.grad(loss, (0, 1)), (0, None))(x[:, None], taps)
        return (*per_sample, torch.func.jvp(loss, (x, taps), (x, taps))[1])

    want = mapped(x.double(), taps.double(), "reference")
    for got, exact in zip(mapped(x, taps, "triton"), want, strict=True):
        assert relative_error(got, exact) <= 1e-2


# Dtypes, autocast, devices


def test_layer_trains_under_autocast() -> None:
    layer, x = SGConv2d(3, (4, 6), device=DEVICE), torch.randn(5, 3, 5, 5, device=DEVICE)
    gradients = []
    for backend in ("reference", "triton"):
        layer.backend, layer.weight.grad = backend, None
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            layer(x).float().square().sum().backward()
        gradients.append(layer.weight.grad)
    assert relative_error(gradients[1], gradients[0]) <= 1e-2
    assert relative_error(gradients[1], gradients[0]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_precision_is_refused(dtype: torch.dtype) -> None:
    x, taps, _, _ = here(7, False, dtype)
    with refused("'triton'", str(dtype), "bfloat16", "autocast", "backend='fft'"):
        long_conv(x, taps, "triton")


def test_float64_is_refused_even_under_autocast_which_leaves_it_alone() -> None:
    x, taps, _, _ = here(7, False, torch.float64)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), refused("torch.float64"):
        long_conv(x, taps, "triton")


def test_another_device_is_refused() -> None:
    x = torch.zeros(1, 2, 7, dtype=torch.bfloat16, device="meta")
    with refused("'triton'", "CUDA", "meta", "backend='fft'"):
        long_conv(x, torch.zeros(2, 13, device="meta"), "triton")


IN_A_NEW_PROCESS = """
import os, sys
if {hidden}:
    sys.modules["triton"] = None  # as if it were not installed
os.environ.pop("TRITON_INTERPRET", None)
import torch
from sgconvnext.longconv import available_backends, long_conv
x, taps = torch.ones(1, 2, 7, dtype=torch.bfloat16), torch.ones(2, 13)
assert long_conv(x, taps).tolist() == [[[7.0] * 7] * 2]
assert available_backends(x) == ["fft", "toeplitz", "dft", "reference"]
try:
    long_conv(x, taps, "triton")
except ValueError as error:
    print(error)
import sgconvnext.profile, sgconvnext.longconv.triton.block
assert not [name for name in sys.modules if name.startswith("sgconvnext") and "programs" in name]
"""


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("hidden", "words"), [(True, ["package triton", "not installed"]), (False, ["CUDA device", "x is on cpu"])]
)
def test_absence_of_triton_or_of_a_gpu_is_told_in_one_line(hidden: bool, words: list[str]) -> None:
    command = [sys.executable, "-c", IN_A_NEW_PROCESS.format(hidden=hidden)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    [line] = process.stdout.splitlines()
    assert all(word in line for word in [*words, "'triton'", "backend='fft'"]), line


def test_triton_without_gather_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"triton": "3.2.0"}.get)
    monkeypatch.setattr(toeplitz, "_PROBLEM", toeplitz._find_problem())
    with refused("'triton'", "3.3", "3.2.0", "torch 2.7", "backend='fft'"):
        long_conv(*here(7, False, torch.bfloat16)[:2], "triton")
    assert not toeplitz.is_usable()


def test_gpu_with_too_little_shared_memory_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class TooLarge:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return self.launch

        def launch(self, *_: Any, **__: Any) -> None:
            raise triton_programs.OutOfResources(147456, 101376, "shared memory")

    monkeypatch.setattr(triton_programs, "_convolve", TooLarge())
    with refused("'triton'", "147456", "101376", "backend='fft'"):
        long_conv(*here(7, False, torch.bfloat16)[:2], "triton")


@each_half
def test_backend_is_available_in_half_precision(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 2, 7, device=DEVICE)
    assert "triton" in available_backends(x.to(dtype))
    assert "triton" not in available_backends(x)
    with torch.autocast(DEVICE, dtype=dtype):
        assert "triton" in available_backends(x)


@each_half
def test_backend_is_chosen_on_a_gpu_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_is_timed", lambda _: True)
    with FakeTensorMode():
        x = torch.empty(8, 2, 3136, device="cuda", dtype=dtype)
        assert choose_backend(x) == "triton"
        assert choose_backend(x, one_length=False) == "fft"  # it would be compiled again for every length
        assert choose_backend(x.float()) == "fft"
        assert choose_backend(x.double()) == "fft"
        assert choose_backend(x, length=4097) == "fft"
        assert choose_backend(x.float(), length=196) == "toeplitz"
        assert choose_backend(x.cpu()) == "fft"
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)  # torch.autocast needs a GPU
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: dtype)
        assert choose_backend(x.float()) == "triton"
        assert choose_backend(x.double()) == "fft"
        monkeypatch.setattr(choice, "_is_timed", lambda _: False)
        assert choose_backend(x) == "fft"


def test_layer_on_a_gpu_chooses_triton_for_the_size_that_it_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_is_timed", lambda _: True)
    with FakeTensorMode():
        layer = SGConv2d(2, (8, 6), row_gap=3, bias=True, dilation=2, device="cuda")
        x = torch.empty(4, 2, 15, 12, device="cuda", dtype=torch.float16)
        assert layer.backend_for(x) == "triton"
        assert layer.backend_for(x[..., :8]) == "toeplitz"
        assert SGConv2d(2, (8, 6), backend="fft", device="cuda").backend_for(x) == "fft"


# What it costs


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The multiply-adds of every matrix product that the interpreter makes."""
    if DEVICE == "cuda":
        pytest.skip("a GPU does not tell")
    from triton.runtime.interpreter import InterpreterBuilder

    macs: list[int] = []
    create_dot = InterpreterBuilder.create_dot

    def counting(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        macs.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    return macs


@each_side
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (16, 130), (49, 3), (65, 70), (300, 34), (1100, 2)])
def test_flops_are_what_the_programs_multiply(length: int, batch: int, causal: bool, multiplied: list[int]) -> None:
    x = torch.randn(batch, 1, length, dtype=torch.float16)
    taps = torch.randn(1, length if causal else 2 * length - 1)
    for operator, arguments in (
        (torch.ops.sgconvnext.toeplitz_conv, (x, taps)),
        (torch.ops.sgconvnext.toeplitz_conv_dx, (x, taps)),
        (torch.ops.sgconvnext.toeplitz_conv_dtaps, (x, x, taps.shape[1])),
    ):
        multiplied.clear()
        with FlopCounterMode(display=False) as counter:
            operator(*arguments)
        assert counter.get_total_flops() == 2 * sum(multiplied) > 0


def test_tiles_cost_what_they_cost_by_hand() -> None:
    assert tiles.conv_tile(256, 3136) == (256, 128, 64, 8, 3)
    # 1 tile of 256 images, 25 of 128 outputs (3200), 49 steps of 64 inputs (3136)
    assert tiles.conv_macs(256, 96, 3136, -3135, 3135) == 96 * 256 * 3200 * 3136
    # 25 tiles of 128 outputs by as many of inputs (3200), 4 steps of 64 images
    assert tiles.dtaps_tile(256, 3136) == (128, 128, 64, 4, 3)
    assert tiles.dtaps_macs(256, 96, 3136, -3135) == 96 * 256 * 3200**2
    # causal: the tiles on and below the diagonal
    assert tiles.dtaps_macs(256, 96, 3136, 0) == 96 * 256 * 25 * 26 // 2 * 128**2
    assert tiles.conv_macs(256, 96, 3136, 0, 3135) == 96 * 256 * 128 * 64 * (sum(range(2, 49, 2)) + 49)


@pytest.mark.end_to_end
def test_count_of_a_model_has_the_operator_in_it() -> None:
    torch.use_deterministic_algorithms(False)  # on CUDA torch then interpolates by something that cannot be traced
    model, x = small_model(backend="triton").bfloat16().to(DEVICE), torch.randn(2, 3, 64, 64, device=DEVICE).bfloat16()
    counted = count(model, x)
    for stage, layer in enumerate(mixers(model)):
        tokens, channels = layer.length, layer.channels
        convolution = counted.total(str(stage + 1), CONVOLUTION)
        assert convolution.executed == tiles.conv_macs(2, channels, tokens, 1 - tokens, tokens - 1)
        assert convolution.activations == 2 * channels * tokens
        by_fft = count(small_model(backend="fft"), torch.randn(2, 3, 64, 64)).total(str(stage + 1), CONVOLUTION)
        assert convolution.macs == by_fft.macs
