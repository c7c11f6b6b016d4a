"""FLOPs for torch.utils.flop_counter.FlopCounterMode, which by itself sees nothing of an FFT.

Importing this module, as ``import sgconvnext`` does, adds the formulas that torch lacks: real and complex transforms,
complex products, and linear interpolation, forward and backward. They hold for every model that runs in the process.
Products of matrices are counted by torch. A backend with operators of its own registers formulas beside them.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import cost


def _real_forward(x: Tensor, dim: list[int], *_: Any, **__: Any) -> int:
    return _transforms(x.shape, dim, math.prod(x.shape[axis] for axis in dim))


def _real_inverse(x: Tensor, dim: list[int], normalization: int, last: int, *_: Any, **__: Any) -> int:
    return _transforms(x.shape, dim, math.prod(x.shape[axis] for axis in dim[:-1]) * last)


def _complex(x: Tensor, dim: list[int], *_: Any, **__: Any) -> int:
    return 2 * _real_forward(x, dim)


def _transforms(shape: torch.Size, dim: list[int], n: int) -> int:
    """All transforms of n points, over one dimension or several, in a tensor of that shape."""
    axes = {axis % len(shape) for axis in dim}
    return math.prod(size for axis, size in enumerate(shape) if axis not in axes) * cost.real_fft(n)


def _product(x: Any, y: Any, *_: Any, out_val: Tensor, **__: Any) -> int:
    """FLOPs of complex products alone: FlopCounterMode leaves elementwise products of real numbers out."""
    complex_pair = all(isinstance(factor, Tensor) and factor.is_complex() for factor in (x, y))
    return cost.COMPLEX_PRODUCT * out_val.numel() if complex_pair else 0


def _interpolation(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return cost.linear_interpolation(out_val.numel())


def _interpolation_backward(dy: Tensor, *_: Any, **__: Any) -> int:
    return cost.linear_interpolation(dy.numel())


def _bilinear(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return cost.image_interpolation(x.shape[2], out_val.shape)


def _bilinear_backward(dy: Tensor, _: Any, size: list[int], *__: Any, **___: Any) -> int:
    return cost.image_interpolation(size[2], dy.shape)


FORMULAS: dict[Any, Any] = {
    torch.ops.aten._fft_r2c: _real_forward,
    torch.ops.aten._fft_c2r: _real_inverse,
    torch.ops.aten._fft_c2c: _complex,
    torch.ops.aten.mul: _product,
    torch.ops.aten.mul_: _product,
    torch.ops.aten.upsample_linear1d: _interpolation,
    torch.ops.aten.upsample_linear1d_backward: _interpolation_backward,
    torch.ops.aten.upsample_bilinear2d: _bilinear,
    torch.ops.aten.upsample_bilinear2d_backward: _bilinear_backward,
}
for _operator, _formula in FORMULAS.items():
    if _operator not in flop_registry:  # a later torch may bring its own
        register_flop_formula(_operator, get_raw=True)(_formula)
