"""The GPU programs that make taps of a kernel's parameters, and how they are launched. Imports triton.

`sgconvnext.models.taps` has what they compute, and imports this module when it is first used. Letters: C channels, L
tokens, N scales, d taps per scale.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import ceil_div

TAPS = 256  # of a channel that one program makes
PARAMETERS, STEP = 32, 16  # of a scale whose gradients one program sums, and the taps that it adds at a time


@triton.jit
def _inverse_alpha(c, first: tl.constexpr, last: tl.constexpr, C: tl.constexpr):
    """1 / alpha of a channel."""
    steps: tl.constexpr = max(1, C - 1)
    return first + (last - first) / steps * c


@triton.jit
def _taps(
    weight,
    skip,
    norm,
    taps,
    C: tl.constexpr,
    L: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    INVERSE_FIRST: tl.constexpr,
    INVERSE_LAST: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK taps of one channel, by lag."""
    first_lag: tl.constexpr = 1 - L if DIRECTIONS == 2 else 0
    blocks: tl.constexpr = (L - first_lag + BLOCK - 1) // BLOCK
    c = tl.program_id(0) // blocks
    lag = first_lag + tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    direction = tl.where(lag < 0, 1, 0)
    j = tl.where(lag < 0, -lag - 1, lag)  # which tap of its direction
    scale = tl.zeros((BLOCK,), tl.int32)
    start = tl.zeros((BLOCK,), tl.int32)
    ratio = tl.full((BLOCK,), 1, tl.int32)  # taps of the scale / d
    for i in tl.static_range(1, N):
        reached = j >= D * 2 ** (i - 1)
        scale = tl.where(reached, i, scale)
        start = tl.where(reached, D * 2 ** (i - 1), start)
        ratio = tl.where(reached, 2 ** (i - 1), ratio)
    place = (j - start + 0.5) / ratio - 0.5
    place = tl.minimum(tl.maximum(place, 0.0), D - 1.0)
    left = place.to(tl.int32)
    t = place - left
    inside = lag < L
    row = weight + ((direction * N + scale) * C + c) * D
    a = tl.load(row + left, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(row + tl.minimum(left + 1, D - 1), mask=inside, other=0.0).to(tl.float32)
    value = a + (b - a) * t
    if EXPONENT is not None:
        value *= tl.exp2(-EXPONENT * tl.log2(j + 1.0))
    else:
        inverse = _inverse_alpha(c, INVERSE_FIRST, INVERSE_LAST, C)
        for i in tl.static_range(1, N):
            value = tl.where(scale >= i, value / inverse, value)
    value /= tl.load(norm + direction * C + c).to(tl.float32)
    value += tl.where(lag == 0, tl.load(skip + c).to(tl.float32), 0.0)
    tl.store(taps + c.to(tl.int64) * (L - first_lag) + lag - first_lag, value, mask=inside)


@triton.jit
def _parameters(
    dtaps,
    norm,
    dweight,
    C: tl.constexpr,
    L: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    INVERSE_FIRST: tl.constexpr,
    INVERSE_LAST: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The gradients of BLOCK parameters of one scale of a channel: sums over the taps that are made of them."""
    first_lag: tl.constexpr = 1 - L if DIRECTIONS == 2 else 0
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks  # (direction, scale, channel)
    c = row % C
    scale = row // C % N
    direction = row // (C * N)
    m = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ratio = 1 << tl.maximum(scale - 1, 0)
    size = D * ratio
    start = tl.where(scale > 0, size, 0)
    gradient = dtaps + c.to(tl.int64) * (L - first_lag) - first_lag
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, 2 * ratio, STEP):  # tap u reaches parameter m from ratio (m - 1/2) to ratio (m + 3/2)
        u = m[:, None] * ratio - ratio // 2 + k + tl.arange(0, STEP)[None, :]
        j = start + u
        there = (u >= 0) & (u < size) & (j < L) & (k + tl.arange(0, STEP) < 2 * ratio)[None, :]
        there = there & (m < D)[:, None]
        if DIRECTIONS == 2:  # no output reaches the last tap of the lags below 0
            there = there & ((direction == 0) | (j < L - 1))
        lag = tl.where(direction == 0, j, -j - 1)
        g = tl.load(gradient + lag, mask=there, other=0.0)
        place = tl.minimum(tl.maximum((u + 0.5) / ratio - 0.5, 0.0), D - 1.0)
        g *= tl.maximum(1.0 - tl.abs(place - m[:, None]), 0.0)
        if EXPONENT is not None:
            g *= tl.exp2(-EXPONENT * tl.log2(tl.maximum(j, 0) + 1.0))
        total += tl.sum(g, axis=1)
    total /= tl.load(norm + direction * C + c).to(tl.float32)
    if EXPONENT is None:
        inverse = _inverse_alpha(c, INVERSE_FIRST, INVERSE_LAST, C)
        for i in tl.static_range(1, N):
            total = tl.where(scale >= i, total / inverse, total)
    tl.store(dweight + row.to(tl.int64) * D + m, total, mask=m < D)


def taps(
    weight: Tensor, skip: Tensor, norm: Tensor, length: int, alpha: tuple[float, float], exponent: float | None
) -> Tensor:
    """(C, 2L-1) or (C, L), by lag."""
    directions, _, channels, _ = weight.shape
    made = weight.new_empty((channels, directions * length - directions + 1), dtype=torch.float32)
    count = channels * ceil_div(made.shape[1], TAPS)
    sizes = {"L": length, "BLOCK": TAPS} | _constants(alpha, exponent)
    _launch(_taps, count, (weight, skip, norm, made), weight.shape, **sizes)
    return made


def parameters(
    dtaps: Tensor,
    norm: Tensor,
    shape: tuple[int, int, int, int],
    length: int,
    alpha: tuple[float, float],
    exponent: float | None,
) -> Tensor:
    """The gradient of the weight (directions, N, C, d), in float32."""
    dweight = dtaps.new_empty(shape)
    directions, num_scales, channels, scale_dim = shape
    count = directions * num_scales * channels * ceil_div(scale_dim, PARAMETERS)
    sizes = {"L": length, "BLOCK": PARAMETERS, "STEP": STEP} | _constants(alpha, exponent)
    _launch(_parameters, count, (dtaps, norm, dweight), shape, **sizes)
    return dweight


def _constants(alpha: tuple[float, float], exponent: float | None) -> dict[str, float | None]:
    return {"INVERSE_FIRST": 1 / alpha[0], "INVERSE_LAST": 1 / alpha[1], "EXPONENT": exponent}


def _launch(program: Any, count: int, operands: tuple[Tensor, ...], shape: tuple[int, ...], **constants: Any) -> None:
    directions, num_scales, channels, scale_dim = shape
    sizes = {"C": channels, "N": num_scales, "D": scale_dim, "DIRECTIONS": directions}
    with torch.cuda.device_of(operands[0]):
        program[(count,)](*(operand.contiguous() for operand in operands), **sizes, **constants, num_warps=4)
