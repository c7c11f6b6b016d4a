"""What a backend of the long convolution is, and the contract that each one keeps."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, dtype


@dataclass(frozen=True, slots=True)
class Operations:
    """What a backend computes below autograd, for signals (B, C, L) of one dtype; `derivatives` does the rest.

    Taps are (C, 2L-1) for the lags -(L-1) .. L-1, or (C, L) for the lags 0 .. L-1.
    """

    # (x, taps, adjoint) -> y in the dtype of x:  y[t] = sum_s K[t - s] x[s];  the adjoint: y[s] = sum_t K[t - s] x[t]
    convolve: Callable[[Tensor, Tensor, bool], Tensor]
    # (x, dy, num_taps) -> the gradient of the taps, in float32 or float64:  K[lag] = sum_{b,t} dy[b, t] x[b, t - lag]
    correlate: Callable[[Tensor, Tensor, int], Tensor]
    # (x, taps, dy) -> convolve(dy, taps, True), correlate(x, dy, num_taps): for backends where the two share work
    gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute the long convolution: with ``operations``, or else with ``plain`` alone.

    To add a backend, write a module that has a ``BACKEND``, and name it in `sgconvnext.longconv.BACKENDS`. Layers, the
    counts of FLOPs and the tests of tests/longconv/test_longconv.py, which check the contract, then know it. Describe
    it in docs/layer.md.

    The contract:
        - The output and both gradients are those of reference.long_conv, up to the rounding of products in the dtype
          of x, for every L >= 1, for two-sided and causal taps, and for tensors that are not contiguous.
        - y has the dtype of x as ``prepare`` returns it; gradients have the dtypes of x and of the taps.
        - The gradient of the taps is summed in float32 (float64 for float64), also where x is in half precision.
        - Autocast does not reach the products (`precision.without_autocast`). Only ``prepare`` may follow autocast.
        - Without images y is empty and the gradient of the taps is zero.
        - Autograd keeps x and the taps, no spectra or matrices. Derivatives of any order and mode, torch.func and
          torch.compile work. `derivatives` ensures both for backends that have ``operations``.
    """

    # (B, C, L, taps per channel) -> FLOPs that one call executes; a multiply-add is two
    flops: Callable[[int, int, int, int], int]
    operations: Operations | None = None
    # (x, taps) -> y in differentiable operators that write nowhere, for tracers, which do not see what is written into
    # a part of a tensor, and for forward mode. Without it tracers see ``operations``, and forward mode runs the FFT's.
    plain: Callable[[Tensor, Tensor], Tensor] | None = None
    # x -> why the backend cannot take it here and now, and the cure; None if it can
    refusal: Callable[[Tensor], str | None] = lambda x: None
    # x -> x in the dtype and layout that the backend computes in; differentiable
    prepare: Callable[[Tensor], Tensor] = lambda x: x
    # (taps, length, dtype of x) -> the convolution with these taps: for backends that can compute a part of it once
    freeze: Callable[[Tensor, int, dtype], Callable[[Tensor], Tensor]] | None = None
