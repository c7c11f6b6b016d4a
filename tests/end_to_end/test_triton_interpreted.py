"""What takes Triton's interpreter long: every tile, every access to memory, long signals.

On a GPU, if there is one, else interpreted. Memory that nothing is written to is NaN here.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Case, case, relative_error, run
from torch import Tensor

from sgconvnext.longconv.triton.tiles import CONV_TILES, DTAPS_TILES, Tile

pytest.importorskip("triton")
from sgconvnext.longconv.triton import programs as triton_programs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

each_side = pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nothing is written to is NaN, and an operator that adds in no fixed order is an error."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def here(length: int, causal: bool, dtype: torch.dtype, size: tuple[int, int] | None = None) -> Case:
    inputs = case(length, causal, dtype, size)
    return Case(*(tensor.to(DEVICE) for tensor in inputs[:3]), {k: v.to(DEVICE) for k, v in inputs.truth.items()})


@pytest.mark.parametrize(("length", "size"), [(196, (65, 1)), (784, (3, 1)), (3136, (2, 1))], ids=str)
@pytest.mark.parametrize(("dtype", "causal"), [(torch.bfloat16, False), (torch.float16, True)], ids=str)
def test_backend_matches_definition_at_the_lengths_of_the_stages(
    dtype: torch.dtype, causal: bool, length: int, size: tuple[int, int]
) -> None:
    x, taps, dy, truth = here(length, causal, dtype, size)
    bound = {torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    for name, got in run(x, taps, dy, "triton").items():
        assert relative_error(got, truth[name]) <= (2e-6 if name == "dtaps" else bound), name


def exactly(tile: Tile, length: int, causal: bool, batch: int, gradient: bool) -> float:
    """The error of one of the programs with a tile, in float32, which the interpreter multiplies exactly."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16  # a GPU would multiply float32 in tf32
    x, taps, dy, truth = here(length, causal, dtype, (batch, 2))
    first_lag = length - taps.shape[1]
    if gradient:
        return relative_error(triton_programs.correlate(x, dy, first_lag, tile), truth["dtaps"])
    y = triton_programs.convolve(x, taps, first_lag, tile)
    dx = triton_programs.convolve(dy, taps.flip(-1), 1 - length, tile)
    return max(relative_error(y, truth["y"]), relative_error(dx, truth["dx"]))


@pytest.mark.parametrize("length", [1, 100, 257])  # within a tile, and one more than its whole number
@each_side
@pytest.mark.parametrize("tile", sorted({tile for *_, tile in CONV_TILES}), ids=lambda tile: "x".join(map(str, tile)))
def test_every_tile_convolves(tile: Tile, causal: bool, length: int) -> None:
    assert exactly(tile, length, causal, tile.rows + 1, gradient=False) <= (1e-6 if DEVICE == "cpu" else 1e-3)


@pytest.mark.parametrize("length", [1, 100, 257])  # within a tile, and one more than its whole number
@each_side
@pytest.mark.parametrize(
    "tile",
    [*sorted({tile for *_, tile in DTAPS_TILES}), Tile(16, 64, 16, 4, 2), Tile(128, 256, 64, 8, 3)],
    ids=lambda tile: "x".join(map(str, tile)),
)
def test_every_tile_correlates(tile: Tile, causal: bool, length: int) -> None:
    assert exactly(tile, length, causal, tile.depth + 1, gradient=True) <= 1e-6


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Launches fail if they read or write outside their tensors, or write a place twice; the list of accesses."""
    if DEVICE == "cuda":
        pytest.skip("compute-sanitizer sees it on a GPU")
    from triton.runtime.interpreter import InterpreterBuilder

    accesses: list[tuple[str, int]] = []
    spans: list[tuple[int, int]] = []
    written: list[Any] = []

    def watch(name: str) -> None:
        access = getattr(InterpreterBuilder, name)

        def watched(self: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[0] if name == "create_masked_load" else rest[1]
            addresses = pointers.data[mask.data.astype(bool)]
            inside = sum(((addresses >= begin) & (addresses < end)).sum() for begin, end in spans)
            assert inside == addresses.size, f"{name} outside of every tensor"
            accesses.append((name, addresses.size))
            if name == "create_masked_store":
                written.extend(addresses.tolist())
            return access(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, watched)

    def run(program: Any, count: int, operands: tuple[Any, ...], **constants: Any) -> None:
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        spans[:] = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
        written.clear()
        before = len(accesses)
        real_run(program, count, operands, **constants)
        assert len(written) == len(set(written)), "a place is written twice"
        if program is triton_programs._lay_out:  # the tests count what the others write
            del accesses[before:]

    real_run = triton_programs._run
    watch("create_masked_load")
    watch("create_masked_store")
    monkeypatch.setattr(triton_programs, "_run", run)
    return accesses


@pytest.mark.parametrize("length", [1, 65, 300])
@each_side
def test_programs_stay_inside_their_tensors_and_write_each_place_once(
    length: int, causal: bool, memory: list[tuple[str, int]]
) -> None:
    x, taps, dy, _ = here(length, causal, torch.float32, (33, 2))
    for tile in {tile for *_, tile in CONV_TILES}:
        triton_programs.convolve(x, taps, length - taps.shape[1], tile)
        triton_programs.convolve(dy, taps.flip(-1), 1 - length, tile)
    writes = sum(size for name, size in memory if name == "create_masked_store")
    assert writes == 2 * len({tile for *_, tile in CONV_TILES}) * x.numel()
    for tile in {tile for *_, tile in DTAPS_TILES}:
        triton_programs.correlate(x, dy, length - taps.shape[1], tile)


def test_check_of_memory_finds_a_row_that_is_too_short(
    memory: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, taps, _, _ = here(65, False, torch.float32, (33, 2))
    copies = triton_programs._shifted_copies

    def shorter(*arguments: Any) -> tuple[Tensor, int]:
        rows, origin = copies(*arguments)
        return rows[:, :, :-1], origin

    monkeypatch.setattr(triton_programs, "_shifted_copies", shorter)
    with pytest.raises(Exception, match="outside of every tensor"):
        triton_programs.convolve(x, taps, -64, CONV_TILES[0][2])
