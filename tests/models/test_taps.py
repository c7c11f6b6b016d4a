"""Taps made by one operator, against their definition in float64.

It runs torch's operators, or a Triton program: on a GPU if there is one, else interpreted. Memory that nothing is
written to is NaN here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import relative_error, small_model
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from sgconvnext import SGConv2d
from sgconvnext.models.kernel import KernelOptions, kernel_options, lag_taps, multiscale_kernel

pytest.importorskip("triton")
from sgconvnext.longconv.triton import kernel_programs
from sgconvnext.models import taps as taps_operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS: dict[str, dict[str, Any]] = {
    "one alpha": {},
    "alphas over the channels": {"alpha": (1, 1 / 3)},
    "by position": {"decay": "position", "exponent": 0.7},
}
SHAPES = {  # (directions, N, C, d), L
    "all taps of every scale": ((2, 3, 3, 7), 28),
    "a last scale that is cut": ((2, 5, 3, 4), 49),
    "a scale without a tap": ((2, 4, 2, 16), 30),
    "causal": ((1, 4, 2, 5), 37),
    "one scale": ((2, 1, 2, 9), 9),
    "one tap a scale": ((2, 3, 1, 1), 3),
    "one token": ((2, 2, 3, 1), 1),
    "more blocks than one": ((1, 6, 2, 70), 2200),
}

each_shape = pytest.mark.parametrize(("shape", "length"), SHAPES.values(), ids=SHAPES)
each_option = pytest.mark.parametrize("options", [kernel_options(**each) for each in OPTIONS.values()], ids=OPTIONS)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU, where Triton interprets."""
    monkeypatch.setattr(taps_operator, "_runs_triton", lambda _: True)


@pytest.fixture(params=["torch", "triton"])
def each_way(_triton: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs."""
    monkeypatch.setattr(taps_operator, "_runs_triton", lambda _: request.param == "triton")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def parameters(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, skip and norm, random."""
    directions, _, channels, _ = shape
    weight, skip = torch.randn(shape, device=DEVICE), torch.randn(channels, device=DEVICE)
    norm = torch.rand(directions, channels, 1, device=DEVICE) + 0.5
    return weight.to(dtype).requires_grad_(), skip.to(dtype).requires_grad_(), norm.to(dtype)


def by_triton(weight: Tensor, skip: Tensor, norm: Tensor, length: int, options: KernelOptions) -> Tensor:
    exponent = options.exponent if options.decay == "position" else None
    return taps_operator.multiscale_taps(weight, skip, norm, length, options.alpha, exponent)


def by_definition(weight: Tensor, skip: Tensor, norm: Tensor, length: int, options: KernelOptions) -> Tensor:
    weight, skip, norm = (tensor.cpu().double() for tensor in (weight, skip, norm))
    return lag_taps(multiscale_kernel(weight, length, options) / norm, skip)


def check(shape: tuple[int, ...], length: int, options: KernelOptions, dtype: torch.dtype = torch.float32) -> None:
    """Taps, gradients, and the gradients of a function of the gradients."""
    inputs = parameters(shape, dtype)
    dtaps = torch.randn_like(by_definition(*inputs, length, options))
    found = []
    for function in (by_triton, by_definition):
        weight, skip, norm = (tensor.detach().clone() for tensor in inputs)
        weight.requires_grad_()
        skip.requires_grad_()
        taps = function(weight, skip, norm, length, options)
        upstream = dtaps.to(taps.device, taps.dtype).requires_grad_()
        dweight, dskip = torch.autograd.grad(taps, [weight, skip], upstream, create_graph=True)
        (again,) = torch.autograd.grad((dweight.double() ** 2).sum() + (dskip.double() ** 3).sum(), upstream)
        found.append({"taps": taps, "dweight": dweight, "dskip": dskip, "again": again})
    bound = 2e-6 if dtype == torch.float32 else 1e-2  # the gradients have the dtype of the parameters
    for name, want in found[1].items():
        error = relative_error(found[0][name].cpu(), want.cpu())
        assert error <= (2e-6 if name == "taps" else bound), f"{name}: relative error {error:.1e}"


@pytest.mark.usefixtures("each_way")
@each_shape
@each_option
def test_taps_and_derivatives_match_the_definition(
    shape: tuple[int, ...], length: int, options: KernelOptions
) -> None:
    check(shape, length, options)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_half_precision_make_taps_in_float32(dtype: torch.dtype) -> None:
    check((2, 5, 3, 4), 49, kernel_options(), dtype)


BROKEN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "nothing runs": ("_launch", lambda launch: lambda *_, **__: None),
    "a program is missing": (
        "_launch",
        lambda launch: lambda program, count, *a, **k: launch(program, count - 1, *a, **k),
    ),
    "taps one lag late": ("taps", lambda taps: lambda *a: taps(*a).roll(1, -1)),
    "zero taps": ("taps", lambda taps: lambda *a: taps(*a) * 0),
    "gradients of another direction": ("parameters", lambda parameters: lambda *a: parameters(*a).flip(0)),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_check_fails_on_broken_programs(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, broken = BROKEN[fault]
    check((2, 5, 3, 4), 49, kernel_options())
    monkeypatch.setattr(kernel_programs, name, broken(getattr(kernel_programs, name)))
    with pytest.raises(AssertionError, match="relative error"):
        check((2, 5, 3, 4), 49, kernel_options())


def test_two_runs_are_bit_identical() -> None:
    inputs = parameters((2, 5, 3, 13))
    first, second = (
        torch.autograd.grad(by_triton(*inputs, 196, kernel_options()).sin().sum(), inputs[:2]) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("only", [0, 1], ids=["weight", "skip"])
def test_gradient_of_one_parameter_alone(only: int) -> None:
    inputs = parameters((2, 3, 3, 7))
    want = torch.autograd.grad(by_triton(*inputs, 28, kernel_options()).sin().sum(), inputs[:2])[only]
    alone = [tensor.detach().requires_grad_(i == only) for i, tensor in enumerate(inputs)]
    (got,) = torch.autograd.grad(by_triton(*alone, 28, kernel_options()).sin().sum(), alone[only])
    assert torch.equal(got, want)


def test_operators_pass_torchs_own_checks() -> None:
    weight, skip, norm = (tensor.detach() for tensor in parameters((2, 3, 3, 7)))
    options = (28, 0.5, 0.25, None)
    torch.library.opcheck(taps_operator._taps, (weight, skip, norm, *options))
    torch.library.opcheck(taps_operator._parameters, (torch.randn(3, 55, device=DEVICE), norm, 3, 7, *options))


def test_the_operator_is_taken_but_by_transforms_and_counters() -> None:
    plain = [tensor.detach() for tensor in parameters((2, 3, 3, 7))]
    assert taps_operator.takes(*plain)
    assert taps_operator.takes(*(tensor.cpu() for tensor in plain))
    with FlopCounterMode(display=False):
        assert not taps_operator.takes(*(tensor.cpu() for tensor in plain))
    assert not taps_operator.takes(*(tensor.double() for tensor in plain))
    seen = []
    torch.func.vmap(lambda x: (seen.append(taps_operator.takes(x)), x)[1])(plain[0])
    assert seen == [False]
    taken = torch.compile(lambda x: x + 1 if taps_operator.takes(x) else x, backend="eager", fullgraph=True)
    assert taken(torch.zeros(1, device=DEVICE)) == 1
    assert taken(torch.zeros(1, device=DEVICE, dtype=torch.float64)) == 0


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take the program here too, where there is no GPU."""
    monkeypatch.setattr(taps_operator, "takes", lambda *_: True)


@pytest.mark.usefixtures("everywhere")
@each_option
def test_layer_has_the_same_taps_by_both(options: KernelOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SGConv2d(4, (7, 7), decay=options.decay, alpha=options.alpha, exponent=options.exponent, device=DEVICE)
    got = layer.built_taps()
    monkeypatch.setattr(taps_operator, "takes", lambda *_: False)
    assert relative_error(got, layer.built_taps()) <= 1e-6
    assert not torch.equal(got, torch.zeros_like(got))


@pytest.mark.usefixtures("each_way")
def test_batched_gradients_are_those_of_each() -> None:
    layer, x = SGConv2d(4, (5, 6), device=DEVICE), torch.randn(2, 4, 5, 6, device=DEVICE)
    parameters, y = [layer.weight, layer.skip], layer(x)
    many = torch.randn(3, *y.shape, device=DEVICE)
    batched = torch.autograd.grad(y, parameters, many, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(many):
        for got, want in zip(batched, torch.autograd.grad(y, parameters, dy, retain_graph=True), strict=True):
            assert relative_error(got[i], want) <= 1e-6


@pytest.mark.usefixtures("each_way")
@each_option
def test_graph_made_outside_can_be_transformed(options: KernelOptions) -> None:
    layer = SGConv2d(4, (5, 6), decay=options.decay, alpha=options.alpha, exponent=options.exponent, device=DEVICE)
    y = layer(torch.randn(2, 4, 5, 6, device=DEVICE)).flatten()
    many = torch.randn(3, y.numel(), device=DEVICE)

    def gradient(dy: Tensor, again: bool = False) -> Tensor:
        return torch.autograd.grad(y, layer.weight, dy, retain_graph=True, create_graph=again)[0]

    want = torch.stack([gradient(dy) for dy in many])
    for again in (False, True):
        assert relative_error(torch.func.vmap(lambda dy, again=again: gradient(dy, again))(many), want) <= 1e-6
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(gradient(forward_ad.make_dual(many[0], many[1])))
    assert relative_error(got.primal, want[0]) <= 1e-6
    assert relative_error(got.tangent, want[1]) <= 1e-6


def test_taps_are_in_float32_whatever_the_default_dtype_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps_operator, "_runs_triton", lambda x: x.is_cuda)
    layer = SGConv2d(7, (5, 6), alpha=(1, 1 / 3), device=DEVICE)  # sizes of which nothing is kept yet
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer.built_taps()
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative_error(layer.built_taps(), lag_taps(layer.kernel(), layer.skip)) <= 1e-6


def test_norm_that_is_trained_has_a_gradient() -> None:
    layer = SGConv2d(4, (5, 6), device=DEVICE)
    layer.kernel_norm.requires_grad_()
    layer(torch.randn(2, 4, 5, 6, device=DEVICE)).square().sum().backward()
    assert layer.kernel_norm.grad.abs().min() > 0


@pytest.mark.end_to_end
def test_network_compiles_with_the_operator_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)  # the compiler would fill memory that the interpreter then reads
    monkeypatch.setattr(taps_operator, "_runs_triton", lambda x: x.is_cuda)
    model, x = small_model().to(DEVICE), torch.randn(2, 3, 64, 64, device=DEVICE)
    graphs: list[str] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend=keep)):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y, *(parameter.grad for parameter in model.parameters())])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) <= 1e-4
    with torch.inference_mode():
        assert relative_error(torch.compile(model, fullgraph=True, backend=keep)(x), found[0][0]) <= 1e-5
    assert "interpolate" not in "".join(graphs)
    assert "rfft" not in "".join(graphs)
