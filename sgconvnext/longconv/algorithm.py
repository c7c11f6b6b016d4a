"""What a backend of the long convolution is: two operations on signals (B, C, L) and taps.

Taps are (C, 2L-1) for the lags -(L-1) .. L-1, or (C, L) for the lags 0 .. L-1.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How a backend computes what `derivatives` differentiates. Only ``prepare`` and ``plain`` must be differentiable.

    x and dy always have one dtype. Products leave autocast, and without images taps are zero.
    """

    # (x, taps, adjoint) -> y in the dtype of x:  y[t] = sum_s K[t - s] x[s];  the adjoint: y[s] = sum_t K[t - s] x[t]
    convolve: Callable[[Tensor, Tensor, bool], Tensor]
    # (x, dy, num_taps) -> the gradient of the taps, in float32 or float64:  K[lag] = sum_{b,t} dy[b, t] x[b, t - lag]
    correlate: Callable[[Tensor, Tensor, int], Tensor]
    # (x, taps, dy) -> adjoint(dy, taps), correlate(x, dy): where the two share work
    gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    # x -> x as the operations take it, or a refusal
    prepare: Callable[[Tensor], Tensor] | None = None
    # (x, taps) -> y in operators that write nowhere: a tracer does not see what is written into a part of a tensor
    plain: Callable[[Tensor, Tensor], Tensor] | None = None
