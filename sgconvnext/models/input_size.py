"""Another image size than the one that the kernels are built for: two policies.

`resize_taps` is what a forward does at another size: every tap keeps its 2-D offset, and nothing is trained anew.
`stretch` is what `set_input_size` does once, before fine-tuning: every offset of the new size gets a parameter.
"""

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor

STEM_STRIDE = 4
MIN_SIZE = 32  # pixels: one token is left in the last stage


def stage_grids(img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
    """H, W of the four stages' maps at stride 4, 8, 16, 32."""
    height, width = to_2tuple(img_size)
    if min(height, width) < MIN_SIZE:
        raise ValueError(
            f"img_size={height}x{width} leaves the last stage no token; use at least {MIN_SIZE}x{MIN_SIZE}"
        )
    strides = [STEM_STRIDE * 2**i for i in range(4)]
    return [(height // stride, width // stride) for stride in strides]


def map_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """H, W of a feature map, from a pair or from one int for a square."""
    height, width = to_2tuple(size)
    if height < 1 or width < 1:
        raise ValueError(f"input_size=({height}, {width}) must be at least 1 x 1")
    return int(height), int(width)


def scale_dim_with_gap(height: int, width: int, row_gap: int) -> int:
    """d of a layer whose rows are g columns apart: d = max(ceil(L / 16), ceil((g (W + g) + g + 1) / 2)), at most L.

    L = H (W + g). The first two scales have a parameter for every tap. With this d they reach the lags of a
    (2g+1) x (2g+1) kernel, of which the farthest is g (W + g) + g.
    """
    length = height * (width + row_gap)
    reach = row_gap * (width + row_gap) + row_gap + 1
    return min(length, max(-(-length // 16), -(-reach // 2)))


def resize_taps(taps: Tensor, built: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Taps for another feature map, each at the 2-D offset that it was built for.

    On a map W wide, lag = dy * W + dx with -W/2 <= dx < W/2 is read as the offset (dy, dx). The tap of a lag on the
    new map is the built tap of the same offset. Offsets that the built map does not have were never trained: their
    taps are zero. Pixels more than W/2 columns apart share their lag, and so their tap, with a near column of the next
    row: there the two sizes differ.

    Args:
        taps: built for a map of ``built`` = (H0, W0): (C, 2 H0 W0 - 1), or (C, H0 W0) when causal.
        built: (H0, W0).
        size: (H, W) of the new map; with size == built the taps stay as they are.

    Returns:
        taps (C, 2HW - 1), or (C, HW) when causal and built for more than one token.
    """
    length, built_length = size[0] * size[1], built[0] * built[1]
    causal = taps.shape[-1] != 2 * built_length - 1
    dy, dx = _offset(torch.arange(0 if causal else 1 - length, length, device=taps.device), size[1])
    index = dy * built[1] + dx - (0 if causal else 1 - built_length)
    half = built[1] // 2
    trained = (dx >= -half) & (dx < built[1] - half) & (index >= 0) & (index < taps.shape[-1])
    return torch.where(trained, taps.index_select(1, index.clamp(0, taps.shape[-1] - 1)), 0.0)


def _offset(lag: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(dy, dx) of each lag, -W/2 <= dx < W/2."""
    half = width // 2
    dy = torch.div(lag + half, width, rounding_mode="floor")
    return dy, lag - dy * width


def stretch(weight: Tensor, scale_dim: int) -> Tensor:
    """Every scale w_i of a weight (directions, N, C, d), interpolated linearly to another number of taps."""
    stretched = F.interpolate(weight.flatten(0, 1), size=scale_dim, mode="linear", align_corners=False)
    return stretched.unflatten(0, weight.shape[:2])
