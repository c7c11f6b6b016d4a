"""Another image size than the one that the kernels are built for: two rules.

`resize_taps` keeps the 2-D offset of every tap. A forward pass at another size uses it, and so does `set_input_size`
if there is a gap between the rows. `stretch` interpolates the parameters; `set_input_size` uses it without a gap.
"""

from numbers import Integral

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor

STEM_STRIDE = 4
MIN_SIZE = 32  # pixels: one token is left in the last stage


def stage_grids(img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
    """H, W of the four stages' maps at stride 4, 8, 16, 32."""
    pair = to_2tuple(img_size)
    if len(pair) != 2 or not all(isinstance(side, Integral) for side in pair):
        raise ValueError(f"img_size={img_size!r} must be a whole number of pixels, or a pair: height, width")
    height, width = pair
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
    """d of a layer whose rows are g columns apart: the least that holds a (2g+1) x (2g+1) kernel, but at least L/16.

        d = max(ceil(L / 16), ceil((g (W + g) + g + 1) / 2)), at most L;   L = H (W + g)

    The 2d taps of the first two scales have a parameter each. They include lag g (W + g) + g, the farthest one of that
    kernel.
    """
    length = height * (width + row_gap)
    reach = row_gap * (width + row_gap) + row_gap + 1
    return min(length, max(-(-length // 16), -(-reach // 2)))


def resize_taps(
    taps: Tensor, built: tuple[int, int], size: tuple[int, int], row_gap: int = 0, is_open: bool = False
) -> Tensor:
    """Taps for another feature map, each at the 2-D offset that it was built for.

    Rows are R = W + g apart. lag = dy * R + dx with -R/2 <= dx < R/2 is read as the offset (dy, dx). The tap of a lag
    on the new map is the built tap of the same offset. Offsets that the built map does not have were never trained:
    their taps are zero. Pixels more than R/2 columns apart share their lag, and so their tap, with a near column of
    the next row: there the two sizes differ.

    Args:
        taps: built for a map of ``built`` = (H0, W0), L0 = H0 (W0 + g): (C, 2 L0 - 1), or (C, L0) when causal.
        built: (H0, W0).
        size: (H, W) of the new map, L = H (W + g); without a gap, size == built leaves the taps as they are.
        row_gap: g, zero columns between two rows.
        is_open: whether an export leaves the size open. The taps then stay as they are at the built size, with a gap
            too.

    Returns:
        taps (C, 2L - 1), or (C, L) when causal and built for more than one token.
    """
    index, trained = built_index(taps.shape[-1], built, size, row_gap, is_open, taps.device)
    return torch.where(trained, taps.index_select(1, index), 0.0)


def built_index(
    num_taps: int, built: tuple[int, int], size: tuple[int, int], row_gap: int, is_open: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For every lag of the new map the built tap of the same offset, and whether there is a trained one.

    Arguments as of `resize_taps`; both results have one element per lag.
    """
    row, built_row = size[1] + row_gap, built[1] + row_gap
    length, built_length = size[0] * row, built[0] * built_row
    causal = num_taps != 2 * built_length - 1
    dy, dx = _offset(torch.arange(0 if causal else 1 - length, length, device=device), row)
    index = dy * built_row + dx - (0 if causal else 1 - built_length)
    half = built_row // 2
    trained = (dx >= -half) & (dx < built_row - half) & (index >= 0) & (index < num_taps)
    if row_gap > 0:  # no two pixels of the built map are so far apart: these taps met zeros only, and learnt nothing
        met = (dy.abs() < built[0]) & (dx.abs() < built[1])
        if is_open:
            is_built = (torch.scalar_tensor(size[0]) == built[0]) & (torch.scalar_tensor(size[1]) == built[1])
            met = met | is_built.to(met.device)
        trained = trained & met
    return index.clamp(0, num_taps - 1), trained


def _offset(lag: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """(dy, dx) of each lag, -R/2 <= dx < R/2."""
    half = row // 2
    dy = torch.div(lag + half, row, rounding_mode="floor")
    return dy, lag - dy * row


def stretch(weight: Tensor, scale_dim: int) -> Tensor:
    """Every scale w_i of a weight (directions, N, C, d), interpolated linearly to another number of taps."""
    stretched = F.interpolate(weight.flatten(0, 1), size=scale_dim, mode="linear", align_corners=False)
    return stretched.unflatten(0, weight.shape[:2])


def split_phases(x: Tensor, dilation: int) -> Tensor:
    """(B, C, H, W) to its r x r subsampled maps (r r B, C, ceil(H/r), ceil(W/r)), the last ones filled with zeros."""
    batch, channels, height, width = x.shape
    rows, columns = -(-height // dilation), -(-width // dilation)
    x = F.pad(x, (0, columns * dilation - width, 0, rows * dilation - height))
    x = x.reshape(batch, channels, rows, dilation, columns, dilation)
    return x.permute(3, 5, 0, 1, 2, 4).flatten(0, 2)


def join_phases(x: Tensor, dilation: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `split_phases`."""
    x = x.unflatten(0, (dilation, dilation, -1)).permute(2, 3, 4, 0, 5, 1)
    return x.flatten(4, 5).flatten(2, 3)[:, :, : size[0], : size[1]]
