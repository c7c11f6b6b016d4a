"""Long convolution on a GPU's tensor cores: a Toeplitz matrix product whose matrix is never built. O(L^2).

For x in half precision on a CUDA device; taps are rounded to the dtype of x. Sums are in float32, always in the same
order. Under autocast x is cast as the input of a convolution is, and y has the dtype of autocast. Every new length or
number of channels has the programs compiled again, which takes seconds.
"""

import importlib.metadata
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backend import Backend, Operations
from ..operator import operator
from ..precision import product_dtype
from .tiles import conv_macs, conv_tile, dtaps_macs, dtaps_tile


def _find_problem() -> str | None:
    """What is wrong with the installed triton, and the cure. It is looked up without being imported."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed; install it"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build of another name
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 3):
        return f"needs triton 3.3 or newer, and {version} is installed; install torch 2.7 or newer"
    return None


_PROBLEM = _find_problem()
_RUNS_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"


def is_usable() -> bool:
    """Whether there is a triton that these programs run with."""
    return _PROBLEM is None


def refusal(x: Tensor) -> str | None:
    """Why this backend cannot take x here and now, and the cure; None if it can."""
    if _PROBLEM:
        return f"backend 'triton' {_PROBLEM}, or use backend='fft'"
    if x.device.type != "cuda" and not (_RUNS_ON_CPU and x.device.type == "cpu"):
        return f"backend 'triton' runs on a CUDA device and x is on {x.device}; move it, or use backend='fft'"
    if product_dtype(x) not in (torch.bfloat16, torch.float16):
        return (
            f"backend 'triton' multiplies in bfloat16 or float16 and x is {x.dtype}; convert it or use autocast, or "
            "use backend='fft'"
        )
    return None


def _prepare(x: Tensor) -> Tensor:
    """x in half precision, contiguous; both in one pass, and no copy where x is so already."""
    return x.to(product_dtype(x), memory_format=torch.contiguous_format).contiguous()


def _like_x(x: Tensor, taps: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@operator("toeplitz_conv", fake=_like_x)
def _conv(x: Tensor, taps: Tensor) -> Tensor:
    from . import programs

    batch, _, length = x.shape
    return programs.convolve(x, taps, length - taps.shape[1], conv_tile(batch, length))


@operator("toeplitz_conv_dx", fake=_like_x)
def _conv_dx(dy: Tensor, taps: Tensor) -> Tensor:
    """The adjoint in x: the convolution by the taps reversed in time."""
    from . import programs

    batch, _, length = dy.shape
    return programs.convolve(dy, taps, 1 - length, conv_tile(batch, length), True)


def _like_taps(dy: Tensor, x: Tensor, num_taps: int) -> Tensor:
    return x.new_empty((x.shape[1], num_taps), dtype=torch.float32)


@operator("toeplitz_conv_dtaps", fake=_like_taps)
def _conv_dtaps(dy: Tensor, x: Tensor, num_taps: int) -> Tensor:
    """The adjoint in the taps, in float32."""
    from . import programs

    batch, _, length = x.shape
    return programs.correlate(x, dy, length - num_taps, dtaps_tile(batch, length))


def _convolve(x: Tensor, taps: Tensor, adjoint: bool) -> Tensor:
    x, taps = x.contiguous(), taps.float()
    y: Tensor = _conv_dx(x, taps) if adjoint else _conv(x, taps)
    return y


def _correlate(x: Tensor, dy: Tensor, num_taps: int) -> Tensor:
    dtaps: Tensor = _conv_dtaps(dy.contiguous(), x, num_taps)
    return dtaps


def _gradients(x: Tensor, taps: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()  # once for both
    return _convolve(dy, taps, True), _correlate(x, dy, taps.shape[1])


# FLOPs of what the tensor cores multiply: with the zeros that fill tiles up to their size, without the tiles that only
# hold lags of no tap.


def _flops(batch: int, channels: int, length: int, num_taps: int) -> int:
    return 2 * conv_macs(batch, channels, length, length - num_taps, length - 1)


@register_flop_formula(torch.ops.sgconvnext.toeplitz_conv, get_raw=True)
def _conv_flops(x: Tensor, taps: Tensor, *_: Any, **__: Any) -> int:
    batch, channels, length = x.shape
    return _flops(batch, channels, length, taps.shape[1])


@register_flop_formula(torch.ops.sgconvnext.toeplitz_conv_dx, get_raw=True)
def _conv_dx_flops(dy: Tensor, taps: Tensor, *_: Any, **__: Any) -> int:
    batch, channels, length = dy.shape
    return 2 * conv_macs(batch, channels, length, 1 - length, taps.shape[1] - length)


@register_flop_formula(torch.ops.sgconvnext.toeplitz_conv_dtaps, get_raw=True)
def _conv_dtaps_flops(dy: Tensor, x: Tensor, num_taps: int, *_: Any, **__: Any) -> int:
    batch, channels, length = x.shape
    return 2 * dtaps_macs(batch, channels, length, length - num_taps)


BACKEND = Backend(_flops, Operations(_convolve, _correlate, _gradients), refusal=refusal, prepare=_prepare)
