"""Every tile compiled for an H100: tensor-core instructions, loads as wide as rows are aligned, nothing spilled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from training_helpers import ROOT

from sgconvnext.longconv.triton.tiles import CONV_TILES, DTAPS_TILES, Tile, conv_tile, dtaps_tile

pytest.importorskip("triton.backends.nvidia", reason="needs triton, which brings NVIDIA's assembler")

SHARED_BYTES = 227 * 1024  # of one program on an H100


class Launch(NamedTuple):
    """One program to compile: conv, dx or dtaps, for 96 channels."""

    operator: str
    batch: int
    length: int
    causal: bool = False
    dtype: str = "bfloat16"
    other_tile: Tile | None = None

    @property
    def tile(self) -> Tile:
        """That of the tables, if no other is given."""
        return self.other_tile or (dtaps_tile if self.operator == "dtaps" else conv_tile)(self.batch, self.length)

    @property
    def row_bytes(self) -> int:
        """The widest aligned load of a row of x: 16 bytes at 3136 and 784 tokens, 8 at 196, 2 at 49."""
        return next(size for size in (16, 8, 4, 2) if 2 * self.length % size == 0)

    def wanted_loads(self) -> set[int]:
        """Bytes of each load: as wide as alignment lets it, if a thread has as much to load."""
        rows, columns, depth, num_warps, _ = self.tile
        threads = 32 * num_warps
        if self.operator == "dtaps":
            return {min(self.row_bytes, 2 * depth * side // threads) for side in (rows, columns)}
        return {min(self.row_bytes, 2 * rows * depth // threads), min(16, 2 * depth * columns // threads)}


CONV = [
    Launch("conv", 32, 49),
    Launch("conv", 32, 3136),
    Launch("conv", 256, 16),
    Launch("conv", 256, 49),
    Launch("conv", 64, 3136),
    Launch("conv", 256, 196),
    Launch("conv", 128, 784),
    Launch("conv", 128, 3136),
    Launch("conv", 256, 784),
    Launch("conv", 256, 3136),
    Launch("conv", 256, 3136, dtype="float16"),
    Launch("conv", 256, 3136, causal=True),
    Launch("dx", 256, 3136, causal=True),
]
DTAPS = [
    Launch("dtaps", 32, 196),
    Launch("dtaps", 32, 3136),
    Launch("dtaps", 256, 16),
    Launch("dtaps", 256, 49),
    Launch("dtaps", 128, 784),
    Launch("dtaps", 256, 196),
    Launch("dtaps", 256, 784),
    Launch("dtaps", 256, 3136),
    Launch("dtaps", 256, 3136, dtype="float16"),
    Launch("dtaps", 256, 3136, causal=True),
]


def test_launches_have_every_tile_of_the_tables() -> None:
    assert {launch.tile for launch in CONV} == {tile for *_, tile in CONV_TILES}
    assert {launch.tile for launch in DTAPS} == {tile for *_, tile in DTAPS_TILES}


def compiled(launches: list[Launch], cache: Path) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "end_to_end" / "compile_programs.py",
            json.dumps([[*launch[:-1], launch.tile] for launch in launches]),
        ],
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def faults(launch: Launch, found: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled program."""
    everything, loop = found["all"], found["loop"]
    product = "HGMMA" if launch.tile.rows >= 64 else "HMMA"  # Hopper's own instruction takes 64 rows
    loops = launch.operator == "dtaps" or launch.length > launch.tile.depth
    asynchronous = launch.row_bytes >= 4  # the narrowest copy from memory to shared memory that waits for nothing
    conditions = {
        f"no {product}": any(name.startswith(product) for name in (loop if loops else everything)),
        "products on other units": not any(name.startswith(("FFMA", "HFMA2", "HFMA2.BF16")) for name in loop),
        "loads": loaded_bytes(everything) == launch.wanted_loads(),
        "waits for loads": not (loops and asynchronous) or not any(name.startswith("LDG.") for name in loop),
        "waits for products": not (loops and asynchronous and product == "HGMMA") or found["in flight"] == [1],
        # once in a program, and not at every step, a few cost nothing: the fastest tile of dtaps has 72 bytes
        "spills": found["stack"] <= 128 and not any(name.startswith(("LDL", "STL")) for name in loop),
        "shared memory": found["shared"] <= SHARED_BYTES,
        "offsets of 32 bits": found["int64 offsets"] >= 1,
    }
    return [name for name, fine in conditions.items() if not fine]


def loaded_bytes(instructions: dict[str, int]) -> set[int]:
    """Widths of the loads from global memory: LDG.E.128 or LDGSTS.E.BYPASS.128 is 16 bytes, without a number 4."""
    widths = {"U16": 2, "32": 4, "64": 8, "128": 16}
    names = [name.split(".") for name in instructions if name.startswith(("LDG.", "LDGSTS"))]
    return {next((widths[part] for part in parts if part in widths), 4) for parts in names}


def test_programs_compile_to_what_the_tiles_are_for(tmp_path: Path) -> None:
    launches = CONV + DTAPS
    found = compiled(launches, tmp_path)
    wrong = {launch: faults(launch, each) for launch, each in zip(launches, found, strict=True)}
    assert not any(wrong.values()), "\n".join(f"{launch}: {what}" for launch, what in wrong.items() if what)


def test_check_finds_what_other_tiles_do_wrong(tmp_path: Path) -> None:
    no_pipeline = Launch("conv", 256, 3136, other_tile=Tile(128, 256, 64, 8, 1))
    too_few_registers = Launch("dtaps", 256, 3136, other_tile=Tile(128, 256, 64, 4, 3))
    too_few_rows = Launch("conv", 256, 784, other_tile=Tile(32, 128, 64, 8, 3))
    found = compiled([no_pipeline, too_few_registers, too_few_rows], tmp_path)
    assert {"waits for loads", "waits for products"} <= set(faults(no_pipeline, found[0]))
    assert "spills" in faults(too_few_registers, found[1])
    assert "no HGMMA" in faults(too_few_rows._replace(other_tile=Tile(64, 128, 64, 8, 3)), found[2])
    assert "loads" in faults(too_few_rows._replace(length=196), found[2])


def test_launches_find_what_was_compiled_ahead(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, ROOT / "tests" / "end_to_end" / "compiled_ahead.py"],
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    # the chosen tiles, two candidates of each, and one too large; and two layouts of the taps
    assert (found["ahead"], found["later"]) == (9, 0)
    assert found["launched"] == ["_lay_out", "_convolve"] * 9 + ["_correlate"] * 9 + ["_lay_out"]
    assert "shared memory" in found["refusal"]
