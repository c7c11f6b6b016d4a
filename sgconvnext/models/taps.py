"""The taps of a multi-scale kernel as one operator of its parameters, and their gradients as another.

On CUDA each is one Triton program. As `kernel` defines them they are some thirty programs a layer forward and sixty
backward, each of which is shorter than its launch. Sums have the same bits in every run, unlike those of torch's
interpolation on CUDA. On a CPU `sparse_taps` makes them in one pass. To a compiler they are one operator on
every device: the small steps would take it minutes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..longconv.context import is_compiled_transform, is_recorded, is_transformed, runs_eagerly_on_cpu
from ..longconv.operator import operator
from ..longconv.triton.toeplitz import is_usable
from .kernel import KernelOptions, kernel_options
from .sparse_taps import make_taps, plain_weight_gradient, weight_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(*parameters: Tensor) -> bool:
    """Whether `multiscale_taps` is to be used: no transform, tracer or, on a CPU, counter of FLOPs is at work."""
    if not all(p.dtype in DTYPES for p in parameters):
        return False
    if runs_eagerly_on_cpu(*parameters):
        return True
    if is_recorded():
        return False
    if torch.compiler.is_compiling():
        return not is_compiled_transform()
    plain = all(type(p) in (Tensor, torch.nn.Parameter) and p.is_cuda for p in parameters)
    return plain and is_usable() and not is_transformed()


def multiscale_taps(
    weight: Tensor,
    skip: Tensor,
    norm: Tensor,
    length: int,
    alpha: tuple[float, float],
    exponent: float | None,
) -> Tensor:
    """K by lag of Eq. 1: `lag_taps(multiscale_kernel(weight, ...) / norm, skip)` of `kernel`.

    Differentiable in weight and skip, to any order.

    Args:
        weight: (directions, N, C, d), in one of DTYPES.
        skip: D of the paper (C).
        norm: Z of Eq. 1 (directions, C, 1), a constant.
        length: L.
        alpha: decay per scale of the first and the last channel.
        exponent: of decay by position, in whose place alpha has no effect; None for decay by scale.

    Returns:
        (C, 2L-1) for two directions, (C, L) for one, in float32.
    """
    made: Tensor = _Taps.apply(weight, skip, norm, length, *alpha, exponent)
    return made


def _options(first_alpha: float, last_alpha: float, exponent: float | None) -> KernelOptions:
    decay = "scale" if exponent is None else "position"
    return kernel_options(decay, (first_alpha, last_alpha), exponent or 0.0)


def _runs_triton(x: Tensor) -> bool:
    return x.is_cuda and is_usable()


def _like_taps(
    weight: Tensor, skip: Tensor, norm: Tensor, length: int, first_alpha: float, last_alpha: float, exponent: Any
) -> Tensor:
    num_taps, channels = weight.shape[0] * (length - 1) + 1, weight.shape[2]
    if _runs_triton(weight):
        return weight.new_empty((channels, num_taps), dtype=torch.float32)
    return weight.new_empty((num_taps, channels), dtype=torch.float32).t()


def _make(
    weight: Tensor,
    skip: Tensor,
    norm: Tensor,
    length: int,
    first_alpha: float,
    last_alpha: float,
    exponent: float | None,
) -> Tensor:
    if _runs_triton(weight):
        from ..longconv.triton import kernel_programs

        return kernel_programs.taps(weight, skip, norm, length, (first_alpha, last_alpha), exponent)
    return make_taps(weight.float(), skip.float(), norm.float(), length, _options(first_alpha, last_alpha, exponent))


_taps = operator("multiscale_taps", fake=_like_taps)(_make)


def _like_parameters(dtaps: Tensor, norm: Tensor, num_scales: int, scale_dim: int, *_: Any) -> Tensor:
    return dtaps.new_empty((norm.shape[0], num_scales, norm.shape[1], scale_dim))


def _differentiate(
    dtaps: Tensor,
    norm: Tensor,
    num_scales: int,
    scale_dim: int,
    length: int,
    first_alpha: float,
    last_alpha: float,
    exponent: float | None,
) -> Tensor:
    """The adjoint in the weight, in float32."""
    shape = norm.shape[0], num_scales, norm.shape[1], scale_dim
    if _runs_triton(dtaps):
        from ..longconv.triton import kernel_programs

        return kernel_programs.parameters(dtaps, norm, shape, length, (first_alpha, last_alpha), exponent)
    options = _options(first_alpha, last_alpha, exponent)
    return weight_gradient(dtaps.float(), norm.float(), num_scales, scale_dim, options)


_parameters = operator("multiscale_taps_backward", fake=_like_parameters)(_differentiate)


# No *options in these: where nothing needs a gradient, torch's compiler leaves ctx out of a forward that has them.


class _Taps(Function):
    """`_taps` with a derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        skip: Tensor,
        norm: Tensor,
        length: int,
        first_alpha: float,
        last_alpha: float,
        exponent: float | None,
    ) -> Tensor:
        ctx.save_for_backward(norm)
        ctx.shape, ctx.dtypes = weight.shape, (weight.dtype, skip.dtype)
        ctx.options = length, first_alpha, last_alpha, exponent
        make = _make if runs_eagerly_on_cpu(weight) else _taps  # whose dispatch takes as long as two small sums
        made: Tensor = make(weight, skip, norm, length, first_alpha, last_alpha, exponent)
        return made

    @staticmethod
    def backward(ctx: Any, dtaps: Tensor) -> tuple[Tensor | None, ...]:
        (norm,) = ctx.saved_tensors
        dweight = dskip = None
        if ctx.needs_input_grad[0]:
            dweight = _adjoint(dtaps, norm, ctx.shape[1], ctx.shape[3], *ctx.options).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            lag_0 = 0 if ctx.shape[0] == 1 else ctx.options[0] - 1
            dskip = dtaps[:, lag_0].to(ctx.dtypes[1])
        return dweight, dskip, None, None, None, None, None


def _adjoint(dtaps: Tensor, norm: Tensor, num_scales: int, scale_dim: int, length: int, *options: Any) -> Tensor:
    """The gradient of the weight, in a form that can itself be differentiated and transformed where that is asked."""
    found: Tensor
    if torch.compiler.is_compiling():
        found = _parameters(dtaps, norm, num_scales, scale_dim, length, *options)
    elif is_transformed():
        found = plain_weight_gradient(dtaps.float(), norm.float(), num_scales, scale_dim, _options(*options))
    elif torch.is_grad_enabled():
        found = _Parameters.apply(dtaps, norm, num_scales, scale_dim, length, *options)
    else:
        differentiate = _differentiate if runs_eagerly_on_cpu(dtaps) else _parameters
        found = differentiate(dtaps, norm, num_scales, scale_dim, length, *options)
    return found


class _Parameters(Function):
    """`_parameters` with a derivative: both are linear, so it is `_taps`."""

    @staticmethod
    def forward(
        ctx: Any,
        dtaps: Tensor,
        norm: Tensor,
        num_scales: int,
        scale_dim: int,
        length: int,
        first_alpha: float,
        last_alpha: float,
        exponent: float | None,
    ) -> Tensor:
        ctx.save_for_backward(norm)
        ctx.options = options = length, first_alpha, last_alpha, exponent
        dweight: Tensor = _parameters(dtaps, norm, num_scales, scale_dim, *options)
        return dweight

    @staticmethod
    def backward(ctx: Any, ddweight: Tensor) -> tuple[Tensor | None, ...]:
        (norm,) = ctx.saved_tensors
        nothing = ddweight.new_zeros(ddweight.shape[2])
        return _Taps.apply(ddweight, nothing, norm, *ctx.options), *[None] * 7
