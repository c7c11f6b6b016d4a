"""The taps of a multi-scale kernel as the product of a sparse matrix with the parameters, and its adjoint: for CPUs.

Linear interpolation makes a tap of two parameters, or takes one. So

    K[lag] = sum_r M[lag, r] P[r]

where a row r of P has a parameter of every channel, times alpha^i / Z, and the last row is the skip. M does not depend
on the weights. `lag_taps(multiscale_kernel(weight, ...) / norm, skip)` of `kernel` is the definition; it copies all
taps four times, and its gradient by autograd copies them more often.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .kernel import KernelOptions, inverse_decay


class _Rows(NamedTuple):
    """A sparse matrix by its rows, as torch.embedding_bag takes it."""

    first: Tensor  # of each row, among the entries; and their number
    column: Tensor
    value: Tensor

    def times(self, dense: Tensor) -> Tensor:
        arguments = False, 0, False, self.value, True  # a plain sum, of entries with weights
        result: Tensor = torch.embedding_bag(dense, self.column, self.first, *arguments)[0]
        return result


def make_taps(weight: Tensor, skip: Tensor, norm: Tensor, length: int, options: KernelOptions) -> Tensor:
    """K by lag of Eq. 1.

    Args:
        weight: (directions, N, C, d), float32.
        skip: D of the paper (C).
        norm: Z of Eq. 1 (directions, C, 1).
        length: L.
        options: of the kernel.

    Returns:
        (C, 2L-1) for two directions, (C, L) for one. The channels of a tap lie side by side in memory.
    """
    directions, num_scales, channels, scale_dim = weight.shape
    parameters = weight.new_empty(directions * num_scales * scale_dim + 1, channels)
    scaled = parameters[:-1].view(directions, num_scales, scale_dim, channels)
    torch.div(weight.transpose(2, 3), _divisor(norm, num_scales, options), out=scaled)
    parameters[-1] = skip
    matrix, _ = _matrix(directions, num_scales, scale_dim, length, _exponent(options), weight.device)
    return matrix.times(parameters).t()


def weight_gradient(dtaps: Tensor, norm: Tensor, num_scales: int, scale_dim: int, options: KernelOptions) -> Tensor:
    """The gradient of a weight (directions, N, C, d) from that of its taps, in float32.

    Args:
        dtaps: (C, 2L-1), or (C, L) for one direction.
        norm: (directions, C, 1).
        num_scales, scale_dim: N and d.
        options: of the kernel.
    """
    directions, channels, _ = norm.shape
    length = (dtaps.shape[1] - 1) // directions + 1
    _, adjoint = _matrix(directions, num_scales, scale_dim, length, _exponent(options), dtaps.device)
    scaled = adjoint.times(dtaps.t().contiguous())[:-1].view(directions, num_scales, scale_dim, channels)
    dweight = scaled.new_empty(directions, num_scales, channels, scale_dim)
    return torch.div(scaled.transpose(2, 3), _divisor(norm, num_scales, options).transpose(2, 3), out=dweight)


def plain_weight_gradient(
    dtaps: Tensor, norm: Tensor, num_scales: int, scale_dim: int, options: KernelOptions
) -> Tensor:
    """`weight_gradient` in operators that transforms and forward mode know."""
    directions, channels, _ = norm.shape
    length = (dtaps.shape[1] - 1) // directions + 1
    _, adjoint = _matrix(directions, num_scales, scale_dim, length, _exponent(options), dtaps.device)
    row = torch.arange(len(adjoint.first) - 1, device=dtaps.device).repeat_interleave(adjoint.first.diff())
    parts = dtaps.index_select(1, adjoint.column) * adjoint.value
    sums = torch.zeros(channels, len(adjoint.first) - 1, dtype=parts.dtype, device=dtaps.device)
    scaled = torch.index_add(sums, 1, row, parts)[:, :-1].unflatten(1, (directions, num_scales, scale_dim))
    return scaled.permute(1, 2, 0, 3) / _divisor(norm, num_scales, options).transpose(2, 3)


def _exponent(options: KernelOptions) -> float:
    return options.exponent if options.decay == "position" else 0.0


def _divisor(norm: Tensor, num_scales: int, options: KernelOptions) -> Tensor:
    """Z alpha_c^-i (directions, N, 1, C), or Z (directions, 1, 1, C)."""
    norm = norm.reshape(len(norm), 1, 1, -1)
    return norm * _inverse_decay(num_scales, norm.shape[3], options, norm.device) if options.decay == "scale" else norm


@functools.lru_cache(maxsize=64)
def _inverse_decay(num_scales: int, channels: int, options: KernelOptions, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        like = torch.empty(1, num_scales, 1, channels, device=device, dtype=torch.float32)
        return inverse_decay(like, options)


@functools.lru_cache(maxsize=16)  # 75 MB for a million tokens, 4 MB for 256 x 256
def _matrix(
    directions: int, num_scales: int, scale_dim: int, length: int, exponent: float, device: torch.device
) -> tuple[_Rows, _Rows]:
    """M, and its adjoint."""
    # inference would make tensors that are good for nothing else, and the default device may have no memory
    with torch.inference_mode(False), torch.device("cpu"):
        places = [_interpolation(i, scale_dim, length, exponent) for i in range(num_scales)]
        tap, parameter, value = (torch.cat(each) for each in zip(*places, strict=True))
        lag_0 = (directions - 1) * (length - 1)
        lags, columns, values = [lag_0 + tap], [parameter], [value]
        if directions == 2:  # tap j of k- is lag -j-1; no output reaches the last one
            reached = tap < length - 1
            lags.append(lag_0 - 1 - tap[reached])
            columns.append(num_scales * scale_dim + parameter[reached])
            values.append(value[reached])
        rows = lag_0 + length, directions * num_scales * scale_dim + 1
        lags.append(torch.tensor([lag_0]))  # the skip
        columns.append(torch.tensor([rows[1] - 1]))
        values.append(torch.ones(1, dtype=torch.float64))
        lag, column, value = (torch.cat(each) for each in (lags, columns, values))
        return _by_row(lag, column, value, rows[0], device), _by_row(column, lag, value, rows[1], device)


def _interpolation(scale: int, scale_dim: int, length: int, exponent: float) -> tuple[Tensor, Tensor, Tensor]:
    """Taps, parameters of one direction, and with which weight a tap has a parameter, in float64; for one scale."""
    stretch = 2 ** max(scale - 1, 0)
    first = scale_dim * stretch if scale > 0 else 0
    last = max(first, min(first + scale_dim * stretch, length))  # a scale beyond the length has no tap
    tap = torch.arange(first, last, dtype=torch.float64)
    source = ((tap - first + 0.5) / stretch - 0.5).clamp(0, scale_dim - 1)  # as align_corners=False
    before = source.floor()
    share, after = source - before, (before + 1).clamp(max=scale_dim - 1)
    decay = (tap + 1) ** -exponent
    value = torch.cat([(1 - share) * decay, share * decay])
    used = value != 0
    parameter = scale * scale_dim + torch.cat([before, after])
    return torch.cat([tap, tap]).long()[used], parameter.long()[used], value[used]


def _by_row(row: Tensor, column: Tensor, value: Tensor, num_rows: int, device: torch.device) -> _Rows:
    order = row.argsort(stable=True)
    first = torch.zeros(num_rows + 1, dtype=torch.int32)  # half the memory of int64
    first[1:] = row.bincount(minlength=num_rows).cumsum(0)
    return _Rows(first.to(device), column[order].int().to(device), value[order].float().to(device))
