"""Token-by-token outputs of a causal SGConv from what it has seen (arXiv 2210.09298, section 3.2).

    y[t] = sum_{j=0}^{t} k[j] x[t - j] + D x[t]

Read as it stands, a step costs t products per channel. But the far taps are piecewise linear: scale i >= 2 has d
parameters and 2^(i-1) d taps. With the running sums of running sums

    S[t] = sum_{s=0}^{t} sum_{r=0}^{s} x[r]

and second differences, which are zero but for two taps at every bend and two where a scale begins,

    sum_j k[j] x[t - j] = sum_j (k[j] - 2 k[j-1] + k[j-2]) S[t - j]

So a scale costs 2 d + 2 products, however long it is. The sums are kept in float64. They grow with the square of the
tokens if the inputs have a mean: after 100,000 inputs of mean 10 a step is right to 3e-7, after a million to 1e-5. For
float64 layers that is less than forward gives.

Letters: B batch, C channels, T tokens so far, h heads, N scales, d taps per scale.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..longconv import long_conv
from ..models.generator import in_full
from ..models.kernel import lag_taps, multiscale_kernel
from .cache import Cache

if TYPE_CHECKING:
    from .layer import SGConv

DIRECT = 3  # scales whose taps are read one by one: the third has two taps for each parameter, so sums save nothing


class Bends:
    """The taps of a causal layer, as a step reads them. They are those of the layer's parameters at this moment.

    Attributes:
        near: taps that are read one by one (n, h, C), the last lag first.
        lags: of the sums that are read (m).
        changes: second differences of the far taps (m, h, C), in float64.
    """

    def __init__(self, layer: "SGConv") -> None:
        num_direct, self.lags = _structure(layer)
        by_head = (layer.heads, layer.channels)
        taps = layer.built_taps() if not len(self.lags) else _first_taps(layer, num_direct)
        self.near = taps.detach().unflatten(0, by_head).permute(2, 0, 1).contiguous().flip(0)
        parts = [_changes(layer, self.lags, num_direct, *chunk) for chunk in layer.chunks()] if len(self.lags) else []
        self.changes = torch.cat(parts, dim=-1) if parts else self.near.new_empty(0, *by_head, dtype=torch.float64)


def _first_taps(layer: "SGConv", num: int) -> Tensor:
    """The first taps (h C, num) of a causal layer."""
    kernel = multiscale_kernel(in_full(layer.weight.detach()), num, layer.options) / layer.kernel_norm
    return lag_taps(kernel.reshape(1, -1, num), layer.skip.detach())


def _changes(layer: "SGConv", lags: Tensor, num_direct: int, first: int, last: int) -> Tensor:
    """Second differences of the far taps (m, h, channels of a chunk) at these lags.

    They are made in float64, for a bend is the small difference of its neighbours.
    """
    weight, norm = layer.weight.detach()[:, :, first:last].double(), layer.kernel_norm[:, first:last].double()
    kernel = multiscale_kernel(weight, layer.length, layer.options_of(first, last)).permute(2, 0, 1)  # (L, h, C)
    taps = [torch.where((lags - back < num_direct)[:, None, None], 0.0, kernel[lags - back]) for back in range(3)]
    return (taps[0] - 2 * taps[1] + taps[2]) / norm.permute(2, 0, 1)


def _structure(layer: "SGConv") -> tuple[int, Tensor]:
    """How many taps are read one by one, and the lags at which the second difference of the others is not zero.

    With decay by position, of every r-th token, and after `reparameterize`, when the scales are not known any more,
    all are read.
    """
    nothing = torch.empty(0, dtype=torch.long)
    if layer.taps is not None or layer.options.decay == "position" or layer.subsample > 1:
        return layer.longest, nothing
    num_scales, size = layer.weight.shape[1], layer.weight.shape[3]
    lags = []
    for i in range(DIRECT, num_scales):
        stretch = 2 ** (i - 1)
        first = stretch * size
        if first >= layer.length:
            break
        lags += [first, first + 1]  # a jump
        for p in range(size):
            bend = first + p * stretch  # linear: in the middle of a parameter's taps; nearest: where they begin
            bend += stretch // 2 if layer.options.upsample == "linear" else 0
            lags += [bend, bend + 1]
    end = layer.length  # where the taps are cut: no input is so far
    lags = sorted({lag for lag in lags if lag < end})
    return (min(layer.length, 2 ** (DIRECT - 1) * size), torch.tensor(lags)) if lags else (layer.length, nothing)


class ConvState(Cache):
    """The inputs and the sums S that a causal SGConv has seen, and its taps, see `Bends`."""

    owner: "SGConv"

    def __init__(self, layer: "SGConv", x: Tensor) -> None:
        """A state without inputs, for signals like x (B, C, ...)."""
        super().__init__(layer, x.shape[0], x.device, layer.longest)
        self.bends = Bends(layer)

    def take(self, x: Tensor) -> None:
        """Take up further inputs (B, T, C)."""
        if not len(self.bends.lags):
            self.append(x)
            return
        last, before = self._sum(x, self.count - 1), self._sum(x, self.count - 2)
        slope = (last - before)[:, None] + x.double().cumsum(1)
        self.append(x, last[:, None] + slope.cumsum(1))

    def _sum(self, x: Tensor, token: int) -> Tensor:
        """S of a token (B, C); there is nothing before the first one."""
        return self.parts[1][:, token] if token >= 0 else x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float64)


class Generator:
    """The steps and chunks of a causal layer; `SGConv.step` and `SGConv.prefill` say what they take and return."""

    def __init__(self, layer: "SGConv") -> None:
        if layer.bidirectional:
            raise ValueError("a bidirectional SGConv needs the future; build it with bidirectional=False to generate")
        self.layer = layer

    @torch.no_grad()
    def step(self, x: Tensor, state: ConvState | None) -> tuple[Tensor, ConvState]:
        """y (B, h C) of x (B, C)."""
        state = self._state(x, state, 1)
        with state.kept_on_failure():
            state.take(x[:, None])
            return _newest(state).flatten(1).to(x.dtype), state

    @torch.no_grad()
    def prefill(self, x: Tensor, state: ConvState | None) -> tuple[Tensor, ConvState]:
        """y (B, h C, T) of x (B, C, T)."""
        state = self._state(x, state, x.shape[2])
        with state.kept_on_failure():
            state.take(x.mT)
            past = state.seen()[0].mT
            y = long_conv(self.layer.of_heads(past), self.layer._taps_for((state.count,)), self.layer.backend)
            return y[..., state.count - x.shape[2] :], state

    def _state(self, x: Tensor, state: ConvState | None, num: int) -> ConvState:
        """The state, or a new one, if it can take so many further inputs like x."""
        if not isinstance(state, ConvState | None):
            raise ValueError(f"the state is a {type(state).__name__}; pass on what step() or prefill() returned")
        state = ConvState(self.layer, x) if state is None else state
        state.check(self.layer, x)
        self.layer.reach(state.count + num)
        return state


def _newest(state: ConvState) -> Tensor:
    """The output (B, h, C) of the newest input, from the inputs and sums that its taps need."""
    bends, end = state.bends, state.count
    num = min(end, len(bends.near))
    inputs, near = state.parts[0][:, end - num : end, None], bends.near[len(bends.near) - num :]
    y = (inputs.to(torch.promote_types(inputs.dtype, near.dtype)) * near).sum(1)
    reached = int(torch.searchsorted(bends.lags, end)) if len(bends.lags) else 0
    if reached:
        sums = state.parts[1].index_select(1, (end - 1 - bends.lags[:reached]).to(inputs.device))
        y = y + (sums[:, :, None] * bends.changes[:reached]).sum(1)
    return y
