"""How the Triton programs cut a long convolution into tiles, and what the tensor cores multiply then.

There are two programs, with one matrix product per channel each. The convolution multiplies the signals by the
Toeplitz matrix of the taps (images x inputs x outputs). The gradient of the taps multiplies dy by x (outputs x images
x inputs): the sums over the diagonals of this product are the gradient.
"""

from typing import NamedTuple

ANY = 2**31  # as good as no limit


class Tile(NamedTuple):
    """One program's share: rows x columns results, summed over steps of depth products each."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def macs(self) -> int:
        """Multiply-adds of one step."""
        return self.rows * self.columns * self.depth


# (largest batch, largest length, tile): the first that fits is taken. Timed on an H200 in bfloat16 at batch 8, 32, 128
# and 256, on the maps of tiny at 224 px; ``python -m sgconvnext.profile tiles`` does it again.
# Four stages would be 1 to 3 % faster for the longest signals, and have no room on an A100.
# tests/end_to_end/test_triton_compile.py checks what each compiles to for sm_90.
CONV_TILES = (  # images x outputs, inputs in a step
    (32, 64, Tile(32, 64, 64, 4, 2)),  # up to 32 images the taps are most of what is read: read them once
    (32, ANY, Tile(32, 128, 64, 4, 3)),
    (ANY, 16, Tile(128, 16, 16, 4, 2)),
    (ANY, 64, Tile(64, 64, 64, 4, 2)),
    (64, ANY, Tile(64, 128, 64, 4, 3)),
    (ANY, 256, Tile(128, 128, 32, 4, 3)),
    (128, 1024, Tile(128, 128, 32, 4, 4)),
    (128, ANY, Tile(128, 256, 64, 8, 3)),
    (ANY, ANY, Tile(256, 128, 64, 8, 3)),
)
DTAPS_TILES = (  # outputs x inputs, images in a step; no more outputs than inputs
    (32, 1024, Tile(64, 64, 32, 4, 3)),
    (32, ANY, Tile(64, 128, 32, 4, 3)),
    (ANY, 32, Tile(64, 64, 64, 4, 3)),
    (ANY, 64, Tile(64, 64, 32, 4, 3)),
    (128, 256, Tile(64, 64, 32, 4, 3)),
    (ANY, 256, Tile(64, 64, 64, 4, 3)),
    (128, 1024, Tile(64, 64, 64, 4, 3)),
    (ANY, ANY, Tile(128, 128, 64, 4, 3)),
)


def conv_tile(batch: int, length: int) -> Tile:
    """The tile of the convolution of that many signals of that length."""
    return _first_that_fits(CONV_TILES, batch, length)


def dtaps_tile(batch: int, length: int) -> Tile:
    """The tile of the gradient of the taps."""
    return _first_that_fits(DTAPS_TILES, batch, length)


def _first_that_fits(table: tuple[tuple[int, int, Tile], ...], batch: int, length: int) -> Tile:
    return next(tile for max_batch, max_length, tile in table if batch <= max_batch and length <= max_length)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def lag_windows(length: int, first_lag: int, tile: Tile) -> tuple[int, int]:
    """First and number of the q for which tiles with s0 = t0 - q * columns hold a lag in first_lag .. L-1."""
    first = -(-first_lag // tile.columns)
    last_row = (length - 1) // tile.rows * tile.rows
    return first, ceil_div(last_row, tile.columns) + 1 - first


def conv_macs(batch: int, channels: int, length: int, first_lag: int, last_lag: int, tile: Tile | None = None) -> int:
    """Multiply-adds of a convolution by taps for those lags, with what fills tiles up to their size.

    The tile is that of `conv_tile` unless another is given.
    """
    tile = tile or conv_tile(batch, length)
    steps = 0
    for t0 in range(0, length, tile.columns):
        begin = max(t0 - last_lag, 0) // tile.depth * tile.depth
        end = min(t0 + tile.columns - first_lag, length)
        steps += ceil_div(end - begin, tile.depth)
    return channels * ceil_div(batch, tile.rows) * steps * tile.macs


def dtaps_macs(batch: int, channels: int, length: int, first_lag: int, tile: Tile | None = None) -> int:
    """Multiply-adds of the gradient of taps for the lags first_lag .. L-1, with what fills tiles up to their size.

    The tile is that of `dtaps_tile` unless another is given.
    """
    tile = tile or dtaps_tile(batch, length)
    first, count = lag_windows(length, first_lag, tile)
    steps = 0
    for q in range(first, first + count):
        begin = max((q - 1) * tile.columns // tile.rows + 1, 0)
        end = min(length - 1 + q * tile.columns, length - 1) // tile.rows + 1
        steps += end - begin
    return channels * ceil_div(batch, tile.depth) * steps * tile.macs
