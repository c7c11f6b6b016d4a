"""Derivatives of the long convolution: of any order, backward and forward, under torch.func too, for every backend.

The `Operations` of a backend compute these, below autograd:

    convolve(x, K)     y[b, c, t] = sum_s K[c, t - s] x[b, c, s]
    adjoint(y, K)      x[b, c, s] = sum_t K[c, t - s] y[b, c, t]
    correlate(x, y)    K[c, lag]  = sum_{b,t} y[b, c, t] x[b, c, t - lag]

Each is linear in each of its two arguments, so they are one another's derivatives, to any order:

    y = convolve(x, K)            dx = adjoint(dy, K)      dK = correlate(x, dy)
    x = adjoint(y, K)             dy = convolve(dx, K)     dK = correlate(dx, y)
    K = correlate(x, y)           dx = adjoint(y, dK)      dy = convolve(x, dK)

Under torch.vmap the mapped dimension joins the channels, or the batch where only the signal has it. The older vmap of
is_grads_batched knows no such rule, so plain operators run under it.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function

from . import fft
from .backend import Backend, Operations
from .context import is_compiled_transform, is_in_forward_mode, is_transformed

Dims: TypeAlias = tuple[int | None, ...]


def long_conv(x: Tensor, taps: Tensor, backend: Backend) -> Tensor:
    """Same contract as reference.long_conv, by the operations of a backend. Autograd keeps x and the taps alone.

    In forward mode plain operators run, which torch differentiates. A Function may have a rule for forward mode (jvp),
    but torch runs that rule with forward mode off at every level: the second of two nested forward derivatives would
    silently lack terms. Where torch.func is compiled, plain operators run too: the compiler replaces a Function by one
    without rules for torch.func, and its second derivatives would be zero.
    """
    if is_in_forward_mode() or is_compiled_transform():
        return (backend.plain or fft.plain_long_conv)(x, taps)
    convolve = _Convolve if torch.compiler.is_compiling() or is_transformed() else _EagerConvolve
    y: Tensor = convolve.apply(x, taps, False, backend.operations)
    return y


def _again(operations: Operations, *tensors: Tensor) -> Operations:
    """The same operations in a form that is differentiable itself, where somebody may differentiate again.

    A compiled graph has no second derivatives, and its compiler cannot see a Function in the backward of another one.
    """
    if torch.compiler.is_compiling():
        return operations
    if not torch.is_grad_enabled() and not is_transformed():
        return _seen_by(operations, *tensors)
    if is_in_forward_mode():
        return fft.PLAIN
    both = operations.gradients and (lambda x, taps, dy: _Gradients.apply(x, taps, dy, operations))
    return Operations(
        lambda x, taps, adjoint: _Convolve.apply(x, taps, adjoint, operations),
        lambda x, dy, num_taps: _Correlate.apply(x, dy, num_taps, operations),
        both,
    )


def _seen_by(operations: Operations, *tensors: Tensor) -> Operations:
    """The operations, or plain operators if one of the tensors is of torch's older vmap, which can map only those."""
    compiling = torch.compiler.is_compiling()
    return fft.PLAIN if not compiling and any(map(is_legacy_batchedtensor, tensors)) else operations


class _Convolve(Function):
    """convolve(x, taps), or its adjoint."""

    @staticmethod
    def forward(x: Tensor, taps: Tensor, adjoint: bool, operations: Operations) -> Tensor:
        return _seen_by(operations, x, taps).convolve(x, taps, adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, taps, ctx.adjoint, ctx.operations = inputs
        ctx.save_for_backward(x, taps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, taps = ctx.saved_tensors
        dx = dtaps = None
        operations, dy = _again(ctx.operations, x, taps, dy), dy.to(x.dtype)
        if all(ctx.needs_input_grad[:2]) and operations.gradients and not ctx.adjoint:
            dx, dtaps = operations.gradients(x, taps, dy)
        else:
            if ctx.needs_input_grad[0]:
                dx = operations.convolve(dy, taps, not ctx.adjoint)
            if ctx.needs_input_grad[1]:
                first, second = (dy, x) if ctx.adjoint else (x, dy)
                dtaps = operations.correlate(first, second, taps.shape[1])
        return dx, None if dtaps is None else dtaps.to(taps.dtype), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Dims, x: Tensor, taps: Tensor, adjoint: bool, operations: Operations
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        if in_dims[1] is None:
            assert in_dims[0] is not None
            y = _Convolve.apply(x.movedim(in_dims[0], 0).flatten(0, 1), taps, adjoint, operations)
            return y.unflatten(0, (size, -1)), 0
        x, taps = _signal_by_channel(x, in_dims[0], size), _taps_by_channel(taps, in_dims[1], size)
        return _Convolve.apply(x, taps, adjoint, operations).unflatten(1, (size, -1)), 1


class _EagerConvolve(Function):
    """`_Convolve` outside of torch.func, whose Functions take torch longer to call: it inspects their signature."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, adjoint: bool, operations: Operations) -> Tensor:
        ctx.adjoint, ctx.operations = adjoint, operations
        ctx.save_for_backward(x, taps)
        return _Convolve.forward(x, taps, adjoint, operations)

    backward = _Convolve.backward


class _Correlate(Function):
    """correlate(x, dy) for the last num_taps lags."""

    @staticmethod
    def forward(x: Tensor, dy: Tensor, num_taps: int, operations: Operations) -> Tensor:
        return _seen_by(operations, x, dy).correlate(x, dy, num_taps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, dy, _, ctx.operations = inputs
        ctx.save_for_backward(x, dy)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, taps: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if taps is None:
            return None, None, None, None
        x, dy = ctx.saved_tensors
        operations = _again(ctx.operations, x, dy, taps)
        of_x = operations.convolve(dy, taps, True) if ctx.needs_input_grad[0] else None
        of_dy = operations.convolve(x, taps, False) if ctx.needs_input_grad[1] else None
        return of_x, of_dy, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Dims, x: Tensor, dy: Tensor, num_taps: int, operations: Operations
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        x, dy = _signal_by_channel(x, in_dims[0], size), _signal_by_channel(dy, in_dims[1], size)
        return _Correlate.apply(x, dy, num_taps, operations).unflatten(0, (size, -1)), 0


class _Gradients(Function):
    """adjoint(dy, taps) and correlate(x, dy) at once, for the backends in which they share work."""

    @staticmethod
    def forward(x: Tensor, taps: Tensor, dy: Tensor, operations: Operations) -> tuple[Tensor, Tensor]:
        operations = _seen_by(operations, x, taps, dy)
        assert operations.gradients is not None
        return operations.gradients(x, taps, dy)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.operations = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        """u and v are the gradients of dx and of dtaps."""
        x, taps, dy = ctx.saved_tensors
        known = [tensor for tensor in (x, taps, dy, u, v) if tensor is not None]
        operations, needs = _again(ctx.operations, *known), ctx.needs_input_grad
        of_x = operations.convolve(dy, v, True) if needs[0] and v is not None else None
        of_taps = operations.correlate(u, dy, taps.shape[1]).to(taps.dtype) if needs[1] and u is not None else None
        of_dy = operations.convolve(u, taps, False) if needs[2] and u is not None else None
        if needs[2] and v is not None:
            through_taps = operations.convolve(x, v, False)
            of_dy = through_taps if of_dy is None else of_dy + through_taps
        return of_x, of_taps, of_dy, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Dims, x: Tensor, taps: Tensor, dy: Tensor, operations: Operations
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        size = info.batch_size
        x, dy = _signal_by_channel(x, in_dims[0], size), _signal_by_channel(dy, in_dims[2], size)
        dx, dtaps = _Gradients.apply(x, _taps_by_channel(taps, in_dims[1], size), dy, operations)
        return (dx.unflatten(1, (size, -1)), dtaps.unflatten(0, (size, -1))), (1, 0)


def _signal_by_channel(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x (B, C, L), mapped at dim or the same for all, as (B, size*C, L)."""
    x = x.unsqueeze(1).expand(-1, size, -1, -1) if dim is None else x.movedim(dim, 1)
    return x.flatten(1, 2)


def _taps_by_channel(taps: Tensor, dim: int | None, size: int) -> Tensor:
    """Taps (C, n), mapped at dim or the same for all, as (size*C, n)."""
    taps = taps.expand(size, -1, -1) if dim is None else taps.movedim(dim, 0)
    return taps.flatten(0, 1)
