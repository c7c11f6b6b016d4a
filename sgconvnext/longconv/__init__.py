"""The long convolution: one operator, interchangeable backends, chosen by value."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compiled, derivatives, dft, fft, reference, toeplitz
from .backend import Backend
from .choice import choose_backend
from .context import is_recorded
from .precision import without_autocast
from .rows import convolve_rows
from .triton import toeplitz as triton_toeplitz

BACKENDS: dict[str, Backend] = {
    "fft": fft.BACKEND,
    "toeplitz": toeplitz.BACKEND,
    "triton": triton_toeplitz.BACKEND,
    "dft": dft.BACKEND,
    "reference": reference.BACKEND,
}

__all__ = [
    "BACKENDS",
    "Backend",
    "available_backends",
    "check_backend",
    "choose_backend",
    "freeze",
    "long_conv",
    "long_conv_of_open_size",
]


def check_backend(backend: str) -> None:
    """Raise ValueError if the name is not "auto" or one of BACKENDS."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; use one of {', '.join(['auto', *BACKENDS])}")


def available_backends(x: Tensor) -> list[str]:
    """Names of the backends that take x here and now."""
    return [name for name, backend in BACKENDS.items() if backend.refusal(x) is None]


def long_conv(x: Tensor, taps: Tensor, backend: str = "auto") -> Tensor:
    """Depthwise convolution of every channel with taps as long as the signal (arXiv 2210.09298, section 3.1).

        y[b, c, t] = sum_{s=0}^{L-1} K[c, t - s] x[b, c, s]

    Differentiable in x and in the taps to any order, backward and forward, and by torch.func; compiled, once backward.

    Args:
        x: signal (B, C, L), floating point.
        taps: K (C, 2L-1) for the lags -(L-1) .. L-1, or (C, L) for the lags 0 .. L-1 (causal).
        backend: "auto", "fft" (O(L log L), float32 inside), "toeplitz" (matrix product in the dtype of x, O(L^2)),
            "dft" (matrix products in the dtype of x, O(L^1.5)), "triton" (Toeplitz products on a GPU's tensor cores,
            bfloat16 or float16, O(L^2)) or "reference" (the definition, float64, O(L^2)). "auto" is the fastest that
            was measured, see `choose_backend`.

    Returns:
        y (B, C, L) in the dtype of x; by "dft" and "triton", so by "auto" on some GPUs, under autocast in that of
        autocast, as from a convolution.

    Raises:
        ValueError: unknown backend, x not (B, C, L) in floating point, or taps of another shape; "triton" without
            the package, for x on no CUDA device, or for x in full precision without autocast; "fft" in an export to
            ONNX by tracing, whose operators have no FFT.
    """
    check_backend(backend)
    if x.ndim != 3 or x.shape[2] == 0 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; this takes (B, C, L) in floating point, with L at least 1")
    channels, length = x.shape[1:]
    if taps.shape not in ((channels, length), (channels, 2 * length - 1)):
        raise ValueError(
            f"taps are {tuple(taps.shape)}; x {tuple(x.shape)} needs ({channels}, {2 * length - 1}), or "
            f"({channels}, {length}) for a causal convolution"
        )
    backend = choose_backend(x, backend)
    chosen = BACKENDS[backend]
    if reason := chosen.refusal(x):
        raise ValueError(reason)
    x = chosen.prepare(x)
    if chosen.plain and (chosen.operations is None or is_recorded()):
        return chosen.plain(x, taps)
    if torch.compiler.is_compiling():
        chosen = compiled.BACKENDS.get(backend, chosen)
    return derivatives.long_conv(x, taps, chosen)


def long_conv_of_open_size(x: Tensor, taps: Tensor, backend: str = "auto") -> Tensor:
    """`long_conv` of maps (B, C, H, R), row by row, in an export that leaves H or R open.

    Args:
        x: the maps; L = H R.
        taps: as in `long_conv`.
        backend: "auto" and "dft" are products of matrices, see `rows`: O(L (H + R)). "fft", "toeplitz" and
            "reference" are as in `long_conv`.

    Returns:
        y (B, C, H, R).

    Raises:
        ValueError: the backend is "triton", which no export can hold.
    """
    chosen = BACKENDS[choose_backend(x.flatten(2), backend)]
    if chosen.plain is None:
        raise ValueError(f"backend {backend!r} cannot be exported; build the model with backend='auto'")
    x = chosen.prepare(x)
    if chosen is not dft.BACKEND:
        return chosen.plain(x.flatten(2), taps).reshape(x.shape)
    with without_autocast(x):
        missing = 2 * x.shape[2] * x.shape[3] - 1 - taps.shape[-1]
        return convolve_rows(x, F.pad(taps, (missing, 0))).to(x.dtype)


def freeze(taps: Tensor, length: int, dtype: torch.dtype, backend: str) -> Callable[[Tensor], Tensor]:
    """long_conv with fixed taps as a function of x alone, for inference: what depends on the taps is computed once.

    Args:
        taps: as in `long_conv`, without gradient.
        length: L of the signals.
        dtype: of the signals.
        backend: of BACKENDS; where it has nothing to compute once, the function is `long_conv` itself.
    """
    if own := BACKENDS[backend].freeze:
        return own(taps, length, dtype)
    return functools.partial(long_conv, taps=taps, backend=backend)
