"""Long convolution of maps by the matrices of a 2-D DFT, for exports that leave the size of the maps open.

A sample at position q R + s of a map with H rows of R, and a tap of lag d R + r, 0 <= r < R, meet at position
(q + d) R + (s + r). So the convolution is one over rows, with d from -H to H-1, and columns. It makes 2R-1 columns, of
which those from R on belong to the next row:

    y[p, i] = Z[p, i] + Z[p - 1, i + R]        Z = F^-1 (F x * F k),  F a DFT of 2H rows and 2R-1 columns

The rows q + d go from -H to 2H-2. The DFT of 2H rows folds some of them together, but none onto the rows
-1 .. H-1, which are all that y needs.

All products are in float32 (float64 for float64). Nothing in it is larger than four times the maps: `dft` has H
matrices of 2R x 2R for every channel, which a runtime would have to make anew in every call, where it cannot know H
and R before.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dft import waves
from .precision import full_precision


def convolve_rows(x: Tensor, taps: Tensor) -> Tensor:
    """y (B, C, H, R) of maps x and taps (C, 2HR-1) for the lags -(HR-1) .. HR-1; H and R may be open in an export."""
    height, width = x.shape[2:]
    dtype = full_precision(x.dtype)
    x, taps = x.to(dtype), taps.to(dtype)
    # an export takes about a second for every angle and matrix, so all matrices are parts of these four
    rows, columns = torch.arange(-height, height, device=x.device), torch.arange(width, device=x.device)
    down = waves(rows, rows, 2 * height, dtype)  # (2H, 2H) each, symmetric
    along = waves(columns, torch.arange(2 * width - 1, device=x.device), 2 * width - 1, dtype)  # (R, 2R-1) each
    across = torch.cat([wave[:, :width] for wave in along], 1)  # (R, 2R), to the R frequencies
    kernel = _transform(F.pad(taps, (1, 0)).unflatten(-1, (2 * height, width)), across, _complex(*down))
    real, imaginary = _transform(x, across, _complex(down[0][:, height:], down[1][:, height:]))
    parts = [real * kernel[0] - imaginary * kernel[1], real * kernel[1] + imaginary * kernel[0]]
    up = _complex(down[0][height - 1 :], down[1][height - 1 :], sign=-1) / (2 * height)  # (2H+2, 4H)
    sums = _beside(torch.matmul(up, torch.cat(parts, 2)), height + 1)  # (B, C, H+1, 2R); the first row is p = -1
    weight = (2 - (columns == 0).to(dtype))[:, None] / (2 * width - 1)  # frequency 0 counts once
    back = F.pad(torch.cat([weight * wave for wave in along], 0), (0, 1))  # an export takes no R - 1 that may be 1
    z = torch.matmul(sums, back)  # (B, C, H+1, 2R), the last column of zeros
    return z[:, :, 1:, :width] + z[:, :, :-1, width:]


def _complex(real: Tensor, imaginary: Tensor, sign: int = 1) -> Tensor:
    """The matrix (2m, 2n) of a complex matrix (m, n), or of its conjugate, for real parts above imaginary ones."""
    imaginary = sign * imaginary
    return torch.cat([torch.cat([real, -imaginary], 1), torch.cat([imaginary, real], 1)], 0)


def _beside(stacked: Tensor, size: int) -> Tensor:
    """(..., 2 size, R) as (..., size, 2R): what was below comes to the right."""
    return torch.cat([stacked[..., :size, :], stacked[..., size:, :]], -1)


def _transform(maps: Tensor, across: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part (..., 2H, R) of the DFT of maps (..., n, R): matrices (R, 2R) and (4H, 2n)."""
    points, width = down.shape[0] // 2, maps.shape[-1]
    spectrum = torch.matmul(maps, across)
    stacked = torch.cat([spectrum[..., :width], spectrum[..., width:]], -2)
    both = torch.matmul(down, stacked)
    return both[..., :points, :], both[..., points:, :]
