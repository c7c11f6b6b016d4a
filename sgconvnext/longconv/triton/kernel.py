"""The taps of a multi-scale kernel, made of its parameters by one Triton program, and their gradients by another.

What `sgconvnext.models.kernel` defines in torch's operators takes a GPU some thirty programs a layer forward and sixty
backward, each of which is shorter than its launch. Sums have the same bits in every run, unlike those of torch's
interpolation on CUDA.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..context import is_in_forward_mode, is_recorded, is_transformed
from ..operator import operator
from .toeplitz import is_usable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(*parameters: Tensor) -> bool:
    """Whether `multiscale_taps` can be used here and now: on CUDA, and no transform or tracer is at work."""
    if not all(p.device.type == "cuda" and p.dtype in DTYPES for p in parameters) or not is_usable():
        return False
    if torch.compiler.is_compiling():
        return not is_recorded()
    plain = all(type(p) in (Tensor, torch.nn.Parameter) for p in parameters)
    return plain and not (is_recorded() or is_transformed() or is_in_forward_mode())


def multiscale_taps(
    weight: Tensor,
    skip: Tensor,
    norm: Tensor,
    length: int,
    alpha: tuple[float, float],
    exponent: float | None,
) -> Tensor:
    """K by lag of Eq. 1: `lag_taps(multiscale_kernel(weight, ...) / norm, skip)` of `sgconvnext.models.kernel`.

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


def _constants(first_alpha: float, last_alpha: float, exponent: float | None) -> dict[str, Any]:
    return {"INVERSE_FIRST": 1 / first_alpha, "INVERSE_LAST": 1 / last_alpha, "EXPONENT": exponent}


def _like_taps(
    weight: Tensor, skip: Tensor, norm: Tensor, length: int, first_alpha: float, last_alpha: float, exponent: Any
) -> Tensor:
    num_directions, num_channels = weight.shape[0], weight.shape[2]
    return weight.new_empty((num_channels, num_directions * (length - 1) + 1), dtype=torch.float32)


@operator("multiscale_taps", fake=_like_taps)
def _taps(
    weight: Tensor,
    skip: Tensor,
    norm: Tensor,
    length: int,
    first_alpha: float,
    last_alpha: float,
    exponent: float | None,
) -> Tensor:
    from . import kernel_programs

    return kernel_programs.taps(weight, skip, norm, length, _constants(first_alpha, last_alpha, exponent))


def _like_parameters(dtaps: Tensor, norm: Tensor, num_scales: int, scale_dim: int, *_: Any) -> Tensor:
    return dtaps.new_empty((norm.shape[0], num_scales, norm.shape[1], scale_dim))


@operator("multiscale_taps_backward", fake=_like_parameters)
def _parameters(
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
    from . import kernel_programs

    shape = norm.shape[0], num_scales, norm.shape[1], scale_dim
    return kernel_programs.parameters(dtaps, norm, shape, length, _constants(first_alpha, last_alpha, exponent))


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
        made: Tensor = _taps(weight, skip, norm, length, first_alpha, last_alpha, exponent)
        return made

    @staticmethod
    def backward(ctx: Any, dtaps: Tensor) -> tuple[Tensor | None, ...]:
        (norm,) = ctx.saved_tensors
        dweight = dskip = None
        if ctx.needs_input_grad[0]:
            again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            adjoint = _Parameters.apply if again else _parameters
            dweight = adjoint(dtaps, norm, ctx.shape[1], ctx.shape[3], *ctx.options).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            lag_0 = 0 if ctx.shape[0] == 1 else ctx.options[0] - 1
            dskip = dtaps[:, lag_0].to(ctx.dtypes[1])
        return dweight, dskip, None, None, None, None, None


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
