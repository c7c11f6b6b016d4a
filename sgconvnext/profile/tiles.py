"""The tiles of the Triton programs against each other, in bfloat16, and the table of the fastest for the code."""

import contextlib
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..longconv.triton import toeplitz as triton_toeplitz
from ..longconv.triton.tiles import Tile, conv_tile, dtaps_tile
from .ops import poison, relative_error
from .session import Session
from .table import Table
from .timing import RATIO, Step, Timing

Signals = tuple[Tensor, Tensor, Tensor]  # x, taps, dy

SETS = 3  # of inputs, one after another in a step: the L2 cache holds the whole input of a late stage
TOLERANCE = {"conv": 5e-3, "dtaps": 1e-4}  # relative: of results in bfloat16, of sums in float32


def _tiles(rows: int, columns: int, depth: int, warps: Sequence[int], stages: Sequence[int]) -> list[Tile]:
    return [Tile(rows, columns, depth, num_warps, num_stages) for num_warps in warps for num_stages in stages]


# by operator, the most promising first. 4 warps have registers for 128 x 128 sums, and 8 have work from 128 x 64 on.
CANDIDATES = {
    "conv": (  # and dx, which is one: images x outputs, inputs in a step
        *_tiles(128, 256, 64, warps=[8], stages=[3, 4]),
        *_tiles(256, 128, 64, warps=[8], stages=[3, 4]),
        *_tiles(128, 128, 64, warps=[8, 4], stages=[3, 4, 2]),
        *_tiles(128, 64, 64, warps=[4], stages=[3, 4, 2]),
        *_tiles(128, 64, 64, warps=[8], stages=[3]),
        *_tiles(64, 64, 64, warps=[4], stages=[2, 3, 4]),
        *_tiles(64, 128, 64, warps=[4], stages=[3, 4, 2]),
        *_tiles(128, 128, 32, warps=[8, 4], stages=[3, 4]),
    ),
    "dtaps": (  # outputs x inputs, images in a step; never more outputs than inputs
        *_tiles(128, 128, 64, warps=[8, 4], stages=[3, 4, 2]),
        *_tiles(64, 64, 64, warps=[4], stages=[3, 4, 2]),
        *_tiles(64, 128, 64, warps=[4], stages=[3, 4, 2]),
        *_tiles(128, 256, 64, warps=[8], stages=[3, 2]),
        *_tiles(128, 128, 32, warps=[8, 4], stages=[3, 4]),
        *_tiles(64, 64, 32, warps=[4], stages=[3, 4]),
        *_tiles(64, 128, 32, warps=[4], stages=[3, 4]),
    ),
}
NAMES = {"operator": "", "channels": "d", "L": "d", "batch": "d", "tile": ""}
COLUMNS = NAMES | {"ms": ".4f", "spread, %": ".1f", "ratio": ".3f", "error": ".1e", "mark": ""}
NOTES = [
    "conv: the convolution, forward or to the input, with laying out the taps; dtaps: the gradient of the taps. A "
    "tile: rows, columns, depth, warps, stages. ms: median over the rounds; "
    "spread: (slowest - fastest round) / median.",
    f"ratio: how many times as fast as the tile that the code chooses now. {RATIO}",
    "error: ||a - b|| / ||b|| from the chosen tile's result; wrong above "
    f"{', '.join(f'{bound:g} for {operator}' for operator, bound in TOLERANCE.items())}.",
]


class Problem(NamedTuple):
    """What one tile is chosen for."""

    operator: str  # of CANDIDATES
    channels: int
    length: int
    batch: int

    def __str__(self) -> str:
        return f"{self.operator} of {self.batch} x {self.channels} x {self.length}"

    @property
    def chosen(self) -> Tile:
        """What runs now."""
        return (conv_tile if self.operator == "conv" else dtaps_tile)(self.batch, self.length)

    def tiles(self) -> list[Tile]:
        """The chosen one, then the candidates that are less than twice as large as the problem in every direction."""
        batch, length = self.batch, self.length
        sizes = (batch, length, length) if self.operator == "conv" else (length, length, batch)
        candidates = CANDIDATES[self.operator]
        fitting = [tile for tile in candidates if all(a < 2 * b for a, b in zip(tile[:3], sizes, strict=True))]
        return list(dict.fromkeys([self.chosen, *fitting]))

    def signals(self, device: str) -> Signals:
        """Random x, taps and dy."""
        shape = self.batch, self.channels, self.length
        x, dy = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
        return x, torch.randn(self.channels, 2 * self.length - 1, device=device), dy

    def run(self, inputs: Signals, tile: Tile) -> Tensor:
        """The result by a tile."""
        from ..longconv.triton import programs as triton_programs

        x, taps, dy = inputs
        if self.operator == "conv":
            return triton_programs.convolve(x, taps, 1 - self.length, tile)
        return triton_programs.correlate(x, dy, 1 - self.length, tile)


def table(shapes: Sequence[tuple[int, int, int]], batches: Sequence[int], device: str, session: Session) -> Table:
    """Every tile of every problem, and the lines of the fastest for longconv/triton/tiles.py.

    Args:
        shapes: C, H, W of layers, each with another L = H * W; of rows that are g columns apart, C, H, W + g.
        batches: images at a time.
        device: "cuda", but for tests.
        session: rounds and time.

    Raises:
        ValueError: two shapes with the same L; there is no triton, or the device is not one that it runs on.
    """
    if reason := triton_toeplitz.refusal(torch.empty(0, dtype=torch.bfloat16, device=device)):
        raise ValueError(reason)
    by_length = {height * width: channels for channels, height, width in shapes}
    if len(by_length) < len(shapes):
        raise ValueError("two of the layers have the same H * W tokens, by which the tables go; leave one --shape out")
    torch.manual_seed(0)
    result = Table("Tiles of the Triton programs in bf16", COLUMNS, notes=list(NOTES))
    winners: dict[Problem, Tile] = {}
    for operator in CANDIDATES:
        for batch in sorted(batches):
            for length in sorted(by_length):
                problem = Problem(operator, by_length[length], length, batch)
                session.attempt(str(problem), functools.partial(_measure, problem, device, session, result, winners))
    result.notes += [line for operator in CANDIDATES for line in code(operator, winners)]
    return result


def code(operator: str, winners: dict[Problem, Tile]) -> list[str]:
    """The lines of an operator's table in longconv/triton/tiles.py, indented; a size holds for all below it."""
    own = {problem: tile for problem, tile in winners.items() if problem.operator == operator}
    longest = {problem.batch: problem.length for problem in own}  # they come in ascending order
    lines = []
    for (_, _, length, batch), tile in own.items():
        most = "ANY" if batch == max(longest) else batch
        lines.append(f"        ({most}, {'ANY' if length == longest[batch] else length}, {_text(tile)}),")
    return [f"    {operator.upper()}_TILES = (", *lines, "    )"] if lines else []


def compile_ahead(problems: Sequence[Problem]) -> None:
    """Compile for some problems on all processors. What does not compile says so when it is launched."""
    # programs do not depend on the number of images
    work = dict.fromkeys((problem._replace(batch=1), tile) for problem in problems for tile in problem.tiles())

    def compiled(pair: tuple[Problem, Tile]) -> None:
        problem, tile = pair
        with contextlib.suppress(Exception):
            problem.run(problem.signals("meta"), tile)

    # one of each program alone: the first reads the program's source, which old versions of triton do not lock
    for pair in {pair[0].operator: pair for pair in work}.values():
        compiled(pair)
    pool = ThreadPoolExecutor()
    try:
        list(pool.map(compiled, work))
    finally:
        pool.shutdown(cancel_futures=True)


def _measure(problem: Problem, device: str, session: Session, result: Table, winners: dict[Problem, Tile]) -> None:
    """Add the rows of a problem to a table. Tiles that fail, or differ from the chosen one's result, are not timed."""
    compile_ahead([problem])
    inputs = [problem.signals(device) for _ in range(SETS)]
    truth = problem.run(inputs[0], problem.chosen)
    errors: dict[Tile, float] = {}
    steps: dict[Tile, Step] = {}

    def enter(tile: Tile) -> None:
        poison([truth])
        errors[tile] = relative_error(problem.run(inputs[0], tile), truth)
        if errors[tile] <= TOLERANCE[problem.operator]:
            steps[tile] = _step(device, lambda: [problem.run(each, tile) for each in inputs])

    for tile in problem.tiles():
        session.attempt(f"{_text(tile)} in {problem}", functools.partial(enter, tile))
    if problem.chosen not in steps:  # there is nothing to compare with
        return
    timings = dict(zip(steps, session.time(str(problem), list(steps.values()), torch.device(device)), strict=True))
    # by the ratio, in which a slowdown of the machine cancels out
    winners[problem] = max(timings, key=lambda tile: timings[tile].ratio)
    result.rows += [_row(problem, tile, errors, timings, winners[problem]) for tile in problem.tiles()]


def _step(device: str, run: Step) -> Step:
    """On a GPU a graph of what runs: the programs of late stages take less time than Python takes to launch them."""
    if device != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _row(
    problem: Problem, tile: Tile, errors: dict[Tile, float], timings: dict[Tile, Timing], fastest: Tile
) -> dict[str, Any]:
    row = dict(zip(NAMES, (*problem, _text(tile)), strict=True)) | {"error": errors.get(tile)}
    if tile not in timings:
        return row | {"mark": "wrong" if tile in errors else "not timed"}
    timing = timings[tile]
    marks = {"chosen": tile == problem.chosen, "fastest": tile == fastest}
    return row | {
        "ms": 1000 * timing.median / SETS,
        "spread, %": 100 * timing.spread,
        "ratio": timing.ratio,
        "mark": ", ".join(mark for mark, here in marks.items() if here),
        "seconds": timing.by_round,
    }


def _text(tile: Tile) -> str:
    """As tiles.py writes it."""
    return f"Tile{tuple(tile)}"
