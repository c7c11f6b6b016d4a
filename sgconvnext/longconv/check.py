"""Whether a backend is right: its output and gradients at some places, against the definition in float64.

The whole definition is O(B C L^2). At some places it costs O(B C L) each, so it is affordable at every size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PLACES = 32  # of samples and of lags; the ends are among them, where programs go wrong first
ERRORS = ("y error", "dx error", "dtaps error")


@dataclass(frozen=True)
class Truth:
    """Signals and taps, and what the definition makes of them at some places, in float64.

    Args:
        x, dy: signals (B, C, L), and the gradient of the output.
        taps: (C, 2L-1), for the lags -(L-1) .. L-1.
        wanted: y and the gradients of x and of the taps, at `places`.
    """

    x: Tensor
    taps: Tensor
    dy: Tensor
    wanted: dict[str, Tensor]

    def errors(self, convolve: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
        """ERRORS of a convolution (x, taps) -> y and of its gradients: ||got - want|| / ||want||.

        They are NaN where something is not finite.
        """
        x, taps = self.x.detach().requires_grad_(), self.taps.detach().requires_grad_()
        with torch.enable_grad():
            y = convolve(x, taps)
            dx, dtaps = torch.autograd.grad(y, [x, taps], self.dy.to(y.dtype))
        return self._compared(y, dx, dtaps)

    def error_of_output(self, convolve: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The error of y alone, for a convolution x -> y with these taps."""
        with torch.no_grad():
            return self._compared(convolve(self.x))

    def _compared(self, y: Tensor, dx: Tensor | None = None, dtaps: Tensor | None = None) -> dict[str, float]:
        images, places, lags = _places(self.x, self.taps)
        got = {ERRORS[0]: y[images][..., places]}
        if dx is not None and dtaps is not None:
            got |= {ERRORS[1]: dx[images][..., places], ERRORS[2]: dtaps[:, lags]}
        return {name: relative_error(each, self.wanted[name]) for name, each in got.items()}


@torch.no_grad()
def truth(x: Tensor, taps: Tensor, dy: Tensor) -> Truth:
    """What the definition makes of signals x, dy (B, C, L) and taps (C, 2L-1)."""
    images, places, lags = _places(x, taps)
    found = definition(x[images], taps, places), adjoint(dy[images], taps, places), correlation(x, dy, lags)
    return Truth(x, taps, dy, dict(zip(ERRORS, found, strict=True)))


def _places(x: Tensor, taps: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Two images, and PLACES samples and lags."""
    return some(x.shape[0], 2), some(x.shape[2]), some(taps.shape[1])


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
