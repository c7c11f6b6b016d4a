"""profile tiles with the Triton programs in the interpreter: rows, wrong tiles, and the table for the code."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import refused
from torch import Tensor

from sgconvnext.longconv.triton import toeplitz as triton_toeplitz
from sgconvnext.longconv.triton.tiles import Tile
from sgconvnext.profile import __main__ as main
from sgconvnext.profile import ops, tiles, timing
from sgconvnext.profile.session import Session
from sgconvnext.profile.tiles import Problem
from sgconvnext.profile.timing import Timing

SMALL, DEEP = Tile(16, 16, 16, 4, 2), Tile(16, 16, 32, 4, 2)
CONV, DTAPS = Tile(32, 64, 64, 4, 2), Tile(64, 64, 32, 4, 3)  # what tiles.py chooses for a few short signals


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Triton programs in the interpreter, for two candidates of each operator."""
    pytest.importorskip("triton")
    if not triton_toeplitz._RUNS_ON_CPU:
        pytest.skip("of the interpreter")
    from sgconvnext.longconv.triton import programs as triton_programs

    for operator in tiles.CANDIDATES:
        monkeypatch.setitem(tiles.CANDIDATES, operator, (SMALL, DEEP))
    monkeypatch.setattr(tiles, "SETS", 1)
    monkeypatch.setattr(timing, "TURN_S", 1e-4)
    return triton_programs


def timed(self: Session, what: str, steps: list[Any], device: Any) -> list[Timing]:
    """Every tile is faster than the one before."""
    return [Timing([[1 / (i + 1)]], [[1.0]]) for i in range(len(steps))]


def test_tiles_of_every_problem_are_timed_and_the_fastest_are_lines_for_the_code(
    programs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "time", timed)
    found = tiles.table([(2, 6, 6), (1, 5, 5)], [18, 17], "cpu", own := Session(1, 1.0))
    assert not own.failed
    problems = [
        (operator, channels, length, batch)
        for operator in ("conv", "dtaps")
        for batch in (17, 18)
        for channels, length in ((1, 25), (2, 36))
    ]
    assert [tuple(row[name] for name in ("operator", "channels", "L", "batch")) for row in found.rows[::3]] == problems
    for problem, *rows in zip(problems, found.rows[::3], found.rows[1::3], found.rows[2::3], strict=True):
        chosen = CONV if problem[0] == "conv" else DTAPS
        assert [row["tile"] for row in rows] == [f"Tile{tuple(tile)}" for tile in (chosen, SMALL, DEEP)]
        assert all(row["error"] < 1e-2 for row in rows)
        assert [row["ratio"] for row in rows] == [1, 2, 3]
        assert [row["mark"] for row in rows] == ["chosen", "", "fastest"]
    assert sum("Tile(" in note for note in found.notes) == len(problems)


def test_lines_for_the_code_hold_for_all_sizes_below() -> None:
    winners = {
        Problem("conv", channels, length, batch): Tile(length, batch, 16, 4, 2)
        for batch in (32, 256)
        for length, channels in ((16, 768), (49, 384))
    }
    lines = tiles.code("conv", winners)
    assert lines[0] == "    CONV_TILES = ("
    table = eval("".join(lines[1:-1]), {"ANY": 2**31, "Tile": Tile})
    assert table == (
        (32, 16, Tile(16, 32, 16, 4, 2)),
        (32, 2**31, Tile(49, 32, 16, 4, 2)),
        (2**31, 16, Tile(16, 256, 16, 4, 2)),
        (2**31, 2**31, Tile(49, 256, 16, 4, 2)),
    )
    assert tiles.code("dtaps", winners) == []


def changed(function: Callable[..., Tensor], tile: Tile, fault: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A program whose result is another one for a tile."""
    return lambda *arguments: (fault if arguments[-1] == tile else lambda result: result)(function(*arguments))


def too_large(result: Tensor) -> Tensor:
    raise ValueError("out of resource:\nshared memory")


@pytest.mark.parametrize(
    ("operator", "fault", "mark"),
    [
        ("conv", too_large, "not timed"),
        ("conv", lambda y: y * 1.02, "wrong"),
        ("conv", lambda y: y * 1.003, ""),
        ("conv", lambda y: y * math.nan, "wrong"),
        ("conv", lambda y: torch.full_like(y, 1e-9), "wrong"),
        ("dtaps", lambda dtaps: dtaps * 1.001, "wrong"),
        ("dtaps", lambda dtaps: dtaps.flip(-1), "wrong"),
    ],
)
def test_tile_that_fails_or_is_wrong_is_said_so_and_never_the_fastest(
    operator: str, fault: Callable[[Tensor], Tensor], mark: str, programs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"conv": "convolve", "dtaps": "correlate"}[operator]
    monkeypatch.setattr(programs, name, changed(getattr(programs, name), SMALL, fault))
    monkeypatch.setattr(tiles, "CANDIDATES", {operator: (SMALL, DEEP)})
    monkeypatch.setattr(Session, "time", timed)
    found = tiles.table([(2, 5, 5)], [17], "cpu", own := Session(1, 1.0))
    chosen, small, deep = found.rows
    assert (chosen["mark"], small["mark"], deep["mark"]) == ("chosen", mark, "fastest")
    assert ("ms" in small) == (mark == "")
    failed = f"Tile(16, 16, 16, 4, 2) in {operator} of 17 x 2 x 25 failed: out of resource: shared memory"
    assert own.problems == ([failed] if mark == "not timed" else [])
    assert found.notes[-2:] == [f"        (ANY, ANY, {deep['tile']}),", "    )"]


def test_tile_that_writes_nothing_is_wrong(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is given the memory that right results were in before."""
    memory: list[Tensor] = []
    real, poison = programs._launch, tiles.poison

    def launch(*arguments: Any) -> None:
        y = arguments[2][2]
        if arguments[-1] == SMALL:
            y.copy_(memory[-1])
        else:
            real(*arguments)
            memory.append(y.clone())

    def poisoned(like: Any) -> None:
        poison(like)
        memory.append(torch.full_like(like[0], torch.nan))

    monkeypatch.setattr(programs, "_launch", launch)
    monkeypatch.setattr(tiles, "poison", poisoned)
    monkeypatch.setattr(tiles, "CANDIDATES", {"conv": (SMALL, DEEP)})
    monkeypatch.setattr(Session, "time", timed)
    rows = tiles.table([(2, 5, 5)], [17], "cpu", Session(1, 1.0)).rows
    assert [row["mark"] for row in rows] == ["chosen", "wrong", "fastest"]


def test_problems_are_those_of_the_backend(programs: Any) -> None:
    for problem in (Problem("conv", 2, 25, 17), Problem("dtaps", 2, 25, 17)):
        inputs = problem.signals("cpu")
        y, _, dtaps = ops.results("fft", *inputs)
        assert ops.relative_error(problem.run(inputs, SMALL), y if problem.operator == "conv" else dtaps) < 5e-3


def test_nothing_is_compared_with_a_chosen_tile_that_fails(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "convolve", changed(programs.convolve, CONV, too_large))
    monkeypatch.setattr(tiles, "CANDIDATES", {"conv": (SMALL, DEEP)})
    found = tiles.table([(2, 5, 5)], [17], "cpu", own := Session(1, 1.0))
    assert (found.rows, own.failed) == ([], True)
    assert own.problems == ["conv of 17 x 2 x 25 failed: out of resource: shared memory"]


def test_problems_after_ctrl_c_are_named(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Session, what: str, steps: list[Any], device: Any) -> list[Timing]:
        if what == "conv of 17 x 2 x 36":
            raise KeyboardInterrupt
        return timed(self, what, steps, device)

    monkeypatch.setattr(Session, "time", interrupted)
    monkeypatch.setattr(tiles, "CANDIDATES", {"conv": (SMALL, DEEP)})
    found = tiles.table([(2, 5, 5), (2, 6, 6), (2, 7, 7)], [17], "cpu", own := Session(1, 1.0))
    assert {row["L"] for row in found.rows} == {25}
    assert own.notes() == ["Not measured before Ctrl-C: conv of 17 x 2 x 36; conv of 17 x 2 x 49."]


def test_candidates_are_tiles_that_the_programs_can_take() -> None:
    for operator, candidates in tiles.CANDIDATES.items():
        assert len(set(candidates)) == len(candidates)
        for tile in candidates:
            assert operator == "conv" or tile.rows <= tile.columns
            assert all(size & (size - 1) == 0 for size in tile[:3])
            assert 2 * tile.num_stages * tile.depth * (tile.rows + tile.columns) <= 227 * 1024
        for channels, height, width in ops.DEFAULT_SHAPES:
            problem = Problem(operator, channels, height * width, 256)
            assert problem.tiles()[0] == problem.chosen
            assert len(set(problem.tiles())) == len(problem.tiles())
            assert all(tile.columns < 2 * problem.length for tile in problem.tiles()[1:])
    wide = {tile[:3] for tile in Problem("conv", 96, 3136, 256).tiles()}
    assert {(128, 256, 64), (256, 128, 64), (128, 128, 64), (128, 128, 32)} < wide


def test_tiles_on_a_gpu_are_timed_as_replays_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    class Graph:
        def replay(self) -> None:
            ran.append("replayed")

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        ran.append("begin")
        yield
        ran.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    step = tiles._step("cuda", lambda: ran.append("ran"))
    step()
    step()
    assert ran == ["begin", "ran", "end", "replayed", "replayed"]


def test_what_tiles_cannot_measure_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, quiet: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["profile", "tiles"])
    with pytest.raises(SystemExit, match=r"^2$"):
        main.main()
    [line] = capsys.readouterr().err.splitlines()
    assert "CUDA device, and none is there" in line
    monkeypatch.setattr(triton_toeplitz, "_PROBLEM", "is too old")
    with refused("triton", "is too old"):
        tiles.table([(2, 5, 5)], [17], "cpu", Session(1, 1.0))


def test_layers_of_one_length_are_refused(programs: Any) -> None:
    with refused("--shape", "H * W"):
        tiles.table([(2, 6, 6), (4, 4, 9)], [17], "cpu", Session(1, 1.0))
