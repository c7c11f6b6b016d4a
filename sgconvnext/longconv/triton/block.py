"""The block's layer norm and residual sum as Triton programs that change the layout on their way, for CUDA.

The long convolution wants tokens innermost, (B, C, L), and the MLP channels innermost, (B, L, C). The norm before the
MLP and the residual sum after it touch every element anyway. They read one layout and write the other, so that the two
transposes are free. Sums and statistics are in float32, and sums over tokens have the same bits in every run.

Letters: B batch, C channels, L tokens. The programs are in `block_programs`, which is imported when one first runs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..operator import operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPOKEN = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def layer_norm_channels_last(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Layer norm over the channels of (B, C, L), written as (B, L, C).

        y[b, l, c] = weight[c] (x[b, c, l] - mean[b, l]) / sqrt(var[b, l] + eps) + bias[c]

    Differentiable in x, weight and bias, to any order.

    Args:
        x: (B, C, L) in float32, bfloat16 or float16; copied first unless it is contiguous.
        weight, bias: (C).
        eps: added to the variance, which is the mean of the squared deviations.
        dtype: of y; None for that of x.

    Returns:
        y (B, L, C), contiguous.

    Raises:
        ValueError: other shapes or dtypes.
    """
    _check_map("x", x)
    _check_vector("weight", weight, x.shape[1], "C")
    _check_vector("bias", bias, x.shape[1], "C")
    dtype = x.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}; y can be {_SPOKEN}")
    norm = (x, weight, bias, eps, dtype)
    y: Tensor = _norm(*norm)[0] if torch.jit.is_tracing() else _Norm.apply(*norm)  # a trace has no Functions
    return y


def scale_residual_channels_first(
    shortcut: Tensor, y: Tensor, gamma: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """Add a branch (B, L, C), scaled, to its shortcut (B, C, L).

        out[b, c, l] = shortcut[b, c, l] + keep[b] gamma[c] y[b, l, c]

    Differentiable in shortcut, y and gamma, to any order.

    Args:
        shortcut: (B, C, L) in float32, bfloat16 or float16; copied first unless it is contiguous.
        y: (B, L, C), likewise.
        gamma: layer scale (C); None for 1.
        keep: drop path's factor (B): 0, or 1 / (1 - the probability of a drop); None for 1.

    Returns:
        out (B, C, L) in the dtype of shortcut, contiguous.

    Raises:
        ValueError: other shapes or dtypes, or keep requires a gradient.
    """
    return residual_and_copy(shortcut, y, gamma, keep, None)[0]


def residual_and_copy(
    shortcut: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """`scale_residual_channels_first`, and the same once more in a dtype (None: no copy, but an empty tensor).

    The next convolution reads the copy, which so takes no pass of its own, forward or backward.
    """
    _check_map("shortcut", shortcut)
    _check_map("y", y)
    batch, channels, length = shortcut.shape
    if y.shape != (batch, length, channels):
        raise ValueError(
            f"y is {tuple(y.shape)}; a shortcut of {tuple(shortcut.shape)} needs ({batch}, {length}, {channels})"
        )
    if gamma is not None:
        _check_vector("gamma", gamma, channels, "C")
    if keep is not None:
        _check_vector("keep", keep, batch, "B")
        if keep.requires_grad:
            raise ValueError("keep requires a gradient, and has none here: pass keep.detach()")
    add = _residual if torch.jit.is_tracing() else _Residual.apply  # a trace has no Functions
    sums: tuple[Tensor, Tensor] = add(shortcut, y, gamma, keep, dtype)
    return sums


def _check_map(name: str, x: Tensor) -> None:
    if x.ndim != 3 or x.dtype not in DTYPES:
        raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}; this takes three dimensions of {_SPOKEN}")
    if x.shape[1] * x.shape[2] >= 2**31:
        raise ValueError(f"{name} is {tuple(x.shape)}; a sample must have fewer than 2^31 elements: split it")


def _check_vector(name: str, vector: Tensor, size: int, letter: str) -> None:
    if vector.shape != (size,) or vector.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {tuple(vector.shape)} {vector.dtype}; {letter}={size} needs ({size},) of {_SPOKEN}"
        )


def _like_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, channels, length = x.shape
    return x.new_empty((batch, length, channels), dtype=dtype), x.new_empty((2, batch, length), dtype=torch.float32)


@operator("layer_norm_channels_last", fake=_like_norm)
def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from . import block_programs

    return block_programs.norm(x, weight, bias, eps, dtype)


def _like_norm_gradients(dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), dweight, dbias


@operator("layer_norm_channels_last_backward", fake=_like_norm_gradients)
def _norm_gradients(dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from . import block_programs

    return block_programs.norm_gradients(dy, x, weight, stats)


class _Norm(Function):
    """`_norm` with a derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y, stats = _norm(x, weight, bias, eps, dtype)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        ctx.save_for_backward(x, weight, stats)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, stats = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates again
            dx, dweight, dbias = _plain_norm_gradients(dy, x, weight, ctx.eps)
        else:
            dx, dweight, dbias = _norm_gradients(dy, x, weight, stats)
        return dx, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None


def _plain_norm_gradients(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `_norm_gradients` computes, in differentiable operators."""
    u, g = x.float(), dy.transpose(1, 2).float()
    u = u - u.mean(1, keepdim=True)
    rstd = (u.square().mean(1, keepdim=True) + eps).rsqrt()
    u, scaled = u * rstd, g * weight.float()[:, None]
    dx = rstd * (scaled - scaled.mean(1, keepdim=True) - u * (scaled * u).mean(1, keepdim=True))
    return dx.to(x.dtype), (g * u).sum((0, 2)), g.sum((0, 2))


def _like_residual(
    shortcut: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, copy: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    copied = shortcut.new_empty(0) if copy is None else shortcut.new_empty(shortcut.shape, dtype=copy)
    return shortcut.new_empty(shortcut.shape), copied


@operator("scale_residual_channels_first", fake=_like_residual)
def _residual(
    shortcut: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, copy: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    from . import block_programs

    return block_programs.residual(shortcut, y, gamma, keep, copy)


def _like_residual_gradients(
    dout: Tensor,
    dcopy: Tensor | None,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, length = dout.shape
    dgamma = dout.new_empty(0 if y is None else channels, dtype=torch.float32)
    dshortcut = dout.new_empty(0 if dcopy is None else dout.shape)
    return dshortcut, dout.new_empty((batch, length, channels), dtype=dtype), dgamma


@operator("scale_residual_channels_first_backward", fake=_like_residual_gradients)
def _residual_gradients(
    dout: Tensor,
    dcopy: Tensor | None,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import block_programs

    return block_programs.residual_gradients(dout, dcopy, y, gamma, keep, dtype)


class _Residual(Function):
    """`_residual` with a derivative."""

    @staticmethod
    def forward(
        ctx: Any, shortcut: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, copy: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        ctx.dtype, ctx.copied = y.dtype, copy is not None
        # y is the largest of them, and only the gradient of gamma needs it
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gamma, keep)
        out, copied = _residual(shortcut, y, gamma, keep, copy)
        if copy is None:
            ctx.mark_non_differentiable(copied)
        return out, copied

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor, dcopy: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        y, gamma, keep = ctx.saved_tensors
        dcopy = dcopy if ctx.copied else None
        if torch.is_grad_enabled() or not any(ctx.needs_input_grad[1:3]):  # somebody may differentiate again
            dshortcut = dout if dcopy is None else dout + dcopy.to(dout.dtype)
            if not any(ctx.needs_input_grad[1:3]):
                return dshortcut, None, None, None, None
            dy, dgamma = _plain_residual_gradients(dshortcut, y, gamma, keep, ctx.dtype)
        else:
            dshortcut, dy, dgamma = _residual_gradients(dout, dcopy, y, gamma, keep, ctx.dtype)
            dshortcut = dout if dcopy is None else dshortcut
        return dshortcut, dy, None if y is None else dgamma.to(gamma.dtype), None, None


def _plain_residual_gradients(
    dout: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `_residual_gradients` computes, in differentiable operators."""
    g = dout.transpose(1, 2).float()
    g = g if keep is None else g * keep.float()[:, None, None]
    dgamma = g.new_empty(0) if y is None else (g * y.float()).sum((0, 1))
    return (g if gamma is None else g * gamma.float()).to(dtype), dgamma
