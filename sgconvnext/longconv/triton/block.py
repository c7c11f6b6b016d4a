"""The block's layer norm and residual sum as Triton programs that change the layout on their way, for CUDA.

The long convolution wants tokens innermost, (B, C, L), and the MLP channels innermost, (B, L, C). The norm before the
MLP and the residual sum after it touch every element anyway: reading one layout and writing the other, they make the
two transposes free. Sums and statistics are in float32, and sums over tokens are the same bits in every run.

Importing this module imports triton. Letters: B batch, C channels, L tokens.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 512  # that share a sum over tokens; a constant, so that every GPU adds in the same order


class Tile(NamedTuple):
    """What a program works on at a time, in powers of two, and with how many warps."""

    channels: int
    tokens: int
    warps: int


def norm_tile(channels: int, dtype: torch.dtype, limit: int) -> Tile:
    """All channels of some tokens: 64 bytes of every channel's row, but at most ``limit`` bytes altogether."""
    padded = triton.next_power_of_2(channels)
    size = min(64 * padded, limit)
    return Tile(padded, max(1, size // padded // dtype.itemsize), max(1, 16 * size // limit))


FORWARD_LIMIT = 32768
BACKWARD_LIMIT = 16384  # two operands, and sums over tokens: twice the registers per element


def residual_tile(channels: int) -> Tile:
    """Some channels of 64 tokens: rows of at least 64 bytes in both layouts."""
    return Tile(32 if channels % 64 else 64, 64, 4)


def layer_norm_channels_last(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Layer norm over the channels of (B, C, L), written as (B, L, C).

        y[b, l, c] = weight[c] (x[b, c, l] - mean[b, l]) / sqrt(var[b, l] + eps) + bias[c]

    Differentiable in x, weight and bias, to any order.

    Args:
        x: (B, C, L) in float32, bfloat16 or float16; copied first unless it is contiguous.
        weight, bias: (C).
        eps: added to the variance, which is the mean of the squared deviations.
        dtype: of y; None for that of x.

    Returns:
        y (B, L, C), contiguous.

    Raises:
        ValueError: other shapes or dtypes.
    """
    _check_map("x", x)
    _check_vector("weight", weight, x.shape[1], "C")
    _check_vector("bias", bias, x.shape[1], "C")
    dtype = x.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}; y can be {_spoken(DTYPES)}")
    y, _ = _norm(x, weight, bias, eps, dtype)
    return y


def scale_residual_channels_first(
    shortcut: Tensor, y: Tensor, gamma: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """Add a branch (B, L, C), scaled, to its shortcut (B, C, L).

        out[b, c, l] = shortcut[b, c, l] + keep[b] gamma[c] y[b, l, c]

    Differentiable in shortcut, y and gamma, to any order.

    Args:
        shortcut: (B, C, L) in float32, bfloat16 or float16; copied first unless it is contiguous.
        y: (B, L, C), likewise.
        gamma: layer scale (C); None for 1.
        keep: drop path's factor (B): 0, or 1 / (1 - the probability of a drop); None for 1.

    Returns:
        out (B, C, L) in the dtype of shortcut, contiguous.

    Raises:
        ValueError: other shapes or dtypes, or keep requires a gradient.
    """
    _check_map("shortcut", shortcut)
    _check_map("y", y)
    batch, channels, length = shortcut.shape
    if y.shape != (batch, length, channels):
        raise ValueError(
            f"y is {tuple(y.shape)}; a shortcut of {tuple(shortcut.shape)} needs ({batch}, {length}, {channels})"
        )
    if gamma is not None:
        _check_vector("gamma", gamma, channels, "C")
    if keep is not None:
        _check_vector("keep", keep, batch, "B")
        if keep.requires_grad:
            raise ValueError("keep requires a gradient, and has none here: pass keep.detach()")
    return _residual(shortcut, y, gamma, keep)


def _check_map(name: str, x: Tensor) -> None:
    if x.ndim != 3 or x.dtype not in DTYPES:
        raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}; this takes three dimensions of {_spoken(DTYPES)}")
    if x.shape[1] * x.shape[2] >= 2**31:
        raise ValueError(f"{name} is {tuple(x.shape)}; a sample must have fewer than 2^31 elements: split it")


def _check_vector(name: str, vector: Tensor, size: int, letter: str) -> None:
    if vector.shape != (size,) or vector.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {tuple(vector.shape)} {vector.dtype}; {letter}={size} needs ({size},) of {_spoken(DTYPES)}"
        )


def _spoken(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _shares(tiles: int, programs: int) -> tuple[int, int]:
    """How many programs take how many neighbouring tiles each; neighbours share the ends of rows in a cache."""
    share = max(1, triton.cdiv(tiles, programs))
    return triton.cdiv(tiles, share), share


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("sgconvnext::layer_norm_channels_last", mutates_args=())
def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y, and of every token the mean and 1 / std: (2, B, L) in float32."""
    batch, channels, length = x.shape
    y = x.new_empty((batch, length, channels), dtype=dtype)
    stats = x.new_empty((2, batch, length), dtype=torch.float32)
    tile = norm_tile(channels, x.dtype, FORWARD_LIMIT)
    with torch.cuda.device_of(x):
        _norm_forward[(batch * triton.cdiv(length, tile.tokens),)](
            x.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            y,
            stats[0],
            stats[1],
            eps,
            C=channels,
            L=length,
            BLOCK_C=tile.channels,
            BLOCK_L=tile.tokens,
            num_warps=tile.warps,
        )
    return y, stats


@_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, channels, length = x.shape
    return x.new_empty((batch, length, channels), dtype=dtype), x.new_empty((2, batch, length), dtype=torch.float32)


@torch.library.custom_op("sgconvnext::layer_norm_channels_last_backward", mutates_args=())
def _norm_gradients(dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of weight and bias in float32."""
    batch, channels, length = x.shape
    tile = norm_tile(channels, x.dtype, BACKWARD_LIMIT)
    tiles = batch * triton.cdiv(length, tile.tokens)
    programs, share = _shares(tiles, PROGRAMS)
    dx = x.new_empty(x.shape)
    partial = x.new_empty((2, programs, channels), dtype=torch.float32)
    at_once = 16 // dy.element_size()  # channels of a token that a thread reads
    with torch.cuda.device_of(x):
        _norm_backward[(programs,)](
            dy.contiguous(),
            x.contiguous(),
            weight.contiguous(),
            stats[0],
            stats[1],
            dx,
            partial[0],
            partial[1],
            tiles,
            share,
            C=channels,
            L=length,
            BLOCK_C=tile.channels,
            BLOCK_L=tile.tokens,
            LANES=max(1, min(tile.tokens, 32 * tile.warps * at_once // tile.channels)),
            num_warps=tile.warps,
        )
    return dx, partial[0].sum(0), partial[1].sum(0)


@_norm_gradients.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), dweight, dbias


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    x, weight, stats = ctx.saved_tensors
    if torch.is_grad_enabled():  # somebody differentiates again
        dx, dweight, dbias = _plain_norm_gradients(dy, x, weight, ctx.eps)
    else:
        dx, dweight, dbias = _norm_gradients(dy, x, weight, stats)
    return dx, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None


def _plain_norm_gradients(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `_norm_gradients` computes, in differentiable operators."""
    u, g = x.float(), dy.transpose(1, 2).float()
    u = u - u.mean(1, keepdim=True)
    rstd = (u.square().mean(1, keepdim=True) + eps).rsqrt()
    u, scaled = u * rstd, g * weight.float()[:, None]
    dx = rstd * (scaled - scaled.mean(1, keepdim=True) - u * (scaled * u).mean(1, keepdim=True))
    return dx.to(x.dtype), (g * u).sum((0, 2)), g.sum((0, 2))


_norm.register_autograd(_norm_autograd, setup_context=_save_norm)


@torch.library.custom_op("sgconvnext::scale_residual_channels_first", mutates_args=())
def _residual(shortcut: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    batch, channels, length = shortcut.shape
    out = shortcut.new_empty(shortcut.shape)
    tile = residual_tile(channels)
    tiles, blocks = batch * triton.cdiv(length, tile.tokens), triton.cdiv(channels, tile.channels)
    with torch.cuda.device_of(shortcut):
        _residual_forward[(tiles * blocks,)](
            shortcut.contiguous(),
            y.contiguous(),
            _contiguous(gamma),
            _contiguous(keep),
            out,
            C=channels,
            L=length,
            BLOCK_C=tile.channels,
            BLOCK_L=tile.tokens,
            num_warps=tile.warps,
        )
    return out


@_residual.register_fake
def _(shortcut: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    return shortcut.new_empty(shortcut.shape)


@torch.library.custom_op("sgconvnext::scale_residual_channels_first_backward", mutates_args=())
def _residual_gradients(
    dout: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of y, in its dtype, and of gamma, in float32; an empty tensor for the latter if y is not given."""
    batch, channels, length = dout.shape
    tile = residual_tile(channels)
    tiles, blocks = batch * triton.cdiv(length, tile.tokens), triton.cdiv(channels, tile.channels)
    programs, share = _shares(tiles, triton.cdiv(PROGRAMS, blocks))
    dy = dout.new_empty((batch, length, channels), dtype=dtype)
    partial = None if y is None else dout.new_empty((programs, channels), dtype=torch.float32)
    with torch.cuda.device_of(dout):
        _residual_backward[(programs * blocks,)](
            dout.contiguous(),
            _contiguous(y),
            _contiguous(gamma),
            _contiguous(keep),
            dy,
            partial,
            tiles,
            share,
            C=channels,
            L=length,
            BLOCK_C=tile.channels,
            BLOCK_L=tile.tokens,
            num_warps=tile.warps,
        )
    return dy, dout.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(0)


@_residual_gradients.register_fake
def _(
    dout: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, channels, length = dout.shape
    dgamma = dout.new_empty(0 if y is None else channels, dtype=torch.float32)
    return dout.new_empty((batch, length, channels), dtype=dtype), dgamma


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gamma, keep = inputs
    ctx.dtype = y.dtype
    # only the gradient of gamma needs the largest of them
    ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gamma, keep)


def _residual_autograd(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    y, gamma, keep = ctx.saved_tensors
    if not any(ctx.needs_input_grad[1:3]):
        return dout, None, None, None
    if torch.is_grad_enabled():  # somebody differentiates again
        dy, dgamma = _plain_residual_gradients(dout, y, gamma, keep, ctx.dtype)
    else:
        dy, dgamma = _residual_gradients(dout, y, gamma, keep, ctx.dtype)
    return dout, dy, None if y is None else dgamma.to(gamma.dtype), None


def _plain_residual_gradients(
    dout: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `_residual_gradients` computes, in differentiable operators."""
    g = dout.transpose(1, 2).float()
    g = g if keep is None else g * keep.float()[:, None, None]
    dgamma = g.new_empty(0) if y is None else (g * y.float()).sum((0, 1))
    return (g if gamma is None else g * gamma.float()).to(dtype), dgamma


_residual.register_autograd(_residual_autograd, setup_context=_save_residual)


# The programs below work on tiles (channels, tokens). A sample's offset is in 64 bits, those within it in 32; C and L
# are constants, without which no row would be known to be aligned, and every load would be two bytes wide.


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
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> None:
    TILES: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    b = (tl.program_id(0) // TILES).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    t = (tl.program_id(0) % TILES) * BLOCK_L + tl.arange(0, BLOCK_L)
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
def _sum_in_threads(x: tl.tensor, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    # (BLOCK_C, LANES), of every LANES-th token: those that one thread holds
    return tl.sum(tl.reshape(x, (BLOCK_C, BLOCK_L // LANES, LANES)), axis=1)


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
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    TILES: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    c = tl.arange(0, BLOCK_C)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_C, LANES), tl.float32)
    dv = tl.zeros((BLOCK_C, LANES), tl.float32)
    first = tl.program_id(0) * share
    for tile in range(first, tl.minimum(first + share, tiles)):
        b = tl.full((), 0, tl.int64) + tile // TILES  # the interpreter's tile has no .to()
        t = (tile % TILES) * BLOCK_L + tl.arange(0, BLOCK_L)
        in_map = (c < C)[:, None] & (t < L)[None, :]
        u = tl.load(x + b * (C * L) + (c[:, None] * L + t[None, :]), mask=in_map, other=0.0)
        g = tl.load(dy + b * (C * L) + (t[None, :] * C + c[:, None]), mask=in_map, other=0.0)
        if u.dtype != g.dtype:
            u, g = u.to(tl.float32), g.to(tl.float32)
        # joined, x takes over dy's layout before all arithmetic: a warp then holds whole tokens, and sums over
        # channels hardly leave it; unjoined, the compiler moves float32 around after each sum
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
        dw += _sum_in_threads(g * u, BLOCK_C, BLOCK_L, LANES)
        dv += _sum_in_threads(g, BLOCK_C, BLOCK_L, LANES)
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
    C: tl.constexpr,
    L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> None:
    TILES: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // BLOCKS
    b = (tile // TILES).to(tl.int64)
    c = (tl.program_id(0) % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = (tile % TILES) * BLOCK_L + tl.arange(0, BLOCK_L)
    in_map = (c < C)[:, None] & (t < L)[None, :]
    tokens_inner = b * (C * L) + (c[:, None] * L + t[None, :])
    value = tl.load(y + b * (C * L) + (t[None, :] * C + c[:, None]), mask=in_map, other=0.0).to(tl.float32)
    if gamma is not None:
        value *= tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    if keep is not None:
        value *= tl.load(keep + b).to(tl.float32)
    value += tl.load(shortcut + tokens_inner, mask=in_map, other=0.0).to(tl.float32)
    tl.store(out + tokens_inner, value.to(out.dtype.element_ty), mask=in_map)


@triton.jit(do_not_specialize=["tiles", "share"])
def _residual_backward(
    dout: tl.tensor,
    y: tl.tensor,
    gamma: tl.tensor,
    keep: tl.tensor,
    dy: tl.tensor,
    dgamma: tl.tensor,
    tiles: tl.tensor,
    share: tl.tensor,
    C: tl.constexpr,
    L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> None:
    TILES: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0) // BLOCKS
    c = (tl.program_id(0) % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(pid * share, tl.minimum((pid + 1) * share, tiles)):
        b = tl.full((), 0, tl.int64) + tile // TILES
        t = (tile % TILES) * BLOCK_L + tl.arange(0, BLOCK_L)
        in_map = (c < C)[:, None] & (t < L)[None, :]
        channels_inner = b * (C * L) + (t[None, :] * C + c[:, None])
        g = tl.load(dout + b * (C * L) + (c[:, None] * L + t[None, :]), mask=in_map, other=0.0).to(tl.float32)
        if keep is not None:
            g *= tl.load(keep + b).to(tl.float32)
        if dgamma is not None:
            sums += tl.sum(g * tl.load(y + channels_inner, mask=in_map, other=0.0).to(tl.float32), axis=1)
        if gamma is not None:
            g *= tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
        tl.store(dy + channels_inner, g.to(dy.dtype.element_ty), mask=in_map)
    if dgamma is not None:
        tl.store(dgamma + pid * C + c, sums, mask=c < C)
