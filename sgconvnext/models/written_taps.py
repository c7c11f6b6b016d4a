"""The taps of a multi-scale kernel, each scale written once to where it belongs, and the adjoint of that: for CPUs.

`lag_taps(multiscale_kernel(weight, ...) / norm, skip)` of `kernel` is the definition. It copies all taps four times,
and its gradient by autograd more often. Here a row of memory is a lag, or a parameter, with all its channels. The
parameters are in the order of their lags: the scales of k- from the last to the first, each in reverse, then k+.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel import KernelOptions, inverse_decay, num_scales_for


def write_taps(weight: Tensor, skip: Tensor, norm: Tensor, length: int, options: KernelOptions) -> Tensor:
    """K by lag of Eq. 1.

    Args:
        weight: (directions, N, C, d), float32 or float64.
        skip: D of the paper (C).
        norm: Z of Eq. 1 (directions, C, 1).
        length: L.
        options: of the kernel.

    Returns:
        (C, 2L-1) for two directions, (C, L) for one. The channels of a tap lie side by side in memory.
    """
    directions, _, channels, size = weight.shape
    used = num_scales_for(length, size)  # scales beyond the length have no tap
    factor = _factor(norm, used, options)
    parameters = weight.new_empty(directions * used * size, channels)
    by_scale, weight = parameters.view(-1, size, channels), weight[:, :used].transpose(2, 3)
    torch.mul(weight[0], factor[0], out=by_scale[-used:])
    if directions == 2:
        by_scale[:used] = (weight[1] * factor[1]).flip(0, 1)

    reach = size * 2 ** (used - 1)
    lag_0 = (directions - 1) * reach
    taps = weight.new_empty(lag_0 + reach, channels)
    for first, count, lag, number in _blocks(directions, used, size):
        if count == number:
            taps[lag_0 + lag : lag_0 + lag + number] = parameters[first : first + count]
        else:
            image, place = _image(parameters, first, count), _image(taps, lag_0 + lag, number)
            torch.ops.aten.upsample_bilinear2d.out(image, [1, number], False, out=place)
    taps[lag_0] += skip
    taps = taps[lag_0 - (directions - 1) * (length - 1) : lag_0 + length]
    if options.decay == "position":
        taps *= _decay_by_position(taps, length, options)
    return taps.t()


def read_gradient(dtaps: Tensor, norm: Tensor, num_scales: int, scale_dim: int, options: KernelOptions) -> Tensor:
    """The gradient of a weight (directions, N, C, d) from that of its taps.

    Args:
        dtaps: (C, 2L-1), or (C, L) for one direction.
        norm: (directions, C, 1).
        num_scales, scale_dim: N and d.
        options: of the kernel.
    """
    directions, channels, _ = norm.shape
    taps = dtaps.t().contiguous()
    length = (len(taps) - 1) // directions + 1
    if options.decay == "position":
        taps = taps * _decay_by_position(taps, length, options)
    used, lag_0 = num_scales_for(length, scale_dim), len(taps) - length
    parameters = taps.new_empty(directions * used * scale_dim, channels)
    for first, count, lag, number in _blocks(directions, used, scale_dim):
        start, stop = lag_0 + lag, lag_0 + lag + number
        block = taps[max(start, 0) : stop]
        if len(block) < number:  # the last scale is cut
            block = F.pad(block, (0, 0, max(-start, 0), max(stop - len(taps), 0)))
        if count == number:
            parameters[first : first + count] = block
        else:
            torch.ops.aten.upsample_bilinear2d_backward.grad_input(
                _image(block, 0, number),
                [1, number],
                [1, channels, 1, count],
                False,
                grad_input=_image(parameters, first, count),
            )
    factor, by_scale = _factor(norm, used, options).transpose(2, 3), parameters.view(-1, scale_dim, channels)
    dweight = (taps.new_empty if used == num_scales else taps.new_zeros)(directions, num_scales, channels, scale_dim)
    torch.mul(by_scale[-used:].transpose(1, 2), factor[0], out=dweight[0, :used])
    if directions == 2:
        torch.mul(by_scale[:used].flip(0, 1).transpose(1, 2), factor[1], out=dweight[1, :used])
    return dweight


def _blocks(directions: int, num_scales: int, scale_dim: int) -> Iterator[tuple[int, int, int, int]]:
    """First parameter, parameters, lag of the first tap, taps.

    A block is a scale, but those with a tap for each parameter are one block.
    """
    middle = (directions - 1) * num_scales * scale_dim  # the first parameter of k+
    near, far = scale_dim * min(2, num_scales), range(2, num_scales)
    for i in reversed(far) if directions == 2 else ():
        yield middle - (i + 1) * scale_dim, scale_dim, -scale_dim * 2**i, scale_dim * 2 ** (i - 1)
    before = (directions - 1) * near
    yield middle - before, before + near, -before, before + near
    for i in far:
        yield middle + i * scale_dim, scale_dim, scale_dim * 2 ** (i - 1), scale_dim * 2 ** (i - 1)


def _factor(norm: Tensor, num_scales: int, options: KernelOptions) -> Tensor:
    """alpha_c^i / Z (directions, N, 1, C)."""
    norm = norm.transpose(1, 2).unsqueeze(1).expand(-1, num_scales, -1, -1)
    return 1 / (norm * inverse_decay(norm, options) if options.decay == "scale" else norm)


def _decay_by_position(taps: Tensor, length: int, options: KernelOptions) -> Tensor:
    """(j + 1)^-exponent of tap j, for every row (T, 1)."""
    lags = torch.arange(length - len(taps), length, device=taps.device)
    places = torch.where(lags < 0, -lags, lags + 1)  # tap j of k- has lag -j-1
    return places[:, None].to(taps.dtype) ** -options.exponent


def _image(rows: Tensor, first: int, count: int) -> Tensor:
    """Some rows (n, C) as one row of an image (1, C, 1, n), which torch resizes faster than a signal."""
    channels, all_of_it = rows.shape[1], count * rows.shape[1]
    start = rows.storage_offset() + first * channels
    return rows.as_strided((1, channels, 1, count), (all_of_it, 1, all_of_it, channels), start)
