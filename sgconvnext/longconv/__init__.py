"""The long convolution: one operator, interchangeable backends, chosen by value."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import derivatives, dft, fft, reference, toeplitz
from .choice import choose_backend, choose_matrix_backend
from .triton import toeplitz as triton_toeplitz

ALGORITHMS = {
    "fft": fft.ALGORITHM,
    "toeplitz": toeplitz.ALGORITHM,
    "triton": triton_toeplitz.ALGORITHM,
    "dft": dft.ALGORITHM,
}
BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: functools.partial(derivatives.long_conv, algorithm=algorithm) for name, algorithm in ALGORITHMS.items()},
    "reference": reference.long_conv,
}
_PLAIN = {name: algorithm.plain for name, algorithm in ALGORITHMS.items() if algorithm.plain}
_FREEZE = {"fft": fft.freeze, "toeplitz": toeplitz.freeze}

__all__ = ["BACKENDS", "available_backends", "check_backend", "choose_backend", "freeze", "long_conv"]


def check_backend(backend: str) -> None:
    """Raise ValueError if the name is not "auto" or one of BACKENDS."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; use one of {', '.join(['auto', *BACKENDS])}")


def available_backends(x: Tensor) -> list[str]:
    """Those that take x: all but "triton" take any."""
    return [name for name in BACKENDS if name != "triton" or triton_toeplitz.refusal(x) is None]


def long_conv(x: Tensor, taps: Tensor, backend: str = "auto") -> Tensor:
    """Depthwise convolution of every channel with taps as long as the signal (arXiv 2210.09298, section 3.1).

        y[b, c, t] = sum_{s=0}^{L-1} K[c, t - s] x[b, c, s]

    Differentiable in x and in the taps to any order, backward and forward, and by torch.func; compiled, once backward.

    Args:
        x: signal (B, C, L), floating point.
        taps: K (C, 2L-1) for the lags -(L-1) .. L-1, or (C, L) for the lags 0 .. L-1 (causal).
        backend: "auto", "fft" (O(L log L), float32 inside), "toeplitz" (matrix product in the dtype of x, O(L^2)),
            "dft" (matrix products in the dtype of x, O(L^1.5)), "triton" (Toeplitz products on a GPU's tensor cores,
            bfloat16 or float16, O(L^2)) or "reference" (the definition, float64, O(L^2)). "auto" does not choose "dft"
            and "triton", which are for GPUs, until they have been timed there.

    Returns:
        y (B, C, L) in the dtype of x; by "dft" and "triton" under autocast in that of autocast, as from a convolution.

    Raises:
        ValueError: unknown backend, x not (B, C, L) in floating point, or taps of another shape; "triton" without
            the package, for x on no CUDA device, or for x in full precision without autocast; "fft" in an export by
            TorchScript to ONNX, which has no FFT that it knows.
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
    if not is_recorded():
        return BACKENDS[choose_backend(x) if backend == "auto" else backend](x, taps)
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        if backend == "fft":
            raise ValueError(
                "backend 'fft' cannot be exported to ONNX with dynamo=False, which has no FFT; build the model with "
                "backend='auto' or 'dft', or export it with dynamo=True"
            )
        backend = choose_matrix_backend(x) if backend == "auto" else backend
    backend = choose_backend(x) if backend == "auto" else backend
    return _PLAIN.get(backend, BACKENDS[backend])(x, taps)


def is_recorded() -> bool:
    """Whether something writes down the operators that run, to run them again: jit.trace, torch.export, make_fx."""
    if torch.compiler.is_compiling() and not _is_exporting():
        return False
    return torch.jit.is_tracing() or _is_exporting() or get_proxy_mode() is not None


def _is_exporting() -> bool:
    asked = getattr(torch.compiler, "is_exporting", None)  # torch 2.6 has it not, and runs what it compiles
    return asked is not None and asked()


def freeze(taps: Tensor, length: int, dtype: torch.dtype, backend: str) -> Callable[[Tensor], Tensor]:
    """long_conv with fixed taps as a function of x alone, for inference: what depends on the taps is computed once.

    Args:
        taps: as in `long_conv`, without gradient.
        length: L of the signals.
        dtype: of the signals.
        backend: of BACKENDS; where it has nothing to compute once, the function is `long_conv` itself.
    """
    if backend in _FREEZE:
        return _FREEZE[backend](taps, length, dtype)
    return functools.partial(long_conv, taps=taps, backend=backend)
