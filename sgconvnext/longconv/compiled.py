"""The operations of backends as single operators, which torch.compile does not look into.

A compiler finds nothing to gain in a transform, and compiles the many small steps around it for minutes. As one
operator a convolution also works in the same pieces as without a compiler.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dft, fft, toeplitz
from .backend import Backend, Operations
from .operator import operator

_LOOKED_INTO = {"fft": fft.BACKEND, "toeplitz": toeplitz.BACKEND, "dft": dft.BACKEND}


def _operations(backend: str) -> Operations:
    operations = _LOOKED_INTO[backend].operations
    assert operations is not None
    return operations


def _like_signal(x: Tensor, taps: Tensor, adjoint: bool, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _like_taps(x: Tensor, dy: Tensor, num_taps: int, backend: str) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((num_taps, x.shape[1]), dtype=dtype).t()  # channels last, as taps are


def _like_both(x: Tensor, taps: Tensor, dy: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), _like_taps(x, dy, taps.shape[1], backend)


@operator("long_conv", fake=_like_signal)
def _convolve(x: Tensor, taps: Tensor, adjoint: bool, backend: str) -> Tensor:
    return _operations(backend).convolve(x, taps, adjoint).contiguous()


@operator("long_conv_dtaps", fake=_like_taps)
def _correlate(x: Tensor, dy: Tensor, num_taps: int, backend: str) -> Tensor:
    return _operations(backend).correlate(x, dy, num_taps).t().contiguous().t()


@operator("long_conv_gradients", fake=_like_both)
def _gradients(x: Tensor, taps: Tensor, dy: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    gradients = _operations(backend).gradients
    assert gradients is not None
    dx, dtaps = gradients(x, taps, dy)
    return dx.contiguous(), dtaps.t().contiguous().t()


def _whole(name: str) -> Backend:
    own = _operations(name)
    operations = Operations(
        lambda x, taps, adjoint: _convolve(x, taps, adjoint, name),
        lambda x, dy, num_taps: _correlate(x, dy, num_taps, name),
        own.gradients and (lambda x, taps, dy: _gradients(x, taps, dy, name)),
    )
    return replace(_LOOKED_INTO[name], operations=operations)


BACKENDS = {name: _whole(name) for name in _LOOKED_INTO}  # by name; the others are operators, or the definition


# FLOPs of the two gradients as those of two convolutions, which they are but for spectra that they share.


@register_flop_formula(torch.ops.sgconvnext.long_conv, get_raw=True)
def _convolve_flops(x: Tensor, taps: Tensor, adjoint: bool, backend: str, **_: Any) -> int:
    return _flops(x, taps.shape[1], backend)


@register_flop_formula(torch.ops.sgconvnext.long_conv_dtaps, get_raw=True)
def _correlate_flops(x: Tensor, dy: Tensor, num_taps: int, backend: str, **_: Any) -> int:
    return _flops(x, num_taps, backend)


@register_flop_formula(torch.ops.sgconvnext.long_conv_gradients, get_raw=True)
def _gradients_flops(x: Tensor, taps: Tensor, dy: Tensor, backend: str, **_: Any) -> int:
    return 2 * _flops(x, taps.shape[1], backend)


def _flops(x: Tensor, num_taps: int, backend: str) -> int:
    batch, channels, length = x.shape
    return _LOOKED_INTO[backend].flops(batch, channels, length, num_taps)
