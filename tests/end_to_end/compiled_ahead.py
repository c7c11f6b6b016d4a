"""Launch tiles after compiling them ahead, on an H100 that is not there, and print what was compiled when, as JSON.

All of Triton's launch is real, but for the driver, which loads and runs nothing. It is a process of its own because
nothing can be compiled where TRITON_INTERPRET=1 is set.
"""

import json
from types import SimpleNamespace
from typing import Any

import triton.compiler
from triton.runtime.driver import driver
from triton_block_compiled import Hopper

from sgconvnext.longconv.triton.tiles import Tile
from sgconvnext.profile import tiles
from sgconvnext.profile.tiles import Problem

TILES = [Tile(64, 64, 64, 4, 2), Tile(64, 128, 64, 4, 3)]
TOO_LARGE = Tile(128, 256, 64, 8, 5)  # 240 KiB of shared memory, where an H100 has 227
PROBLEMS = [Problem(name, 4, 196, 65) for name in ("conv", "dtaps")]
launched: list[str] = []
compiled: list[str] = []


class Launching(Hopper):
    """And what Triton hands a program to."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        load_binary=lambda *_: (None, None, 0, 0, 1024),
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: launched.append(source.name)


def main() -> None:
    driver.set_active(Launching())
    real = triton.compiler.compile

    def watched(source: Any, **options: Any) -> Any:
        compiled.append(source.name)
        return real(source, **options)

    triton.compiler.compile = watched
    tiles.CANDIDATES = {"conv": (*TILES, TOO_LARGE), "dtaps": tuple(TILES)}
    tiles.compile_ahead(PROBLEMS)
    ahead = len(compiled)
    for problem in PROBLEMS:
        for batch in (1, 65, 256):
            for tile in problem.tiles()[: 1 + len(TILES)]:
                own = problem._replace(batch=batch)
                own.run(own.signals("cpu"), tile)
    try:
        PROBLEMS[0].run(PROBLEMS[0].signals("cpu"), TOO_LARGE)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    found = {"ahead": ahead, "later": len(compiled) - ahead, "launched": launched, "refusal": refusal}
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
