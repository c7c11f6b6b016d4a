"""Compile Triton programs for an H100, which need not be here, and print what came out as JSON.

    python tests/end_to_end/compile_programs.py '[["conv", 256, 3136, false, "bfloat16", [128, 256, 64, 8, 3]]]'

takes operators (conv, dx or dtaps) with batch, length, whether causal, dtype and tile. It is a process of its own
because nothing can be compiled where TRITON_INTERPRET=1 is set.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sgconvnext.longconv.triton import programs as triton_programs
from sgconvnext.longconv.triton.tiles import Tile

CONVOLVE, CORRELATE = triton_programs._convolve, triton_programs._correlate
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


class Launches:
    """Stands for a program and keeps what it is compiled with."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def warmup(self, *arguments: Any, grid: tuple[int], **options: Any) -> None:
        self.found.append((self.program, arguments, options))


def launch_of(operator: str, batch: int, length: int, causal: bool, dtype: str, tile: Tile) -> Any:
    """The program, arguments and options that an operator launches for 96 channels, found out without memory."""
    x = torch.empty(batch, 96, length, dtype=getattr(torch, dtype), device="meta")
    taps = torch.empty(96, length if causal else 2 * length - 1, device="meta")
    first_lag = length - taps.shape[1]
    launches = Launches(CORRELATE if operator == "dtaps" else CONVOLVE)
    triton_programs._convolve = triton_programs._correlate = launches
    triton_programs._lay_out = Launches(triton_programs._lay_out)
    if operator == "dtaps":
        triton_programs.correlate(x, x, first_lag, tile)
    else:
        triton_programs.convolve(x, taps, 1 - length if operator == "dx" else first_lag, tile)
    [launch] = launches.found
    return launch


def compile_launch(program: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """As Triton does when it launches, given that PyTorch's memory is aligned to 16 bytes."""
    names = program.arg_names
    signature = dict.fromkeys(names, "constexpr") | {
        name: POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        for name, value in zip(names, arguments, strict=False)
    }
    constants = {name: value for name, value in options.items() if name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=program, signature=signature, constexprs=constants, attrs=aligned)
    rest = {name: value for name, value in options.items() if name not in names}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=rest)


def disassembly(cubin: bytes) -> tuple[str, str]:
    """The machine code, and what it occupies."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [TOOLS / "nvdisasm", "-c", file.name], [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        code, usage = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return code, usage


def main_loop(code: str) -> str:
    """From the target of the jump back over matrix products to the jump; empty where one step is all."""
    position = {match[1]: match.start() for match in re.finditer(r"^(\.L_x_\d+):", code, re.MULTILINE)}
    loops = [
        code[position[jump[1]] : jump.end()]
        for jump in re.finditer(r"\bBRA\b.*?`\((\.L_x_\d+)\)", code)
        if position[jump[1]] < jump.start()
    ]
    return min((loop for loop in loops if "HMMA" in loop or "HGMMA" in loop), key=len, default="")


def compiled(*case: Any) -> dict[str, Any]:
    """Compile one launch, and count its instructions: all of them, and those of the loop over matrix products."""
    program, arguments, options = launch_of(*case[:-1], Tile(*case[-1]))
    kernel = compile_launch(program, arguments, options)
    code, usage = disassembly(kernel.asm["cubin"])
    loop = main_loop(code)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "all": Counter(OPCODE.findall(code)),
        "loop": Counter(OPCODE.findall(loop)),
        "in flight": [int(n, 16) for n in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", loop)],
        "int64 offsets": len(re.findall(r"arith\.muli .* : tensor<\d+x1xi64", kernel.asm["ttir"])),
    }


if __name__ == "__main__":
    print(json.dumps([compiled(*case) for case in json.loads(sys.argv[1])]))  # noqa: T201
