"""Whether a backend is right: its output and gradients at some places, against the definition in float64.

The whole definition is O(B C L^2). At some places it costs O(B C L) each, so it is affordable at every size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

PLACES = 32  # of samples and of lags; the ends are among them, where programs go wrong first
ERRORS = ("y error", "dx error", "dtaps error")

Convolve = Callable[[Tensor, Tensor], Tensor]  # (x, taps) -> y


def errors(convolve: Convolve, x: Tensor, taps: Tensor, dy: Tensor) -> dict[str, float]:
    """ERRORS of y and of the gradients of x and of the taps: ||got - want|| / ||want|| at PLACES places, in float64.

    Args:
        convolve: what is checked.
        x, dy: signals (B, C, L).
        taps: (C, 2L-1), for the lags -(L-1) .. L-1.

    Returns:
        by name; NaN where something is not finite.
    """
    x, taps = x.detach().requires_grad_(), taps.detach().requires_grad_()
    with torch.enable_grad():
        y = convolve(x, taps)
        dx, dtaps = torch.autograd.grad(y, [x, taps], dy.to(y.dtype))
    places, lags = some(x.shape[2]), some(taps.shape[1])
    images = some(x.shape[0], 2)
    with torch.no_grad():
        pairs = (
            (y[images][..., places], definition(x[images], taps, places)),
            (dx[images][..., places], adjoint(dy[images], taps, places)),
            (dtaps[:, lags], correlation(x, dy, lags)),
        )
        return {name: relative_error(got, want) for name, (got, want) in zip(ERRORS, pairs, strict=True)}


def error_of_output(convolve: Callable[[Tensor], Tensor], x: Tensor, taps: Tensor) -> dict[str, float]:
    """The error of y alone, for convolutions whose taps are fixed; as `errors`."""
    images, places = some(x.shape[0], 2), some(x.shape[2])
    with torch.no_grad():
        return {ERRORS[0]: relative_error(convolve(x)[images][..., places], definition(x[images], taps, places))}


def some(size: int, most: int = PLACES) -> list[int]:
    """So many of ``range(size)``, evenly from the first to the last, or all."""
    count = min(size, most)
    return [round(i * (size - 1) / max(1, count - 1)) for i in range(count)]


def definition(x: Tensor, taps: Tensor, places: list[int]) -> Tensor:
    """y[t] = sum_s K[t - s] x[s] (B, C, places) for t of places."""
    x, taps, length = x.double(), taps.double(), x.shape[2]
    return torch.stack([(x * taps[:, t : t + length].flip(-1)).sum(-1) for t in places], -1)


def adjoint(dy: Tensor, taps: Tensor, places: list[int]) -> Tensor:
    """dx[s] = sum_t K[t - s] dy[t] (B, C, places) for s of places."""
    dy, taps, length = dy.double(), taps.double(), dy.shape[2]
    first = length - 1
    return torch.stack([(dy * taps[:, first - s : first - s + length]).sum(-1) for s in places], -1)


def correlation(x: Tensor, dy: Tensor, lags: list[int]) -> Tensor:
    """dK[lag] = sum_{b,t} dy[b, t] x[b, t - lag] (C, lags), for the lags' places in taps."""
    length, found = x.shape[2], []
    for place in lags:
        lag = place - (length - 1)
        first, last = max(0, lag), min(length, length + lag)
        found.append((dy[..., first:last].double() * x[..., first - lag : last - lag].double()).sum((0, 2)))
    return torch.stack(found, -1)


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN where something is not finite."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())
