"""What the compiler makes of the block's Triton programs for an H100: no spills, and words as wide as rows allow."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the block's Triton operators need triton")

from sgconvnext.longconv.triton.block_programs import BACKWARD_LIMIT, FORWARD_LIMIT, norm_tile, residual_tile

TESTS = Path(__file__).parent
# by program, what it reads and writes of every tile: x and dx have tokens inner, y and dy channels; s is the shortcut,
# and the copy of the sum is like x
TRAFFIC = {
    "_norm_forward": ("x", "y"),
    "_norm_backward": ("xy", "x"),
    "_residual_forward": ("sy", "sx"),
    "_residual_backward": ("sxy", "sy"),
}


def compiled(models: list[str], cache: Path) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "triton_block_compiled.py"), *models],
        env=environment | {"PYTHONPATH": str(TESTS.parent), "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def word(row: int) -> int:
    """The widest word in bytes, of 16 at most, that starts every row of so many bytes."""
    return min(16, row & -row)


def tiles(program: str, channels: int, length: int, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Bytes that a tile has of each operand, and the width of words that they could be moved in."""
    limit = FORWARD_LIMIT if "forward" in program else BACKWARD_LIMIT
    tile = norm_tile(channels, dtype, limit) if "norm" in program else residual_tile(channels)
    elements = min(channels, tile.channels) * min(length, tile.tokens)  # the compiler drops what lies outside
    return {
        "x": (elements * dtype.itemsize, word(length * dtype.itemsize)),
        "y": (elements * dtype.itemsize, word(channels * dtype.itemsize)),
        "s": (elements * 4, word(length * 4)),
    }


def test_programs_stay_in_registers_and_move_wide_words(tmp_path: Path) -> None:
    models = ["tiny:bfloat16", "base:bfloat16", "large:bfloat16", "tiny:float32"]
    rows = compiled(models, tmp_path)
    assert len(rows) == 4 * len(TRAFFIC) * len(models)
    for row in rows:
        operands = tiles(row["program"], row["channels"], row["length"], getattr(torch, row["dtype"]))
        assert row["stack"] == row["spills"] == 0, row
        for moved, names in zip((row["loaded"], row["stored"]), TRAFFIC[row["program"]], strict=True):
            by_width = {int(width): size for width, size in moved.items()}
            wanted = [operands[name] for name in names]
            for _, width in wanted:
                at_least = sum(size for size, its_width in wanted if its_width >= width)
                assert sum(size for its_width, size in by_width.items() if its_width >= width) >= at_least, row
            narrower = sum(size for width, size in by_width.items() if width < min(width for _, width in wanted))
            assert narrower < min(size for size, _ in wanted), row  # no more than weights and statistics
