"""The GPU plan tried out on a CPU with tiny networks: tables, verdicts and the clock, but no number of a GPU."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused, relative_error
from torch import Tensor
from training_helpers import ROOT

from sgconvnext.longconv import BACKENDS
from sgconvnext.longconv.triton import toeplitz as triton_toeplitz
from sgconvnext.longconv.triton.tiles import Tile
from sgconvnext.profile import __main__ as main
from sgconvnext.profile import gpu, gpu_block, gpu_models, gpu_ops, gpu_plan, gpu_tiles, ops, timing
from sgconvnext.profile.gpu_models import Variant
from sgconvnext.profile.gpu_plan import TIMED, Deadline, DeadlineError, Plan, Stage
from sgconvnext.profile.gpu_tiles import Problem
from sgconvnext.profile.table import Table
from sgconvnext.profile.timing import Timing
from sgconvnext.profile.workload import Workload

HERE = ("fft", "toeplitz", "dft")  # that run on a CPU
PLAN = Plan(
    device="cpu",
    sizes=("atto",),
    img_size=32,
    backends=HERE,
    forward_batch=3,
    backward_batch=2,
    check_batches=(1, 3),
    copy_bytes=2**10,
    matmul_side=16,
    rounds=2,
    seconds=1e-4,
    model_rounds=2,
    model_seconds=1e-4,
)


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURN_S", 1e-4)


def test_stages_are_those_of_the_network() -> None:
    tiny, large = (Plan(sizes=(size,)).stages() for size in ("tiny", "large"))
    assert [stage.shape for stage in tiny] == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]
    assert [stage.shape[0] for stage in large] == [192, 384, 768, 1536]
    assert [stage.blocks for stage in tiny] == [3, 3, 9, 3]
    assert str(large[2]) == "large's stage 3"
    assert Plan().stages() == tiny + large
    assert (Plan().batch("inference"), Plan().batch("training")) == (256, 128)


def test_deadline_stops_what_runs_and_leaves_out_the_rest() -> None:
    deadline, ran = Deadline(0.2), []
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    deadline.run("first", lambda: ran.append(1))
    deadline.run("second", lambda: [time.sleep(0.01) for _ in range(1000)])
    deadline.run("third", lambda: ran.append(3))
    assert time.monotonic() - start < 2
    assert ran == [1]
    assert deadline.notes() == ["Not reached before the deadline: second; third."]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_deadline_is_no_exception_that_a_compiler_could_swallow() -> None:
    def stubborn() -> None:
        try:
            time.sleep(5)
        except Exception:
            time.sleep(5)

    start = time.monotonic()
    Deadline(0.1).run("stubborn", stubborn)
    assert time.monotonic() - start < 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_deadline_that_was_lost_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __del__(self) -> None:  # where Python ignores what is raised
            time.sleep(5)

    def loses_it() -> None:
        Slow()
        time.sleep(5)

    monkeypatch.setattr(gpu_plan, "AGAIN_S", 0.2)
    start, deadline = time.monotonic(), Deadline(0.1)
    deadline.run("loses it", loses_it)
    assert 0.2 < time.monotonic() - start < 3
    assert deadline.notes() == ["Not reached before the deadline: loses it."]


def test_failure_is_noted_and_the_rest_goes_on() -> None:
    deadline, ran = Deadline(60), []

    def fails() -> None:
        raise RuntimeError("CUDA error:\n  out of memory")

    deadline.run("first", fails)
    deadline.run("second", lambda: ran.append(2))
    assert ran == [2]
    assert deadline.notes() == ["first failed: CUDA error: out of memory"]


def test_share_ends_earlier_and_shares_its_memory() -> None:
    deadline = Deadline(100)
    half = deadline.share(0.5)
    assert 49 < half.left <= 50 < deadline.left
    Deadline(-1).share(0.5).run("elsewhere", lambda: None)
    deadline.share(-1).run("something", lambda: None)
    assert deadline.notes() == half.notes() == ["Not reached before the deadline: something."]


def test_first_part_measures_every_stage_layout_and_backend() -> None:
    deadline = Deadline(600)
    rates, depthwise, exact, speed, sums, around = gpu_ops.tables(PLAN, deadline)
    assert deadline.notes() == []
    assert [row["unit"] for row in rates.rows] == ["GB/s", "TFLOP/s"]
    assert all(row["rate"] > 0 for row in rates.rows)
    assert [(row["stage"], row["layout"]) for row in depthwise.rows] == [
        (stage, layout) for stage in (1, 2, 3, 4) for layout in ("NHWC", "NCHW")
    ]
    for row in depthwise.rows:
        samples = 2 * row["channels"] * int(row["map"].split("x")[0]) ** 2
        assert row["dgrad ps/sample"] == pytest.approx(row["dgrad ms"] * 1e9 / samples)
        assert row["forward ps/sample"] == pytest.approx(row["forward ms"] * 1e9 / samples / 1.5)
    truth, *rows = exact.rows
    assert truth["backend"] == "fft, float64"
    assert [(row["stage"], row["backend"]) for row in rows] == [(s, name) for s in (1, 2, 3, 4) for name in HERE]
    assert [row["right"] for row in exact.rows] == ["yes"] * 13
    assert all(0 < row["y"] < 5e-3 for row in rows)
    assert len(speed.rows) == 2 * 2 * 4
    assert all(row[f"{name} ms"] > 0 for row in speed.rows for name in ("7x7", "SGConv", "kernel", *HERE))
    assert {f"{name} ms" for name in HERE} < set(speed.columns)
    assert not {"reference ms", "right"} & set(speed.columns)
    assert len(sums.rows) == 2 * 2
    assert not around.rows  # without triton
    assert not any("reference" in heading for row in (*speed.rows, *sums.rows) for heading in row)


def test_first_part_says_what_it_did_not_reach() -> None:
    deadline = Deadline(-1)
    found = gpu_ops.tables(PLAN, deadline)
    assert not any(table.rows for table in found)
    [note] = deadline.notes()
    assert "rates; 7x7 of atto's stage 1 in NHWC; " in note
    assert "exactness of dft in atto's stage 4; " in note
    assert note.endswith("training of atto's stage 4 in NCHW.")


def test_gradients_of_the_depthwise_convolution_are_those_of_autograd() -> None:
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(3, 1, 7, 7, requires_grad=True)
    dy = torch.randn(2, 3, 8, 8)
    y: Any = gpu_ops._forward_step(x, weight)()
    want = torch.autograd.grad(y, [x, weight], dy)
    for i, which in enumerate(("dgrad", "wgrad")):
        got: Any = gpu_ops._backward_step(dy, x.detach(), weight.detach(), which)()
        assert [tensor is not None for tensor in got] == [i == 0, i == 1, False]
        assert relative_error(got[i], want[i]) < 1e-6


def test_inputs_take_turns() -> None:
    ran: list[int] = []
    step = gpu_ops._in_turns([lambda i=i: ran.append(i) for i in range(3)])
    for _ in range(7):
        step()
    assert ran == [0, 1, 2, 0, 1, 2, 0]


STAGE = Stage("atto", 1, 4, 6, 2)


def broken(fault: str) -> Callable[[Tensor, Tensor], Tensor]:
    toeplitz = BACKENDS["toeplitz"]
    return {
        "reversed": lambda x, taps: toeplitz(x, taps.flip(-1)),
        "zero": lambda x, taps: 0 * (x + taps.sum().to(x.dtype)),
        "NaN": lambda x, taps: toeplitz(x, taps) * math.nan,
        "random": lambda x, taps: toeplitz(x, taps) * (1 + 1e-2 * torch.rand(1)).to(x.dtype),
        "taps rounded": lambda x, taps: toeplitz(x, taps.to(x.dtype)),  # and so their gradient
    }[fault]


@pytest.mark.parametrize(
    ("fault", "again"),
    {"reversed": "yes", "zero": "yes", "NaN": "no", "random": "no", "taps rounded": "yes"}.items(),
)
def test_broken_backend_is_not_right(fault: str, again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "broken", broken(fault))
    row = gpu_ops.exactness(PLAN, STAGE, "broken")
    assert (row["right"], row["again"]) == ("no", again)
    assert gpu_ops.exactness(PLAN, STAGE, "toeplitz")["right"] == "yes"


def test_wrong_truth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_ops._truth(PLAN)["right"] == "yes"
    monkeypatch.setitem(BACKENDS, "fft", broken("reversed"))
    assert gpu_ops._truth(PLAN)["right"] == "no"


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_layers_are_timed_on_bf16_tensors_in_their_layout(
    mode: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, torch.dtype, torch.dtype, bool, int]] = []
    long_conv = ops.long_conv

    def watched(x: Tensor, taps: Tensor, backend: str) -> Tensor:
        seen.append((backend, x.dtype, taps.dtype, x.is_contiguous(), x.data_ptr()))
        return long_conv(x, taps, backend)

    monkeypatch.setattr(ops, "long_conv", watched)
    row = gpu_ops._speed(PLAN, STAGE, mode, layout)
    assert (row["size"], row["stage"], row["layout"], row["mode"], row["L"]) == ("atto", 1, layout, mode, 36)
    assert row["batch"] == (3 if mode == "inference" else 2)
    assert {call[:4] for call in seen} == {(name, torch.bfloat16, torch.float32, layout == "NCHW") for name in HERE}
    assert len({call[4] for call in seen}) == gpu_ops.SETS


def test_layers_without_autocast_have_weights_of_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[Any] = []

    def watched(self: torch.nn.Conv2d, x: Tensor) -> Tensor:
        dtypes.append((x.dtype, self.weight.dtype, torch.is_autocast_enabled("cpu")))
        return x

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    for autocast in (True, False):
        ops.prepare(ops.Layer((4, 6, 6), dtype="bf16", autocast=autocast))["7x7"]()
    assert dtypes == [(torch.bfloat16, torch.float32, True), (torch.bfloat16, torch.bfloat16, False)]


def speed_rows(milliseconds: dict[str, list[float]], mode: str = "inference") -> list[dict[str, Any]]:
    """Of the four stages, with the fastest backend named."""
    rows = []
    for i in range(4):
        times = {f"{name} ms": values[i] for name, values in milliseconds.items() if values[i]}
        backends = {name: values[i] for name, values in milliseconds.items() if name != "7x7" and values[i]}
        fastest = min(backends, key=backends.__getitem__)
        rows.append({"size": "atto", "mode": mode, "layout": "NHWC", "stage": i + 1, "fastest": fastest} | times)
    return rows


def test_sums_weigh_layers_by_their_blocks() -> None:
    rows = speed_rows({"7x7": [1, 2, 3, 4], "fft": [2, 2, 2, 2], "toeplitz": [0, 1, 1, 1]})
    table = gpu_ops.sums(PLAN, rows)
    [row] = table.rows  # of one mode and layout; the others are not complete
    assert (row["7x7 ms"], row["fft ms"]) == (2 * 1 + 2 * 2 + 6 * 3 + 2 * 4, 2 * 12)  # 2, 2, 6 and 2 blocks
    assert "toeplitz ms" not in row
    assert row["best ms"] == 2 * 2 + 2 * 1 + 6 * 1 + 2 * 1
    assert row["7x7 / best"] == 32 / 14
    assert gpu_ops.sums(PLAN, rows[:3]).rows == []


SMALL, DEEP = Tile(16, 16, 16, 4, 2), Tile(16, 16, 32, 4, 2)
CONV, DTAPS = Tile(32, 64, 64, 4, 2), Tile(64, 64, 32, 4, 3)  # what tiles.py chooses for a few short signals
TILES_PLAN = replace(PLAN, forward_batch=17, backward_batch=18, rounds=1)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Triton programs in the interpreter, for two candidates of each operator."""
    pytest.importorskip("triton")
    if not triton_toeplitz._INTERPRETED:
        pytest.skip("of the interpreter")
    from sgconvnext.longconv.triton import programs as triton_programs

    for operator in gpu_tiles.CANDIDATES:
        monkeypatch.setitem(gpu_tiles.CANDIDATES, operator, (SMALL, DEEP))
    return triton_programs


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_first_part_measures_what_is_around_the_mlp(mode: str, programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [Stage("atto", 1, 16, 5, 2), Stage("atto", 2, 32, 3, 2)]
    monkeypatch.setattr(Plan, "stages", lambda self: stages)
    plan = replace(PLAN, backends=("triton",), modes=(mode,), rounds=2)
    table = gpu_block.table(plan, deadline := Deadline(600))
    assert deadline.notes() == []
    assert [(row["stage"], row["mode"]) for row in table.rows] == [(1, mode), (2, mode)]
    for row in table.rows:
        assert all(row[f"{name} ms"] > 0 for name in ("norm", "norm, triton", "sum", "sum, triton"))
        assert all(len(rounds) == 2 for pair in row["seconds"].values() for rounds in pair)
    for pair in gpu_block._steps(plan, stages[0], mode):
        for want, got in zip(*map(results, pair), strict=True):
            assert relative_error(got, want) <= 3e-2  # in bfloat16


def results(step: Callable[[], Any]) -> list[Tensor]:
    """The output, or the gradients."""
    found = step()
    return [found] if isinstance(found, Tensor) else list(found)


def test_second_part_times_tiles_of_every_problem_once(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [Stage("atto", 1, 1, 5, 2), Stage("atto", 2, 2, 6, 2), Stage("femto", 1, 1, 5, 2)]  # the first again
    monkeypatch.setattr(Plan, "stages", lambda self: stages)
    monkeypatch.setattr(gpu_tiles, "SETS", 1)
    deadline = Deadline(600)
    tiles, winners = gpu_tiles.tables(TILES_PLAN, deadline)
    assert deadline.notes() == []
    problems = [
        (operator, channels, length, batch)
        for channels, length in ((1, 25), (2, 36))
        for operator, batch in (("conv", 17), ("conv", 18), ("dtaps", 18))
    ]
    assert [tuple(row[name] for name in ("operator", "channels", "L", "batch")) for row in tiles.rows[::3]] == problems
    for problem, row, *own in zip(
        problems, winners.rows, tiles.rows[::3], tiles.rows[1::3], tiles.rows[2::3], strict=True
    ):
        chosen = CONV if problem[0] == "conv" else DTAPS
        assert [tile["tile"] for tile in own] == [f"Tile{tuple(tile)}" for tile in (chosen, SMALL, DEEP)]
        assert all(tile["ms"] > 0 and tile["error"] < 1e-2 for tile in own)
        assert (own[0]["ratio"], own[0]["error"]) == (1, 0)
        assert [tile["mark"] for tile in own].count("") == (2 if "fastest" in own[0]["mark"] else 1)
        [best] = [tile for tile in own if "fastest" in tile["mark"]]
        assert best["ratio"] == max(tile["ratio"] for tile in own) == row["ratio"]
        assert (row["chosen"], row["fastest"], row["ms"]) == (own[0]["tile"], best["tile"], best["ms"])


def changed(function: Callable[..., Tensor], results: dict[Tile, Callable[[Tensor], Tensor]]) -> Callable[..., Tensor]:
    """A program whose result is another one for some tiles."""

    def broken(*arguments: Any) -> Tensor:
        result = function(*arguments)
        return results[arguments[-1]](result) if arguments[-1] in results else result

    return broken


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
    monkeypatch.setattr(programs, name, changed(getattr(programs, name), {SMALL: fault}))
    monkeypatch.setattr(gpu_tiles, "interleave", lambda steps, *_: [faster(i + 1) for i in range(len(steps))])
    problem, deadline = Problem(operator, 2, 25, 17), Deadline(600)
    errors, timings = gpu_tiles.compare(TILES_PLAN, problem, deadline)
    chosen, small, deep = gpu_tiles.rows(problem, errors, timings)
    assert (chosen["mark"], small["mark"], deep["mark"]) == ("chosen", mark, "fastest")
    assert ("ms" in small) == (mark == "")
    assert deep["ms"] == pytest.approx(1000 / len(timings) / gpu_tiles.SETS)
    winner = gpu_tiles.winner(problem, timings)
    assert (winner["chosen"], winner["fastest"], winner["ratio"]) == (chosen["tile"], deep["tile"], len(timings))
    macs = 2 * 4 * 16 * 16 * 32  # for 2 channels: by conv 2 x 2 tiles, by dtaps 1 + 2 + 1 of 3 diagonals
    assert winner["TFLOP/s"] == pytest.approx(2 * macs / deep["ms"] / 1e9)
    failed = f"Tile(16, 16, 16, 4, 2) in {operator} of 17 x 2 x 25 failed: out of resource: shared memory"
    assert deadline.notes() == ([failed] if mark == "not timed" else [])


def faster(factor: int) -> Timing:
    return Timing([[1 / factor]], [[1.0]])


def test_tile_that_writes_nothing_is_wrong(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is given the memory that right results were in before."""
    launches: set[tuple[Tile, int]] = set()
    memory: list[Tensor] = []
    real, poison = programs._launch, gpu_tiles.poison

    def launch(*arguments: Any) -> None:
        x, _, y = arguments[2]
        launches.add((arguments[-1], x.data_ptr()))
        if arguments[-1] == SMALL:
            y.copy_(memory[-1])
        else:
            real(*arguments)
            memory.append(y.clone())

    def poisoned(like: Any) -> None:
        poison(like)
        memory.append(torch.full_like(like[0], torch.nan))

    monkeypatch.setattr(programs, "_launch", launch)
    monkeypatch.setattr(gpu_tiles, "poison", poisoned)
    errors, timings = gpu_tiles.compare(TILES_PLAN, Problem("conv", 2, 25, 17), Deadline(600))
    assert list(timings) == [CONV, DEEP]
    assert not errors[SMALL] <= 5e-3
    assert [tile for tile, _ in launches].count(DEEP) == gpu_tiles.SETS == 3  # inputs
    assert [tile for tile, _ in launches].count(SMALL) == 1


def test_problems_are_those_of_the_backend(programs: Any) -> None:
    for problem in (Problem("conv", 2, 25, 17), Problem("dtaps", 2, 25, 17)):
        inputs = problem.signals("cpu")
        y, _, dtaps = gpu_ops._gradients(*inputs, "fft")
        assert relative_error(problem.run(inputs, SMALL), y if problem.operator == "conv" else dtaps) < 5e-3


def test_nothing_is_compared_with_a_chosen_tile_that_fails(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "convolve", changed(programs.convolve, {CONV: too_large}))
    deadline = Deadline(600)
    assert gpu_tiles.compare(TILES_PLAN, Problem("conv", 2, 25, 17), deadline) == ({}, {})
    [note] = deadline.notes()
    assert note.startswith("Tile(32, 64, 64, 4, 2) in conv of 17 x 2 x 25 failed: ")


def test_second_part_says_what_it_did_not_reach(programs: Any) -> None:
    found = gpu_tiles.tables(TILES_PLAN, deadline := Deadline(-1))
    assert not any(table.rows for table in found)
    [note] = deadline.notes()
    assert "compiling all tiles at once; Tile(32, 64, 64, 4, 2) in conv of 17 x 40 x 64; " in note
    assert note.endswith("; Tile(64, 64, 32, 4, 3) in dtaps of 18 x 320 x 1.")


def test_tiles_that_there_was_no_time_for_are_said_not_to_be_timed(
    programs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: object) -> None:
        raise DeadlineError

    monkeypatch.setattr(gpu_tiles, "interleave", too_late)
    monkeypatch.setattr(Plan, "stages", lambda self: [Stage("atto", 1, 2, 5, 2)])
    tiles, winners = gpu_tiles.tables(replace(TILES_PLAN, modes=("inference",)), deadline := Deadline(600))
    assert [row["mark"] for row in tiles.rows] == ["not timed"] * 3
    assert winners.rows == []
    assert deadline.notes() == ["Not reached before the deadline: timing conv of 17 x 2 x 25."]


def test_tiles_that_are_compiled_stop_at_the_deadline(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(
        Problem, "run", lambda self, inputs, tile: ran.append(inputs[0].device.type) or time.sleep(0.02)
    )
    found = [Problem("conv", channels, 9, 17) for channels in range(1, 3000)]
    start = time.monotonic()
    Deadline(0.3).run("compiling", lambda: gpu_tiles.compile_ahead(found))
    assert time.monotonic() - start < 3
    assert 1 < len(ran) < 3000
    assert set(ran) == {"meta"}


def test_candidates_are_tiles_that_the_programs_can_take() -> None:
    for operator, tiles in gpu_tiles.CANDIDATES.items():
        assert len(set(tiles)) == len(tiles)
        for tile in tiles:
            assert operator == "conv" or tile.rows <= tile.columns
            assert all(size & (size - 1) == 0 for size in tile[:3])
            assert 2 * tile.num_stages * tile.depth * (tile.rows + tile.columns) <= 227 * 1024
    for problem in gpu_tiles.problems(Plan()):
        tiles = problem.tiles()
        assert tiles[0] == problem.chosen
        assert len(set(tiles)) == len(tiles) >= 4
        assert all(tile.columns < 2 * problem.length for tile in tiles)
    wide = {tile[:3] for tile in Problem("conv", 96, 3136, 256).tiles()}
    assert {(128, 256, 64), (256, 128, 64), (128, 128, 64), (128, 128, 32)} < wide
    assert len(gpu_tiles.problems(Plan())) == 3 * 8
    assert gpu_tiles.problems(Plan(sizes=("tiny", "small"))) == gpu_tiles.problems(Plan(sizes=("tiny",)))
    assert {problem.operator for problem in gpu_tiles.problems(Plan(modes=("inference",)))} == {"conv"}


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
    step = gpu_tiles._step(Plan(device="cuda"), lambda: ran.append("ran"))
    step()
    step()
    assert ran == ["begin", "ran", "end", "replayed", "replayed"]


def test_launches_find_what_was_compiled_ahead(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="needs triton, which brings NVIDIA's assembler")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, ROOT / "tests" / "compiled_ahead.py"],
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert (found["ahead"], found["later"]) == (7, 0)  # the chosen tiles, two candidates of each, and one too large
    assert found["launched"] == ["_convolve"] * 9 + ["_correlate"] * 9
    assert "shared memory" in found["refusal"]


def test_second_part_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_toeplitz, "_INSTALLED", False)
    with refused("triton", "not installed"):
        gpu_tiles.tables(TILES_PLAN, Deadline(60))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An allocator whose peak over what was there before grows by 1 GiB with every model; and no compiler."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: (5 + calls.count("reset")) * 2**30)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: calls.append("compiled") or model)
    return calls


@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning")
def test_third_part_compares_models_eager_and_compiled(memory: list[str]) -> None:
    plan, deadline = replace(PLAN, backends=("dft",)), Deadline(600)
    models, verdicts = gpu_models.tables(plan, deadline)
    assert deadline.notes() == []
    specs = ["convnext_atto", "sgconvnext_atto,backend=dft"]
    assert [(row["model"], row["run"], row["mode"], row["batch"]) for row in models.rows] == [
        (spec, run, mode, batch)
        for mode, batch in (("inference", 3), ("training", 2))
        for run in ("eager", "compiled")
        for spec in specs
    ]
    assert memory == 2 * ["reset", "reset", "compiled", "reset", "compiled", "reset"]
    assert [row["peak GiB"] for row in models.rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(row["images/s"] > 0 for row in models.rows)
    assert models.rows[0]["ratio"] == models.rows[4]["ratio"] == 1
    assert [(row["mode"], row["measure"]) for row in verdicts.rows] == [
        ("inference", "speed"),
        ("training", "speed"),
        ("training", "peak memory"),
    ]
    assert not any("must" in row for row in verdicts.rows[:2])  # atto has no goal


def test_models_run_as_the_plan_says(memory: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[tuple[str, Workload]] = []
    monkeypatch.setattr(gpu_models, "prepare", lambda spec, work: works.append((spec, work)) or (lambda: None))
    plan = Plan(device="cpu", model_rounds=1, model_seconds=1e-4, backends=("fft", "dft"))
    gpu_models.compare(plan, "large", "training", Deadline(60))
    assert [spec for spec, _ in works] == 2 * [
        "convnext_large",
        "sgconvnext_large,backend=fft",
        "sgconvnext_large,backend=dft",
    ]
    assert {work for _, work in works} == {
        Workload("training", 128, (224, 224), "bf16", channels_last=True, compile=compiled, device="cpu")
        for compiled in (False, True)
    }


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_only_models_that_infer_are_reparameterized(
    mode: str, memory: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed: set[bool] = set()
    monkeypatch.setattr(gpu_models, "prepare", lambda spec, work: fixed.add(work.reparameterize) or (lambda: None))
    gpu_models.compare(replace(PLAN, reparameterize=True), "atto", mode, Deadline(60))
    assert fixed == {mode == "inference"}


def test_model_that_fails_or_comes_too_late_leaves_the_others_in(
    memory: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(spec: str, work: Workload) -> Callable[[], None]:
        if "fft" in spec:
            raise torch.OutOfMemoryError("out of memory")
        if work.compile:
            time.sleep(30)
        return lambda: None

    monkeypatch.setattr(gpu_models, "prepare", prepare)
    monkeypatch.setattr(gpu_models, "_free", lambda: None)  # collecting garbage takes half a second
    deadline = Deadline(1.0)
    variants = gpu_models.compare(replace(PLAN, backends=("fft", "dft")), "atto", "inference", deadline)
    assert [(variant.spec, variant.run) for variant in variants] == [
        ("convnext_atto", "eager"),
        ("sgconvnext_atto,backend=dft", "eager"),
    ]
    missed, failed = deadline.notes()
    assert missed == (
        "Not reached before the deadline: inference of convnext_atto, compiled; inference of "
        "sgconvnext_atto,backend=fft, compiled; inference of sgconvnext_atto,backend=dft, compiled."
    )
    assert failed == "inference of sgconvnext_atto,backend=fft failed: out of memory"


def variant(spec: str, compiled: bool, times: list[float], gib: float) -> Variant:
    return Variant(spec, Workload(compile=compiled), int(gib * 2**30), Timing([times], [[1.0] * len(times)]))


@pytest.mark.parametrize(
    ("ours", "gib", "reached", "memory_reached"),
    [(2.0, 10.0, "target", "target"), (2.4, 10.4, "must", "must"), (2.5, 10.6, "neither", "neither")],
)
def test_verdict_is_of_the_best_of_both(ours: float, gib: float, reached: str, memory_reached: str) -> None:
    speed, memory = gpu_models.verdict(
        "tiny",
        "training",
        [
            variant("convnext_tiny", False, [3.0, 3.0, 3.0], 12),
            variant("convnext_tiny", True, [2.4, 2.4, 9.0], 10),
            variant("sgconvnext_tiny,backend=dft", False, [ours, ours, ours], gib),
            variant("sgconvnext_tiny,backend=dft", True, [4.0, 4.0, 4.0], 1),
        ],
    )
    assert (speed["theirs"], speed["ours"]) == ("convnext_tiny, compiled", "sgconvnext_tiny,backend=dft, eager")
    assert speed["ratio"] == 2.4 / ours
    assert (speed["must"], speed["target"], speed["reached"]) == (1.0, 1.15, reached)
    assert memory["ratio"] == pytest.approx(gib / 10)
    assert (memory["must"], memory["target"], memory["reached"]) == (1.05, 1.0, memory_reached)


def test_inference_has_no_verdict_on_memory() -> None:
    [row] = gpu_models.verdict(
        "large", "inference", [variant("convnext_large", False, [1.0], 1), variant("sgconvnext_large", True, [1.0], 9)]
    )
    assert (row["must"], row["target"], row["reached"]) == (0.97, 1.05, "must")


def test_too_many_backends_to_compile_are_refused() -> None:
    with refused("--backends", "9", "8"):
        gpu_models.tables(Plan(backends=("fft",) * 9), Deadline(60))


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: None, tmp_path: Path) -> Run:
    """The command in an empty folder; its standard output and its last line on standard error."""
    monkeypatch.chdir(tmp_path)

    def told(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["profile", "gpu", *map(str, arguments)])
        main.main()
        captured = capsys.readouterr()
        return captured.out, captured.err

    return told


def test_without_a_gpu_one_line_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for part in gpu.PARTS:
        with pytest.raises(SystemExit) as stopped:
            run("--part", part)
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        [line] = captured.err.splitlines()
        assert "CUDA device, and none is there" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--part", "4"], ["--part", "4"]),
        ([], ["--part"]),
        (["--part", "1", "--sizes", "huge"], ["--sizes", "huge", "tiny"]),
        (["--part", "1", "--backends", "reference"], ["--backends", "reference", "dft"]),
        (["--part", "1", "--deadline", "-1"], ["--deadline", "-1"]),
        (["--part", "1", "--out", "no/a.json"], ["--out", "no/a.json"]),
        (["--part", "1", "--reparameterize"], ["--reparameterize", "--part 1", "--part 3"]),
        (["--part", "2", "--reparameterize"], ["--reparameterize", "--part 2", "--part 3"]),
        (["--part", "2", "--backends", "dft"], ["--backends", "--part 2", "--part 1 or 3"]),
    ],
)
def test_bad_arguments_end_with_one_line(run: Run, capsys: Any, arguments: list[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in words)


def test_command_prints_its_tables_and_writes_them_as_json(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Plan, float]] = []

    def part(plan: Plan, deadline: Deadline) -> list[Table]:
        asked.append((plan, deadline.left))
        deadline.run("beads", lambda: 1 / 0)
        empty = Table("Nothing", {"a": ""})
        return [empty, Table("Beads", {"ms": ".2f"}, [{"ms": 0.5, "seconds": [1, 2]}])]

    monkeypatch.setattr(main, "chosen_device", lambda name: "cuda")
    monkeypatch.setattr(main, "environment", lambda device, command, **more: {"device": device.type} | more)
    for number in gpu.PARTS:
        monkeypatch.setitem(gpu.PARTS, number, part)
        out, _ = run("--part", number, "--sizes", "tiny", "--mode", "training", "--deadline", 77)
        assert "Beads\n" in out
        assert "0.50" in out
        assert "beads failed: division by zero" in out
        assert "Nothing" not in out
        found = json.loads((tmp_path / f"gpu_part{number}.json").read_text())
        assert found["environment"]["device"] == "cuda"
        assert found["tables"][0]["rows"] == [{"ms": 0.5, "seconds": [1, 2]}]
        plan, left = asked[-1]
        assert (plan.sizes, plan.modes, plan.device) == (("tiny",), ("training",), "cuda")
        assert plan.backends == gpu.BACKENDS_OF[number]
        assert 70 < left <= 77
    run("--part", 3, "--backends", "dft", "--reparameterize", "--out", tmp_path / "a.json")
    assert asked[-1][0].reparameterize
    assert asked[-1][0].backends == ("dft",)
    assert asked[-1][0].sizes == ("tiny", "large")
    assert (tmp_path / "a.json").exists()


def test_parts_end_within_nine_minutes_unless_asked_otherwise() -> None:
    assert gpu.DEADLINE_S == 9 * 60
    assert set(gpu.BACKENDS_OF) == set(gpu.FOREIGN) == set(gpu.PARTS)
    assert set(gpu.BACKENDS_OF[1]) == set(TIMED) == set(BACKENDS) - {"reference"}
    assert gpu.BACKENDS_OF[3]


def test_driver_is_named_where_nvidia_smi_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "driver, power limit, top clock" not in gpu.facts()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '580.1, 700.00 W, 1980 MHz'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert gpu.facts()["driver, power limit, top clock"] == "580.1, 700.00 W, 1980 MHz"
