"""Part 2 of the GPU plan: the tiles of the Triton programs against each other, problem by problem, in bfloat16."""

import contextlib
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..longconv.triton import toeplitz as triton_toeplitz
from ..longconv.triton.tiles import Tile, conv_macs, conv_tile, dtaps_macs, dtaps_tile
from .gpu_ops import ROUNDED, SETS, SUMMED, poison, relative_error, signals
from .gpu_plan import Deadline, Plan
from .table import Table
from .timing import Step, Timing, interleave


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
BOUNDS = {"conv": ROUNDED, "dtaps": SUMMED}
NAMES = {"operator": "", "channels": "d", "L": "d", "batch": "d"}
COMPILING = 0.3  # of the time, at most, before anything is timed; what is left over is compiled when it is launched

Signals = tuple[Tensor, Tensor, Tensor]  # x, taps, dy


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
        return signals((self.batch, self.channels, self.length), device)

    def run(self, inputs: Signals, tile: Tile) -> Tensor:
        """The result by a tile."""
        from ..longconv.triton import programs as triton_programs

        x, taps, dy = inputs
        if self.operator == "conv":
            return triton_programs.convolve(x, taps, 1 - self.length, tile)
        return triton_programs.correlate(x, dy, 1 - self.length, tile)

    def macs(self, tile: Tile) -> int:
        """What is multiplied then."""
        if self.operator == "conv":
            return conv_macs(self.batch, self.channels, self.length, 1 - self.length, self.length - 1, tile)
        return dtaps_macs(self.batch, self.channels, self.length, 1 - self.length, tile)


def tables(plan: Plan, deadline: Deadline) -> list[Table]:
    """Every tile of every problem, and the fastest of each problem.

    Args:
        plan: sizes, modes, batches.
        deadline: after which the rest is left out, and said so.

    Raises:
        ValueError: there is no triton, or the device is not one that it runs on.
    """
    if reason := triton_toeplitz.refusal(torch.empty(0, dtype=torch.bfloat16, device=plan.device)):
        raise ValueError(reason)
    torch.manual_seed(0)
    tiles, winners = _tiles_table(plan), _winners_table()
    found = problems(plan)
    deadline.share(COMPILING).run("compiling all tiles at once", functools.partial(compile_ahead, found))
    for problem in found:
        errors, timings = compare(plan, problem, deadline)
        if errors:
            tiles.rows += rows(problem, errors, timings)
        if timings:
            winners.rows.append(winner(problem, timings))
    return [tiles, winners]


def problems(plan: Plan) -> list[Problem]:
    """Without those that stages share: forward at the batch of inference, forward and backward at that of training."""
    operators = [(mode, name) for mode in plan.modes for name in CANDIDATES if (mode, name) != ("inference", "dtaps")]
    return list(
        dict.fromkeys(
            Problem(name, stage.channels, stage.side**2, plan.batch(mode))
            for stage in plan.stages()
            for mode, name in operators
        )
    )


def compile_ahead(found: Sequence[Problem]) -> None:
    """Compile for all problems on all processors. What does not compile says so when it is launched."""
    # programs do not depend on the number of images
    work = dict.fromkeys((problem._replace(batch=1), tile) for problem in found for tile in problem.tiles())

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


def compare(plan: Plan, problem: Problem, deadline: Deadline) -> tuple[dict[Tile, float], dict[Tile, Timing]]:
    """Errors of the tiles that ran, and times of those that are right; the first is the chosen one, or there is none.

    What a tile is compared with is the chosen one's result.
    """
    inputs: list[Signals] = []
    truth: list[Tensor] = []
    errors: dict[Tile, float] = {}
    steps: dict[Tile, Step] = {}
    timings: dict[Tile, Timing] = {}

    def all_sets(tile: Tile) -> None:
        for each in inputs:
            problem.run(each, tile)

    def enter(tile: Tile) -> None:
        if not truth:
            inputs.extend(problem.signals(plan.device) for _ in range(SETS))
            truth.append(problem.run(inputs[0], tile))
        poison(truth)
        errors[tile] = relative_error(problem.run(inputs[0], tile), truth[0])
        if errors[tile] <= BOUNDS[problem.operator]:
            steps[tile] = _step(plan, functools.partial(all_sets, tile))

    def time() -> None:
        measured = interleave(list(steps.values()), torch.device(plan.device), plan.rounds, plan.seconds)
        timings.update(zip(steps, measured, strict=True))

    for tile in problem.tiles():
        if tile == problem.chosen or problem.chosen in steps:
            deadline.run(f"{_text(tile)} in {problem}", functools.partial(enter, tile))
    if steps:
        deadline.run(f"timing {problem}", time)
    return errors, timings


def _step(plan: Plan, run: Step) -> Step:
    """On a GPU a graph of what runs: the programs of late stages take less time than Python takes to launch them."""
    if plan.device != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _tiles_table(plan: Plan) -> Table:
    return Table(
        "Tiles of the Triton programs in bf16",
        NAMES | {"tile": "", "ms": ".4f", "spread, %": ".1f", "ratio": ".3f", "error": ".1e", "mark": ""},
        notes=[
            "conv: the convolution, forward or to the input, with laying out the taps; dtaps: their gradient. A tile "
            "is rows, columns, depth, warps and stages, as in longconv/tiles.py, whose choice comes first.",
            f"ms: median of {plan.rounds} rounds, {SETS} sets of inputs in turns; spread: (slowest - fastest round) / "
            "median; ratio: speed over the chosen tile's, as the median over pairs of turns; error: ||a - b|| / ||b|| "
            f"from its result, wrong above {BOUNDS['conv']:g} for conv and {BOUNDS['dtaps']:g} for dtaps; not timed: "
            "the notes at the end say why.",
        ],
    )


def rows(problem: Problem, errors: dict[Tile, float], timings: dict[Tile, Timing]) -> list[dict[str, Any]]:
    """One per tile; those that failed or are wrong have no time."""
    found = []
    for tile in problem.tiles():
        row = _named(problem) | {"tile": _text(tile), "error": errors.get(tile)}
        if tile in timings:
            marks = {"chosen": tile == problem.chosen, "fastest": tile == _fastest(timings)}
            row |= _speed(timings[tile]) | {"mark": ", ".join(name for name, here in marks.items() if here)}
        else:
            wrong = tile in errors and not errors[tile] <= BOUNDS[problem.operator]  # NaN is
            row["mark"] = "wrong" if wrong else "not timed"
        found.append(row)
    return found


def _winners_table() -> Table:
    return Table(
        "The fastest tiles",
        NAMES | {"chosen": "", "fastest": "", "ms": ".4f", "spread, %": ".1f", "ratio": ".3f", "TFLOP/s": ".1f"},
        notes=["ms and TFLOP/s: of the fastest; it multiplies what fills its tiles too, and that is counted."],
    )


def winner(problem: Problem, timings: dict[Tile, Timing]) -> dict[str, Any]:
    """The chosen tile beside the fastest."""
    fastest = _fastest(timings)
    rate = 2 * problem.macs(fastest) * SETS / timings[fastest].median / 1e12
    names = {"chosen": _text(problem.chosen), "fastest": _text(fastest)}
    return _named(problem) | names | _speed(timings[fastest]) | {"TFLOP/s": rate}


def _fastest(timings: dict[Tile, Timing]) -> Tile:
    """By the ratio, from which a machine that slows down drops out."""
    return max(timings, key=lambda tile: timings[tile].ratio)


def _named(problem: Problem) -> dict[str, Any]:
    return dict(zip(NAMES, problem, strict=True))


def _text(tile: Tile) -> str:
    """As tiles.py writes it."""
    return f"Tile{tuple(tile)}"


def _speed(timing: Timing) -> dict[str, Any]:
    return {
        "ms": 1000 * timing.median / SETS,
        "spread, %": 100 * timing.spread,
        "ratio": timing.ratio,
        "seconds": timing.by_round,
    }
