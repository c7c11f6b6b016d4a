"""The GPU plan: what is to be measured on a device once one is there, in parts that fit ten minutes each.

    python -m sgconvnext.profile gpu --part 1      rates, cuDNN's 7x7, exactness and speed of the backends
    python -m sgconvnext.profile gpu --part 2      which tiles the Triton programs are fastest with
    python -m sgconvnext.profile gpu --part 3      SGConvNeXt against ConvNeXt

Every part prints tables and writes them with all rounds as JSON. It ends before its deadline, and says what it did not
get to.
"""

import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Callable

from . import gpu_models, gpu_ops, gpu_tiles
from .gpu_plan import TIMED, Deadline, Plan
from .table import Table

PARTS: dict[int, Callable[[Plan, Deadline], list[Table]]] = {
    1: gpu_ops.tables,
    2: gpu_tiles.tables,
    3: gpu_models.tables,
}
# in models those that use tensor cores: each one more is compiled twice per size, for minutes
BACKENDS_OF = {1: TIMED, 2: ("triton",), 3: tuple(name for name in TIMED if name not in ("fft", "toeplitz"))}
FOREIGN = {1: ("reparameterize",), 2: ("backends", "reparameterize"), 3: ()}  # options that a part does not have
DEADLINE_S = 540.0  # of the ten minutes that a command may take


def measure(part: int, plan: Plan, seconds: float) -> list[Table]:
    """The tables of a part.

    Args:
        part: of PARTS.
        plan: what of it.
        seconds: until it ends.

    Raises:
        ValueError: the device is a CPU.
    """
    if plan.device != "cuda":
        raise ValueError("profile gpu measures a CUDA device, and none is there; profile ops and throughput take CPUs")
    deadline = Deadline(seconds)
    tables = PARTS[part](plan, deadline)
    tables[-1].notes += deadline.notes()
    tables[-1].complete = not deadline.interrupted
    return [table for table in tables if table.rows or table.notes]


def facts() -> dict[str, str]:
    """What nvidia-smi and the package triton say of themselves, where they are there."""
    found = {}
    if importlib.util.find_spec("triton"):
        found["triton"] = importlib.metadata.version("triton")
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        found["driver, power limit, top clock"] = " | ".join(said.splitlines())
    except (OSError, subprocess.SubprocessError):
        pass  # it is no part of CUDA's runtime
    return found
