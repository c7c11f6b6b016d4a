"""The GPU programs of the block's layer norm and residual sum, and how they are launched. Imports triton.

`block` has what they compute, and imports this module when it is first used. Letters: B batch, C channels, L tokens.

The programs work on tiles of channels x tokens. The offset of a sample is in 64 bits, offsets within a sample are in
32. C and L are constants, as otherwise the compiler could not know that rows are aligned, and every load would be two
bytes wide.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import ceil_div

# The programs that share a sum over tokens; a constant, so that every GPU adds in the same order.
PROGRAMS = 512
# Bytes of x in a tile of the norm, at most. Backward has two operands and sums over tokens: twice the registers.
FORWARD_LIMIT, BACKWARD_LIMIT = 32768, 16384


class MapTile(NamedTuple):
    """A part of a map (channels, tokens) that a program works on at a time, in powers of two, and its warps."""

    channels: int
    tokens: int
    warps: int


def norm_tile(channels: int, dtype: torch.dtype, limit: int) -> MapTile:
    """All channels of some tokens: 64 bytes of every channel's row, but at most ``limit`` bytes altogether."""
    padded = triton.next_power_of_2(channels)
    size = min(64 * padded, limit)
    return MapTile(padded, max(1, size // padded // dtype.itemsize), max(1, 16 * size // limit))


def residual_tile(channels: int) -> MapTile:
    """Some channels of 64 tokens: rows of at least 64 bytes in both layouts."""
    return MapTile(32 if channels % 64 else 64, 64, 4)


@triton.jit
def _norm_forward(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    means: tl.tensor,
    rstds: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    L: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_L: tl.constexpr,
) -> None:
    """y, and the mean and 1 / std of every token, for one tile: some tokens with all their channels."""
    TOKEN_TILES: tl.constexpr = (L + TILE_L - 1) // TILE_L
    b = (tl.program_id(0) // TOKEN_TILES).to(tl.int64)
    c = tl.arange(0, TILE_C)
    t = (tl.program_id(0) % TOKEN_TILES) * TILE_L + tl.arange(0, TILE_L)
    in_map = (c < C)[:, None] & (t < L)[None, :]
    u = tl.load(x + b * (C * L) + (c[:, None] * L + t[None, :]), mask=in_map, other=0.0).to(tl.float32)
    mean = tl.sum(u, axis=0) / C
    u = tl.where((c < C)[:, None], u - mean[None, :], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(u * u, axis=0) / C + eps)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    v = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    u = u * rstd[None, :] * w[:, None] + v[:, None]
    tl.store(y + b * (C * L) + (t[None, :] * C + c[:, None]), u.to(y.dtype.element_ty), mask=in_map)
    tl.store(means + b * L + t, mean, mask=t < L)
    tl.store(rstds + b * L + t, rstd, mask=t < L)


@triton.jit
def _sum_in_threads(x: tl.tensor, TILE_C: tl.constexpr, TILE_L: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    """Sums (TILE_C, LANES), each of every LANES-th token: the tokens that one thread holds."""
    return tl.sum(tl.reshape(x, (TILE_C, TILE_L // LANES, LANES)), axis=1)


@triton.jit(do_not_specialize=["tiles", "share"])
def _norm_backward(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    means: tl.tensor,
    rstds: tl.tensor,
    dx: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    tiles: tl.tensor,
    share: tl.tensor,
    C: tl.constexpr,
    L: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_L: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """dx for ``share`` tiles, and the sums over their tokens for dweight and dbias."""
    TOKEN_TILES: tl.constexpr = (L + TILE_L - 1) // TILE_L
    c = tl.arange(0, TILE_C)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    dw = tl.zeros((TILE_C, LANES), tl.float32)
    dv = tl.zeros((TILE_C, LANES), tl.float32)
    first = tl.program_id(0) * share
    for tile in range(first, tl.minimum(first + share, tiles)):
        b = tl.full((), 0, tl.int64) + tile // TOKEN_TILES  # under the interpreter `tile` has no .to()
        t = (tile % TOKEN_TILES) * TILE_L + tl.arange(0, TILE_L)
        in_map = (c < C)[:, None] & (t < L)[None, :]
        u = tl.load(x + b * (C * L) + (c[:, None] * L + t[None, :]), mask=in_map, other=0.0)
        g = tl.load(dy + b * (C * L) + (t[None, :] * C + c[:, None]), mask=in_map, other=0.0)
        if u.dtype != g.dtype:
            u, g = u.to(tl.float32), g.to(tl.float32)
        # joined, x takes over the layout of dy before all arithmetic: then a warp holds whole tokens, and sums over
        # channels hardly leave the warp; otherwise the compiler moves float32 between warps after each sum
        u, g = tl.split(tl.join(u, g))
        u, g = u.to(tl.float32), g.to(tl.float32)
        mean = tl.load(means + b * L + t, mask=t < L, other=0.0)
        rstd = tl.load(rstds + b * L + t, mask=t < L, other=0.0)
        u = (u - mean[None, :]) * rstd[None, :]
        gw = g * w[:, None]
        offset = tl.sum(gw, axis=0) / C
        slope = tl.sum(gw * u, axis=0) / C
        out = (gw - offset[None, :] - u * slope[None, :]) * rstd[None, :]
        tl.store(dx + b * (C * L) + (c[:, None] * L + t[None, :]), out.to(dx.dtype.element_ty), mask=in_map)
        dw += _sum_in_threads(g * u, TILE_C, TILE_L, LANES)
        dv += _sum_in_threads(g, TILE_C, TILE_L, LANES)
    row = tl.program_id(0) * C
    tl.store(dweight + row + c, tl.sum(dw, axis=1), mask=c < C)
    tl.store(dbias + row + c, tl.sum(dv, axis=1), mask=c < C)


@triton.jit
def _residual_forward(
    shortcut: tl.tensor,
    y: tl.tensor,
    gamma: tl.tensor,
    keep: tl.tensor,
    out: tl.tensor,
    copy: tl.tensor,
    C: tl.constexpr,
    L: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_L: tl.constexpr,
) -> None:
    """out for one tile, and a copy of it in another dtype."""
    TOKEN_TILES: tl.constexpr = (L + TILE_L - 1) // TILE_L
    CHANNEL_TILES: tl.constexpr = (C + TILE_C - 1) // TILE_C
    tile = tl.program_id(0) // CHANNEL_TILES
    b = (tile // TOKEN_TILES).to(tl.int64)
    c = (tl.program_id(0) % CHANNEL_TILES) * TILE_C + tl.arange(0, TILE_C)
    t = (tile % TOKEN_TILES) * TILE_L + tl.arange(0, TILE_L)
    in_map = (c < C)[:, None] & (t < L)[None, :]
    tokens_inner = b * (C * L) + (c[:, None] * L + t[None, :])
    value = tl.load(y + b * (C * L) + (t[None, :] * C + c[:, None]), mask=in_map, other=0.0).to(tl.float32)
    if gamma is not None:
        value *= tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    if keep is not None:
        value *= tl.load(keep + b).to(tl.float32)
    value += tl.load(shortcut + tokens_inner, mask=in_map, other=0.0).to(tl.float32)
    tl.store(out + tokens_inner, value.to(out.dtype.element_ty), mask=in_map)
    if copy is not None:
        tl.store(copy + tokens_inner, value.to(copy.dtype.element_ty), mask=in_map)


@triton.jit(do_not_specialize=["tiles", "share"])
def _residual_backward(
    dout: tl.tensor,
    dcopy: tl.tensor,
    y: tl.tensor,
    gamma: tl.tensor,
    keep: tl.tensor,
    dshortcut: tl.tensor,
    dy: tl.tensor,
    dgamma: tl.tensor,
    tiles: tl.tensor,
    share: tl.tensor,
    C: tl.constexpr,
    L: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_L: tl.constexpr,
) -> None:
    """dy for ``share`` tiles, the sums over their tokens for dgamma, and with a copy dshortcut = dout + dcopy."""
    TOKEN_TILES: tl.constexpr = (L + TILE_L - 1) // TILE_L
    CHANNEL_TILES: tl.constexpr = (C + TILE_C - 1) // TILE_C
    pid = tl.program_id(0) // CHANNEL_TILES
    c = (tl.program_id(0) % CHANNEL_TILES) * TILE_C + tl.arange(0, TILE_C)
    sums = tl.zeros((TILE_C,), tl.float32)
    for tile in range(pid * share, tl.minimum((pid + 1) * share, tiles)):
        b = tl.full((), 0, tl.int64) + tile // TOKEN_TILES
        t = (tile % TOKEN_TILES) * TILE_L + tl.arange(0, TILE_L)
        in_map = (c < C)[:, None] & (t < L)[None, :]
        channels_inner = b * (C * L) + (t[None, :] * C + c[:, None])
        tokens_inner = b * (C * L) + (c[:, None] * L + t[None, :])
        g = tl.load(dout + tokens_inner, mask=in_map, other=0.0).to(tl.float32)
        if dcopy is not None:
            g += tl.load(dcopy + tokens_inner, mask=in_map, other=0.0).to(tl.float32)
            tl.store(dshortcut + tokens_inner, g.to(dshortcut.dtype.element_ty), mask=in_map)
        if keep is not None:
            g *= tl.load(keep + b).to(tl.float32)
        if dgamma is not None:
            sums += tl.sum(g * tl.load(y + channels_inner, mask=in_map, other=0.0).to(tl.float32), axis=1)
        if gamma is not None:
            g *= tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
        tl.store(dy + channels_inner, g.to(dy.dtype.element_ty), mask=in_map)
    if dgamma is not None:
        tl.store(dgamma + pid * C + c, sums, mask=c < C)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y (B, L, C), and the mean and 1 / std of every token: (2, B, L) in float32."""
    batch, channels, length = x.shape
    y = x.new_empty((batch, length, channels), dtype=dtype)
    stats = x.new_empty((2, batch, length), dtype=torch.float32)
    tile = norm_tile(channels, x.dtype, FORWARD_LIMIT)
    _launch(_norm_forward, batch * ceil_div(length, tile.tokens), x.shape, tile, (x, weight, bias, y, *stats, eps))
    return y, stats


def norm_gradients(dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of weight and bias in float32."""
    batch, channels, length = x.shape
    tile = norm_tile(channels, x.dtype, BACKWARD_LIMIT)
    tiles = batch * ceil_div(length, tile.tokens)
    programs, share = _shares(tiles, PROGRAMS)
    dx = x.new_empty(x.shape)
    partial = x.new_empty((2, programs, channels), dtype=torch.float32)
    channels_at_once = 16 // dy.element_size()  # that a thread reads of a token
    lanes = max(1, min(tile.tokens, 32 * tile.warps * channels_at_once // tile.channels))
    operands = (dy, x, weight, *stats, dx, *partial, tiles, share)
    _launch(_norm_backward, programs, x.shape, tile, operands, LANES=lanes)
    return dx, partial[0].sum(0), partial[1].sum(0)


def residual(
    shortcut: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, copy: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """shortcut (B, C, L) and its branch (B, L, C), scaled, together; and a copy, or an empty tensor."""
    batch, channels, length = shortcut.shape
    out = shortcut.new_empty(shortcut.shape)
    copied = None if copy is None else shortcut.new_empty(shortcut.shape, dtype=copy)
    tile = residual_tile(channels)
    tiles = batch * ceil_div(length, tile.tokens) * ceil_div(channels, tile.channels)
    _launch(_residual_forward, tiles, shortcut.shape, tile, (shortcut, y, gamma, keep, out, copied))
    return out, shortcut.new_empty(0) if copied is None else copied


def residual_gradients(
    dout: Tensor,
    dcopy: Tensor | None,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the shortcut, if there is a copy, of y, in its dtype, and of gamma, in float32, if y is given.

    What is not computed is an empty tensor.
    """
    batch, channels, length = dout.shape
    tile = residual_tile(channels)
    token_tiles, channel_tiles = batch * ceil_div(length, tile.tokens), ceil_div(channels, tile.channels)
    programs, share = _shares(token_tiles, ceil_div(PROGRAMS, channel_tiles))
    dshortcut = None if dcopy is None else dout.new_empty(dout.shape)
    dy = dout.new_empty((batch, length, channels), dtype=dtype)
    partial = None if y is None else dout.new_empty((programs, channels), dtype=torch.float32)
    operands = (dout, dcopy, y, gamma, keep, dshortcut, dy, partial, token_tiles, share)
    _launch(_residual_backward, programs * channel_tiles, dout.shape, tile, operands)
    dgamma = dout.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(0)
    return dout.new_empty(0) if dshortcut is None else dshortcut, dy, dgamma


def _shares(tiles: int, programs: int) -> tuple[int, int]:
    """How many programs take how many neighbouring tiles each; neighbours share the ends of rows in a cache."""
    share = max(1, ceil_div(tiles, programs))
    return ceil_div(tiles, share), share


def _launch(
    program: Any, count: int, shape: torch.Size, tile: MapTile, operands: tuple[Any, ...], **constants: int
) -> None:
    """Run so many programs on a map (B, C, L). What they write to was allocated contiguous, so it is not copied."""
    operands = tuple(value.contiguous() if isinstance(value, Tensor) else value for value in operands)
    constants |= {"C": shape[1], "L": shape[2], "TILE_C": tile.channels, "TILE_L": tile.tokens}
    with torch.cuda.device_of(operands[0]):
        program[(count,)](*operands, **constants, num_warps=tile.warps)
