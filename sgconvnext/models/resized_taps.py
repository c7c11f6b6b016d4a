"""The taps for a map of another size, as one operator to a compiler, which else traces small steps for every size."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..longconv.context import is_compiled_transform, is_open, is_recorded
from ..longconv.operator import operator
from .input_size import built_index, resize_taps


def taps_of_size(taps: Tensor, built: tuple[int, int], size: tuple[int, int], row_gap: int) -> Tensor:
    """The built taps at the built size, else those of `resize_taps`. In an export with open size they hold for all.

    Arguments and result are those of `resize_taps`.
    """
    if is_open(size):
        return resize_taps(taps, built, size, row_gap, is_open=True)
    if size == built:
        return taps
    if torch.compiler.is_compiling() and not is_recorded() and not is_compiled_transform():
        resized: Tensor = _Resized.apply(taps, *built, *size, row_gap)
        return resized
    return resize_taps(taps, built, size, row_gap)


def _like_resized(taps: Tensor, built_height: int, built_width: int, height: int, width: int, row_gap: int) -> Tensor:
    length, built_length = height * (width + row_gap), built_height * (built_width + row_gap)
    num_taps = 2 * length - 1 if taps.shape[1] == 2 * built_length - 1 else length
    return taps.new_empty((taps.shape[0], num_taps))


@operator("resized_taps", fake=_like_resized)
def _resized(taps: Tensor, built_height: int, built_width: int, height: int, width: int, row_gap: int) -> Tensor:
    """Taps (C, 2L-1), or (C, L) when causal, of the map (H, W) from those of the built map."""
    return resize_taps(taps, (built_height, built_width), (height, width), row_gap).contiguous()


def _like_backward(
    dresized: Tensor, num_taps: int, built_height: int, built_width: int, height: int, width: int, row_gap: int
) -> Tensor:
    return dresized.new_empty((dresized.shape[0], num_taps))


@operator("resized_taps_backward", fake=_like_backward)
def _resized_backward(
    dresized: Tensor, num_taps: int, built_height: int, built_width: int, height: int, width: int, row_gap: int
) -> Tensor:
    """The adjoint of `_resized`: the gradient of the built taps."""
    built, size = (built_height, built_width), (height, width)
    index, trained = built_index(num_taps, built, size, row_gap, False, dresized.device)
    zeros = dresized.new_zeros((dresized.shape[0], num_taps))
    return zeros.index_add(1, index, torch.where(trained, dresized, 0.0))


class _Resized(Function):
    """`_resized` with a derivative."""

    @staticmethod
    def forward(
        ctx: Any, taps: Tensor, built_height: int, built_width: int, height: int, width: int, row_gap: int
    ) -> Tensor:
        ctx.options = taps.shape[1], built_height, built_width, height, width, row_gap
        resized: Tensor = _resized(taps, built_height, built_width, height, width, row_gap)
        return resized

    @staticmethod
    def backward(ctx: Any, dresized: Tensor) -> tuple[Tensor | None, ...]:
        return _resized_backward(dresized, *ctx.options), None, None, None, None, None
