"""Compile the block's Triton operators for an H100, on any machine, and print what became of every program as JSON.

    python triton_block_compiled.py tiny:bfloat16 large:bfloat16      # sizes of models, dtypes of norms and branches

The operators run as they are, on CPU tensors, up to the launch: each program is specialised for the arguments that it
would get. Not under TRITON_INTERPRET, where nothing is compiled.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sgconvnext.longconv.triton import block
from sgconvnext.models.sgconvnext import SIZES

WIDTHS = {"128": 16, "64": 8, "16": 2, "8": 1}  # bytes, by the end of an instruction's name
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Hopper:
    """What Triton asks its driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_by(operators: Callable[[], object]) -> dict[str, Any]:
    """The programs that operators would launch, by name."""
    found = {}
    run = JITFunction.run

    def compile_only(program: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[program.__name__] = run(program, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_only
    operators()
    JITFunction.run = run
    return found


def anatomy(program: Any) -> dict[str, Any]:
    """Registers, memory, and bytes that all threads move per access of each width, every instruction counted once."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(program.asm["cubin"])
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    moved: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for name, modifiers in re.findall(r"\b(LDG|STG)((?:\.\w+)*)", code):
        width = next((width for suffix, width in WIDTHS.items() if modifiers.endswith(suffix)), 4)
        moved[name][width] += width * 32 * program.metadata.num_warps
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": program.metadata.shared,
        "warps": program.metadata.num_warps,
        "loaded": moved["LDG"],
        "stored": moved["STG"],
    }


def launch(channels: int, length: int, dtype: torch.dtype) -> None:
    """All four operators on two samples, as in training: parameters and shortcut in float32."""
    x, y = torch.empty(2, channels, length, dtype=dtype), torch.empty(2, length, channels, dtype=dtype)
    shortcut, parameter, keep = torch.empty(2, channels, length), torch.empty(channels), torch.empty(2)
    _, stats = block._norm(x, parameter, parameter, 1e-6, dtype)
    block._norm_gradients(y, x, parameter, stats)
    block._residual(shortcut, y, parameter, keep, dtype)
    block._residual_gradients(shortcut, x, y, parameter, keep, dtype)


def rows(size: str, dtype: str) -> list[dict[str, Any]]:
    """Every program at every stage of a model."""
    found = []
    for channels, side in zip(SIZES[size]["dims"], (56, 28, 14, 7), strict=True):
        shape = {"channels": channels, "length": side * side}
        programs = compiled_by(functools.partial(launch, **shape, dtype=getattr(torch, dtype)))
        found += [{"program": name, "dtype": dtype} | shape | anatomy(program) for name, program in programs.items()]
    return found


if __name__ == "__main__":
    driver.set_active(Hopper())
    json.dump([row for model in sys.argv[1:] for row in rows(*model.split(":"))], sys.stdout)
