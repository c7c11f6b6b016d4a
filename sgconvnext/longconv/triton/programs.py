"""The GPU programs of the "triton" backend, and how they are launched. Imports triton, so import it only to run them.

A program computes one tile of one channel's matrix product; `tiles` has the sizes. Under TRITON_INTERPRET=1 the same
programs run on the CPU, slowly, for tests. For tensors on the meta device they are compiled and do not run.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .tiles import Tile, ceil_div, lag_windows


@triton.jit(do_not_specialize=["B"])
def _convolve(
    x,
    copies,
    y,
    B,
    C: tl.constexpr,  # sizes are constants: only then does the compiler see how far each row of x is aligned
    L: tl.constexpr,
    FIRST_LAG: tl.constexpr,
    LAST_LAG: tl.constexpr,
    WIDTH: tl.constexpr,
    ORIGIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y[image, t] = sum_s x[image, s] K[t - s] for one channel and ROWS x COLUMNS of its outputs."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(B, ROWS)
    column_tiles: tl.constexpr = (L + COLUMNS - 1) // COLUMNS
    # images change fastest and channels slowest: programs that run together find the same taps, then x, in the cache
    image = program % row_tiles * ROWS + tl.arange(0, ROWS)
    t0 = program // row_tiles % column_tiles * COLUMNS
    c = (program // (row_tiles * column_tiles)).to(tl.int64)
    t = t0 + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)

    there = (image < B)[:, None]
    signal = image.to(tl.int64)[:, None] * (C * L) + c * L  # B*C*L may exceed 2^31
    # row k of the Toeplitz tile starts at the tap of lag t0 - s0 - k; see _shifted_copies for where that is aligned
    aligned = (7 - k % 8) * WIDTH - k // 8 * 8 + ORIGIN
    taps = copies + c * (8 * WIDTH) + aligned[:, None] + t[None, :]

    begin = 0
    end = L
    if LAST_LAG < L - 1:
        begin = tl.maximum(t0 - LAST_LAG, 0) // DEPTH * DEPTH
    if FIRST_LAG > 1 - L:
        end = tl.minimum(t0 + COLUMNS - FIRST_LAG, L)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for s0 in range(begin, end, DEPTH):
        s = s0 + k
        inside = there if L % DEPTH == 0 else there & (s < L)[None, :]
        a = tl.load(x + signal + s[None, :], mask=inside, other=0.0)
        b = tl.load(taps - s0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total)
    tl.store(y + signal + t[None, :], total.to(y.dtype.element_ty), mask=there & (t < L)[None, :])


@triton.jit
def _lay_out(
    taps,
    copies,
    NUM_TAPS: tl.constexpr,
    FIRST: tl.constexpr,
    REVERSED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """copies[c, r, p] = K[c, tap FIRST + p + r], zero where there is none, for one channel and BLOCK of its p."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    c = (tl.program_id(0) // blocks).to(tl.int64)
    r = tl.arange(0, 8)[:, None]
    p = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    tap = FIRST + p + r
    there = (tap >= 0) & (tap < NUM_TAPS)
    if REVERSED:
        tap = NUM_TAPS - 1 - tap
    value = tl.load(taps + c * NUM_TAPS + tap, mask=there, other=0.0)
    tl.store(copies + c * (8 * WIDTH) + r * WIDTH + p, value.to(copies.dtype.element_ty), mask=p < WIDTH)


@triton.jit(do_not_specialize=["B"])
def _correlate(
    x,
    dy,
    sums,
    B,
    C: tl.constexpr,
    L: tl.constexpr,
    FIRST_Q: tl.constexpr,
    NUM_Q: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Diagonal sums of G[i, j] = sum over images and tiles (t0, s0) of dy[image, t0 + i] x[image, s0 + j].

    One program sums all tiles with t0 - s0 = q * COLUMNS, so the same diagonal of each has the same lag.
    """
    program = tl.program_id(0)
    q = FIRST_Q + program % NUM_Q
    c = (program // NUM_Q).to(tl.int64)
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)

    first_row = tl.maximum((q * COLUMNS - COLUMNS + ROWS) // ROWS, 0)  # of the tiles with s0 + COLUMNS > 0 and s0 < L
    end_row = tl.minimum(L - 1 + q * COLUMNS, L - 1) // ROWS + 1
    depth_tiles = tl.cdiv(B, DEPTH)
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(0, (end_row - first_row) * depth_tiles):  # two nested loops would not be pipelined
        t = (first_row + step // depth_tiles) * ROWS + i
        s = (first_row + step // depth_tiles) * ROWS - q * COLUMNS + j
        image = step % depth_tiles * DEPTH + k
        there = (image < B)[:, None]
        signal = image.to(tl.int64)[:, None] * (C * L) + c * L  # B*C*L may exceed 2^31
        a = tl.load(dy + signal + t[None, :], mask=there & (t < L)[None, :], other=0.0)
        b = tl.load(x + signal + s[None, :], mask=there & ((s >= 0) & (s < L))[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(tl.trans(a), b, product)

    # column d of the skewed product holds the diagonals i - j = d, below, and i - j = d - COLUMNS
    skewed = tl.gather(product, (i[:, None] - j[None, :]) & (COLUMNS - 1), axis=1)
    below = i[:, None] >= j[None, :]
    row = sums + (c * (NUM_Q + 1) + (q - FIRST_Q)) * COLUMNS + j
    tl.store(row + COLUMNS, tl.sum(tl.where(below, skewed, 0.0), axis=0))
    tl.store(row + C * (NUM_Q + 1) * COLUMNS, tl.sum(tl.where(below, 0.0, skewed), axis=0))


# Triton's interpreter silently multiplies the bit patterns of bfloat16; converted to float32 first, they are right
_UPCAST = not isinstance(_convolve, triton.runtime.JITFunction)


def convolve(x: Tensor, taps: Tensor, first_lag: int, tile: Tile, reverse: bool = False) -> Tensor:
    """y[b, c, t] = sum_s K[c, t - s] x[b, c, s], summed in float32.

    Args:
        x: signal (B, C, L).
        taps: K (C, n) for the lags first_lag .. first_lag + n - 1, which are rounded to the dtype of x.
        first_lag: from -(L-1) on.
        tile: images x outputs, in steps of inputs.
        reverse: whether taps are in the opposite order, from lag first_lag + n - 1 to first_lag.

    Returns:
        y (B, C, L) in the dtype of x.
    """
    x = x.contiguous()
    y = x.new_empty(x.shape)
    batch, channels, length = x.shape
    last_lag = first_lag + taps.shape[1] - 1
    copies, origin = _shifted_copies(taps, first_lag, length, tile, x.dtype, reverse)
    programs = ceil_div(batch, tile.rows) * ceil_div(length, tile.columns) * channels
    sizes = {"FIRST_LAG": first_lag, "LAST_LAG": last_lag, "WIDTH": copies.shape[2], "ORIGIN": origin}
    _launch(_convolve, programs, (x, copies, y), sizes, tile)
    return y


def correlate(x: Tensor, dy: Tensor, first_lag: int, tile: Tile) -> Tensor:
    """The gradient of the taps: sum_{b,t} dy[b, c, t] x[b, c, t - lag], summed in float32, always in the same order.

    Args:
        x, dy: signals (B, C, L).
        first_lag: -(L-1), or 0 for a causal kernel.
        tile: outputs x inputs, in steps of images; no more outputs than inputs, or its diagonals would reach into a
            third window.

    Returns:
        (C, L - first_lag) in float32, for the lags first_lag .. L-1.
    """
    x, dy = x.contiguous(), dy.contiguous()
    channels, length = x.shape[1:]
    first, count = lag_windows(length, first_lag, tile)
    # window w of both halves holds the lags (first - 1 + w) * columns + 0 .. columns-1; each tile adds to two windows
    sums = x.new_zeros((2, channels, (count + 1) * tile.columns), dtype=torch.float32)
    _launch(_correlate, channels * count, (x, dy, sums), {"FIRST_Q": first, "NUM_Q": count}, tile)
    start = first_lag - (first - 1) * tile.columns
    return sums[:, :, start : start + length - first_lag].sum(0)


def _shifted_copies(
    taps: Tensor, first_lag: int, length: int, tile: Tile, dtype: torch.dtype, reverse: bool
) -> tuple[Tensor, int]:
    """8 shifted copies of the taps, in which every row of every Toeplitz tile starts at a multiple of 8.

    Eight half-precision numbers are 16 bytes, the widest load there is, which has to start at a multiple of itself.

        copies[c, r, p] = K[c, p + r - 7 - origin], zero where there is no tap

    Row k of a tile needs the lags from t0 - s0 - k on: with r = 7 - k % 8 they start at p = origin + t0 - s0 -
    k // 8 * 8.

    Returns:
        copies (C, 8, WIDTH), and origin.
    """
    origin = ceil_div(length, tile.depth) * tile.depth
    width = origin + ceil_div(length, tile.columns) * tile.columns
    channels, num_taps = taps.shape
    if _UPCAST:  # the interpreter cuts off what a GPU rounds
        taps = taps.to(dtype)
    copies = taps.new_empty((channels, 8, width), dtype=dtype)
    block = min(512, triton.next_power_of_2(width))
    sizes = {"NUM_TAPS": num_taps, "FIRST": -7 - origin - first_lag, "REVERSED": reverse, "WIDTH": width}
    _run(_lay_out, channels * ceil_div(width, block), (taps.contiguous(), copies), **sizes, BLOCK=block)
    return copies, origin


def _launch(program: Any, count: int, tensors: tuple[Tensor, ...], sizes: dict[str, int], tile: Tile) -> None:
    batch, channels, length = tensors[0].shape
    sizes = sizes | {"C": channels, "L": length, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    try:
        _run(program, count, (*tensors, batch), **sizes, UPCAST=_UPCAST, **options)
    except OutOfResources as error:
        raise ValueError(
            f"backend 'triton' is tuned for GPUs with more shared memory than this one has ({error}); use "
            "backend='fft' here"
        ) from error


def _run(program: Any, count: int, operands: tuple[Any, ...], **constants: Any) -> None:
    """Run so many programs; on the meta device only compile them."""
    if count == 0:
        return
    grid = (count,)
    launch = functools.partial(program.warmup, grid=grid) if operands[0].is_meta else program[grid]
    with torch.cuda.device_of(operands[0]):
        launch(*operands, **constants)
