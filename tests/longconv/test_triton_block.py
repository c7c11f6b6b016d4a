"""The block's Triton operators against their definitions in float64: on a GPU, if there is one, else interpreted.

Memory that nothing is written to is NaN here. What needs no numbers runs on the meta device.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import refused, relative_error, sliced
from torch import Tensor

pytest.importorskip("triton", reason="the block's Triton operators need triton")
import triton.language as tl
from triton.runtime import interpreter

from sgconvnext.longconv.triton import block, block_programs
from sgconvnext.longconv.triton.block import (
    layer_norm_channels_last,
    residual_and_copy,
    scale_residual_channels_first,
)

INTERPRETED = not torch.cuda.is_available()
EPS = 1e-6
HALVES = (torch.bfloat16, torch.float16)
# the interpreter cuts bfloat16 off where GPUs round it: twice the error
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-4, torch.bfloat16: 5e-3}
SHAPES = [(1, 3, 1), (3, 3, 49), (1, 40, 16), (3, 40, 197), (3, 96, 49), (1, 192, 196), (1, 768, 1), (3, 1536, 1)]
HALF_SHAPES = [(3, 3, 49), (1, 96, 197)]
CASES = [(shape, torch.float32, torch.float32) for shape in SHAPES] + [
    (shape, *dtypes)
    for shape in HALF_SHAPES
    for dtypes in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    )
]

each_case = pytest.mark.parametrize(("shape", "dtype", "other"), CASES)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    torch.set_default_device(None if INTERPRETED else "cuda")
    torch.use_deterministic_algorithms(True)
    assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.ones(2).new_empty(3, dtype=torch.bfloat16).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_device(None)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each then takes several tiles, and the last one fewer."""
    monkeypatch.setattr(block_programs, "PROGRAMS", 4)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def check(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.is_contiguous(), name
    error = relative_error(got, want)
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def identical(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Norm(NamedTuple):
    """Operands of the norm, and the gradient of its output."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor

    @classmethod
    def random(cls, shape: tuple[int, int, int], dtype: torch.dtype, out: torch.dtype) -> "Norm":
        batch, channels, length = shape
        x = (2 * random(*shape) + random(channels, 1) + 3).to(dtype)
        return cls(x, 1 + random(channels), random(channels), random(batch, length, channels, dtype=out))

    def run(self) -> tuple[Tensor, ...]:
        """y, dx, dweight, dbias."""
        inputs = [tensor.detach().requires_grad_() for tensor in self[:3]]
        y = layer_norm_channels_last(*inputs, EPS, self.dy.dtype)
        return y.detach(), *torch.autograd.grad(y, inputs, self.dy)

    def define(self) -> tuple[Tensor, ...]:
        inputs = [tensor.detach().double().requires_grad_() for tensor in self[:3]]
        y = F.layer_norm(inputs[0].transpose(1, 2), inputs[1].shape, inputs[1], inputs[2], EPS)
        return y.detach(), *torch.autograd.grad(y, inputs, self.dy.double())


class Residual(NamedTuple):
    """Operands of the residual sum, and the gradient of its output."""

    shortcut: Tensor
    y: Tensor
    gamma: Tensor | None
    keep: Tensor | None
    dout: Tensor

    @classmethod
    def random(
        cls,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        branch: torch.dtype,
        gamma: bool = True,
        keep: bool = True,
    ) -> "Residual":
        batch, channels, length = shape
        y = random(batch, length, channels, dtype=branch)
        shortcut, dout = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
        factors = torch.tensor([1.25, 0.0, 2.0])[:batch]
        return cls(shortcut, y, random(channels) if gamma else None, factors if keep else None, dout)

    def run(self) -> tuple[Tensor, ...]:
        """out, dshortcut, dy, and dgamma if there is a gamma."""
        inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in self[:3]]
        out = scale_residual_channels_first(*inputs, self.keep)
        return out.detach(), *torch.autograd.grad(out, [tensor for tensor in inputs if tensor is not None], self.dout)

    def define(self) -> tuple[Tensor, ...]:
        inputs = [tensor.detach().double().requires_grad_() for tensor in self[:3] if tensor is not None]
        branch = inputs[1].transpose(1, 2)
        if self.gamma is not None:
            branch = branch * inputs[2][:, None]
        if self.keep is not None:
            branch = branch * self.keep[:, None, None].double()
        out = inputs[0] + branch
        return out.detach(), *torch.autograd.grad(out, inputs, self.dout.double())


@each_case
def test_norm_matches_definition(
    shape: tuple[int, int, int], dtype: torch.dtype, other: torch.dtype, few_programs: None
) -> None:
    operands = Norm.random(shape, dtype, other)
    got = operands.run()
    assert [tensor.dtype for tensor in got] == [other, dtype, torch.float32, torch.float32]
    for name, ours, truth in zip(("y", "dx", "dweight", "dbias"), got, operands.define(), strict=True):
        check(name, ours, truth, TOLERANCE[ours.dtype])


@each_case
def test_residual_matches_definition(
    shape: tuple[int, int, int], dtype: torch.dtype, other: torch.dtype, few_programs: None
) -> None:
    operands = Residual.random(shape, dtype, other)
    got = operands.run()
    assert [tensor.dtype for tensor in got] == [dtype, dtype, other, torch.float32]
    for name, ours, truth in zip(("out", "dshortcut", "dy", "dgamma"), got, operands.define(), strict=True):
        check(name, ours, truth, TOLERANCE[ours.dtype])


@pytest.mark.parametrize("kind", [Norm, Residual])
@pytest.mark.parametrize("shape", [(3, 3, 49), (3, 96, 49)])
def test_second_run_gives_the_same_bits(
    shape: tuple[int, int, int], kind: type[Norm | Residual], few_programs: None
) -> None:
    operands = kind.random(shape, torch.float32, torch.bfloat16)
    assert identical(operands.run(), operands.run())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("gamma", [False, True])
def test_residual_without_factors_matches_definition(gamma: bool, keep: bool) -> None:
    operands = Residual.random((3, 40, 49), torch.float32, torch.bfloat16, gamma, keep)
    got, want = operands.run(), operands.define()
    assert len(got) == len(want) == 3 + gamma
    for ours, truth in zip(got, want, strict=True):
        check("residual", ours, truth, TOLERANCE[ours.dtype])


@pytest.mark.parametrize("trained", [True, False], ids=["branch", "shortcut alone"])
def test_copy_of_the_sum_adds_its_gradient_to_that_of_the_sum(trained: bool, few_programs: None) -> None:
    operands = Residual.random((3, 40, 49), torch.float32, torch.bfloat16)
    dcopy = random(3, 40, 49, dtype=torch.bfloat16)
    inputs = [tensor.detach().requires_grad_(trained or i == 0) for i, tensor in enumerate(operands[:3])]
    out, copy = residual_and_copy(*inputs, operands.keep, torch.bfloat16)
    assert torch.equal(copy, out.to(torch.bfloat16)) or INTERPRETED  # it cuts off what a GPU rounds
    check("copy", copy.detach(), operands.define()[0], TOLERANCE[torch.bfloat16])
    got = torch.autograd.grad([out, copy], inputs if trained else inputs[:1], [operands.dout, dcopy])
    both = operands._replace(dout=operands.dout + dcopy.float())
    for name, ours, truth in zip(("dshortcut", "dy", "dgamma"), got, both.define()[1:], strict=False):
        check(name, ours, truth, TOLERANCE[ours.dtype])


@pytest.mark.parametrize("only", ["sum", "copy"])
def test_gradient_of_the_sum_or_its_copy_alone(only: str) -> None:
    operands = Residual.random((2, 40, 49), torch.float32, torch.bfloat16)
    inputs = [tensor.detach().requires_grad_() for tensor in operands[:3]]
    sums = residual_and_copy(*inputs, operands.keep, torch.float32)
    got = torch.autograd.grad(sums[only == "copy"], inputs, operands.dout)
    for ours, truth in zip(got, operands.define()[1:], strict=True):
        check(only, ours, truth, TOLERANCE[ours.dtype])


def test_residual_keeps_updates_that_bfloat16_would_lose() -> None:
    operands = Residual.random((1, 40, 49), torch.float32, torch.bfloat16)._replace(gamma=torch.full((40,), 1e-6))
    out = operands.run()[0]
    check("update", out.double() - operands.shortcut, operands.define()[0] - operands.shortcut, 0.1)


def test_dropped_samples_are_their_shortcut() -> None:
    operands = Residual.random((3, 40, 49), torch.bfloat16, torch.bfloat16)
    out, _, dy, _ = operands.run()
    assert torch.equal(out[1], operands.shortcut[1])
    assert not dy[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_in_half_precision_get_gradients_in_it(dtype: torch.dtype) -> None:
    norm = Norm.random((3, 40, 49), torch.bfloat16, torch.bfloat16)
    norm = norm._replace(weight=norm.weight.to(dtype), bias=norm.bias.to(dtype))
    residual = Residual.random((3, 40, 49), torch.bfloat16, torch.bfloat16)
    residual = residual._replace(gamma=random(40, dtype=dtype))
    got = [*norm.run()[2:], residual.run()[3]]
    assert [tensor.dtype for tensor in got] == [dtype] * 3
    for ours, truth in zip(got, [*norm.define()[2:], residual.define()[3]], strict=True):
        check("gradient", ours, truth, TOLERANCE[dtype])


def test_norm_of_a_constant_token_is_its_bias() -> None:
    operands = Norm.random((1, 40, 49), torch.float32, torch.float32)._replace(x=torch.full((1, 40, 49), 7.0))
    y, dx, _, _ = operands.run()
    check("y", y, operands.bias.expand_as(y), 1e-3)
    assert dx.isfinite().all()


def test_norm_is_exact_far_from_zero() -> None:
    operands = Norm.random((1, 96, 49), torch.float32, torch.float32)
    operands = operands._replace(x=operands.x + 1000)  # the squares' mean minus the mean's square would lose all
    check("y", operands.run()[0], operands.define()[0], 1e-4)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


@pytest.mark.parametrize("layout", [sliced, transposed])
def test_operands_may_have_any_layout(layout: object) -> None:
    for operands in (
        Norm.random((3, 40, 49), torch.float32, torch.bfloat16),
        Residual.random((3, 40, 49), torch.float32, torch.bfloat16),
    ):
        strided = type(operands)(*map(layout, operands))
        assert identical(strided.run(), operands.run())


def test_gradient_may_be_expanded() -> None:
    norm = Norm.random((3, 40, 49), torch.float32, torch.float32)
    residual = Residual.random((3, 40, 49), torch.float32, torch.float32)
    one = torch.ones(())
    for expanded, contiguous in (
        (norm._replace(dy=one.expand_as(norm.dy)), norm._replace(dy=torch.ones_like(norm.dy))),
        (residual._replace(dout=one.expand_as(residual.dout)), residual._replace(dout=torch.ones_like(residual.dout))),
    ):
        assert identical(expanded.run(), contiguous.run())


def test_gradient_of_one_input_alone_is_the_same() -> None:
    for operands in (
        Norm.random((1, 40, 49), torch.float32, torch.float32),
        Residual.random((1, 40, 49), torch.float32, torch.float32),
    ):
        want = operands.run()
        for i in range(3):
            inputs = [tensor.detach().requires_grad_(j == i) for j, tensor in enumerate(operands[:3])]
            if isinstance(operands, Norm):
                out = layer_norm_channels_last(*inputs, EPS)
            else:
                out = scale_residual_channels_first(*inputs, operands.keep)
            assert torch.equal(torch.autograd.grad(out, inputs[i], operands[-1])[0], want[i + 1])


@pytest.mark.parametrize("trained", [False, True])
def test_residual_saves_its_branch_only_for_gamma(trained: bool) -> None:
    operands = Residual.random((3, 40, 49), torch.float32, torch.bfloat16)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes), lambda _: None):
        gamma = operands.gamma.requires_grad_(trained)
        scale_residual_channels_first(operands.shortcut, operands.y.requires_grad_(), gamma, operands.keep)
    assert sum(saved) == gamma.nbytes + operands.keep.nbytes + trained * operands.y.nbytes


def test_empty_batch_has_zero_gradients() -> None:
    y, dx, dweight, dbias = Norm.random((0, 40, 49), torch.float32, torch.float32).run()
    out, _, dy, dgamma = Residual.random((0, 40, 49), torch.float32, torch.float32).run()
    assert (y.shape, dx.shape, out.shape, dy.shape) == ((0, 49, 40), (0, 40, 49), (0, 40, 49), (0, 49, 40))
    assert all(torch.equal(sums, torch.zeros(40)) for sums in (dweight, dbias, dgamma))


def test_compiles_without_a_graph_break() -> None:
    norm = Norm.random((3, 40, 49), torch.float32, torch.bfloat16)
    residual = Residual.random((3, 40, 49), torch.float32, torch.bfloat16)

    def both(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, shortcut: Tensor) -> Tensor:
        y = layer_norm_channels_last(x, weight, bias, EPS, torch.bfloat16)
        return scale_residual_channels_first(shortcut, y, gamma, residual.keep)

    results = []
    for run in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        inputs = [tensor.detach().requires_grad_() for tensor in (*norm[:3], residual.gamma, residual.shortcut)]
        out = run(*inputs)
        results.append((out.detach(), *torch.autograd.grad(out, inputs, residual.dout)))
    assert identical(*results)


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_a_well_behaved_operator(name: str, dtype: torch.dtype) -> None:
    norm = Norm.random((2, 40, 17), dtype, torch.bfloat16)
    inputs = [tensor.detach() for tensor in norm[:3]]
    _, stats = block._norm(*inputs, EPS, torch.bfloat16)
    if name == "forward":
        torch.library.opcheck(block._norm, (*inputs, EPS, torch.bfloat16))
    else:
        torch.library.opcheck(block._norm_gradients, (norm.dy, norm.x.detach(), norm.weight.detach(), stats))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("gamma", [False, True])
def test_residual_is_a_well_behaved_operator(gamma: bool, keep: bool) -> None:
    residual = Residual.random((2, 40, 17), torch.float32, torch.bfloat16, gamma, keep)
    inputs = [None if tensor is None else tensor.detach() for tensor in residual[:3]]
    for dtype, dcopy in ((None, None), (torch.bfloat16, residual.dout.bfloat16())):
        torch.library.opcheck(block._residual, (*inputs, residual.keep, dtype))
        for y in (None, residual.y):
            operands = (residual.dout, dcopy, y, residual.gamma, residual.keep, torch.bfloat16)
            torch.library.opcheck(block._residual_gradients, operands)


def second(of: Tensor, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Derivatives of a number made of first derivatives, which need the second ones of every input."""
    first = torch.autograd.grad(of, inputs, dy, create_graph=True)
    return list(torch.autograd.grad(sum((t.double() * (t.double() + 1)).sum() for t in first), [*inputs, dy]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_of_the_norm_match_definition(dtype: torch.dtype) -> None:
    norm = Norm.random((2, 5, 7), dtype, dtype)
    ours = [tensor.detach().requires_grad_() for tensor in norm]
    exact = [tensor.detach().double().requires_grad_() for tensor in norm]
    got = second(layer_norm_channels_last(*ours[:3], EPS), [ours[0], ours[1]], ours[3])
    y = F.layer_norm(exact[0].transpose(1, 2), exact[1].shape, exact[1], exact[2], EPS)
    for name, one, truth in zip(("x", "weight", "dy"), got, second(y, exact[:2], exact[3]), strict=True):
        assert truth.norm() > 0
        assert relative_error(one, truth) <= (1e-5 if dtype == torch.float32 else 3e-2), name


def test_second_derivatives_of_the_residual_match_definition() -> None:
    residual = Residual.random((2, 5, 7), torch.float32, torch.float32)
    ours = [tensor.detach().requires_grad_() for tensor in (residual.y, residual.gamma, residual.dout)]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    got = second(scale_residual_channels_first(residual.shortcut, *ours[:2], residual.keep), ours[:2], ours[2])
    out = residual.shortcut + (exact[0] * exact[1]).transpose(1, 2) * residual.keep[:, None, None]
    for name, one, truth in zip(("y", "gamma", "dout"), got, second(out, exact[:2], exact[2]), strict=True):
        assert truth.norm() > 0
        assert relative_error(one, truth) <= 1e-5, name


def run_last(monkeypatch: pytest.MonkeyPatch, program: object, last: int, *operands: object, **constants: int) -> None:
    """Interpreted, run the last of many programs only, as if all others had run before it."""
    if not INTERPRETED:
        program[(last + 1,)](*operands, **constants)
        return
    pid = interpreter.TensorHandle(np.array([last], dtype=np.int32), tl.int32)
    with monkeypatch.context() as patch:
        patch.setattr(interpreter.interpreter_builder, "create_get_program_id", lambda axis: pid)
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # copies every page onto itself
        program[(1,)](*operands, **constants)


def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of 64 x 32, each a program's; the last one ends at element 2^31 + 2^11. A CPU has only its pages."""
    torch.use_deterministic_algorithms(False)  # it would fill the gigabytes
    norm = Norm.random((1, 64, 32), torch.float16, torch.float16)
    residual = Residual.random((1, 64, 32), torch.float16, torch.float16)
    last = 2**20
    x, y, dx, dy = (torch.empty(last + 1, *shape, dtype=torch.float16) for shape in [(64, 32), (32, 64)] * 2)
    means, rstds = (torch.empty(last + 1, 32) for _ in range(2))
    size = {"C": 64, "L": 32, "TILE_C": 64, "TILE_L": 32}

    x[last], dy[last] = norm.x[0], norm.dy[0]
    run_last(monkeypatch, block_programs._norm_forward, last, x, norm.weight, norm.bias, y, means, rstds, EPS, **size)
    sums = torch.empty(2, last + 1, 64)
    operands = (dy, x, norm.weight, means, rstds, dx, sums[0], sums[1], last + 1, 1)
    run_last(monkeypatch, block_programs._norm_backward, last, *operands, LANES=4, **size)
    got = (y[last:], dx[last:], sums[0, last], sums[1, last])
    for ours, truth in zip(got, norm.define(), strict=True):
        check("norm", ours, truth, TOLERANCE[ours.dtype])

    keep = torch.ones(last + 1)
    x[last], y[last], keep[last] = residual.shortcut[0], residual.y[0], residual.keep[0]
    run_last(monkeypatch, block_programs._residual_forward, last, x, y, residual.gamma, keep, dx, None, **size)
    check("out", dx[last:], residual.define()[0], TOLERANCE[torch.float16])
    x[last] = residual.dout[0]
    operands = (x, None, y, residual.gamma, keep, None, dy, sums[0], last + 1, 1)
    run_last(monkeypatch, block_programs._residual_backward, last, *operands, **size)
    for ours, truth in zip((dy[last:], sums[0, last]), residual.define()[2:], strict=True):
        check("residual", ours, truth, TOLERANCE[ours.dtype])


# What needs no numbers


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [None, torch.float32, *HALVES])
@pytest.mark.parametrize("of_x", [torch.float32, *HALVES])
def test_norm_has_the_shape_and_dtype_that_are_asked_for(of_x: torch.dtype, dtype: torch.dtype | None) -> None:
    x = on_meta(2, 3, 5, dtype=of_x).requires_grad_()
    y = layer_norm_channels_last(x, on_meta(3), on_meta(3), 1e-6, dtype)
    assert y.shape == (2, 5, 3)
    assert y.dtype == (of_x if dtype is None else dtype)
    assert y.is_contiguous()
    (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert (dx.shape, dx.dtype) == (x.shape, of_x)


@pytest.mark.parametrize("of_y", [torch.float32, *HALVES])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_residual_has_the_shape_and_dtype_of_its_shortcut(dtype: torch.dtype, of_y: torch.dtype) -> None:
    y = on_meta(2, 5, 3, dtype=of_y).requires_grad_()
    out = scale_residual_channels_first(on_meta(2, 3, 5, dtype=dtype), y, on_meta(3), on_meta(2))
    assert (out.shape, out.dtype) == ((2, 3, 5), dtype)
    assert out.is_contiguous()
    (dy,) = torch.autograd.grad(out, y, torch.empty_like(out))
    assert (dy.shape, dy.dtype) == (y.shape, of_y)


def test_norm_refuses_what_it_cannot_take() -> None:
    x, vector = on_meta(2, 3, 5), on_meta(3)
    with refused("x is", "(2, 3)", "three dimensions"):
        layer_norm_channels_last(on_meta(2, 3), vector, vector, 1e-6)
    with refused("x is", "torch.float64", "float32, bfloat16, float16"):
        layer_norm_channels_last(on_meta(2, 3, 5, dtype=torch.float64), vector, vector, 1e-6)
    with refused("x is", "(1, 65536, 32768)", "2^31"):
        layer_norm_channels_last(on_meta(1, 65536, 32768), on_meta(65536), on_meta(65536), 1e-6)
    with refused("weight is (5,)", "C=3", "(3,)"):
        layer_norm_channels_last(x, on_meta(5), vector, 1e-6)
    with refused("bias is (3,)", "torch.int64"):
        layer_norm_channels_last(x, vector, on_meta(3, dtype=torch.int64), 1e-6)
    with refused("dtype=torch.float64", "float32, bfloat16, float16"):
        layer_norm_channels_last(x, vector, vector, 1e-6, torch.float64)


def test_residual_refuses_what_it_cannot_take() -> None:
    shortcut, y = on_meta(2, 3, 5), on_meta(2, 5, 3)
    with refused("shortcut is", "(2, 3, 5, 1)"):
        scale_residual_channels_first(on_meta(2, 3, 5, 1), y)
    with refused("y is (2, 3, 5)", "(2, 5, 3)"):
        scale_residual_channels_first(shortcut, on_meta(2, 3, 5))
    with refused("y is", "torch.int32"):
        scale_residual_channels_first(shortcut, on_meta(2, 5, 3, dtype=torch.int32))
    with refused("gamma is (5,)", "C=3", "(3,)"):
        scale_residual_channels_first(shortcut, y, on_meta(5))
    with refused("keep is (2, 1)", "B=2", "(2,)"):
        scale_residual_channels_first(shortcut, y, None, on_meta(2, 1))
    with refused("keep requires a gradient", "detach"):
        scale_residual_channels_first(shortcut, y, None, on_meta(2).requires_grad_())
