"""The processes of a run: one per device, started by torchrun, or a single one."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import one_line
from .signals import follow_parent


@dataclass(frozen=True, slots=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Rank 0 alone prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all processes, in place and the same on each; a CPU tensor never waits for a GPU."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def spread(self, values: Tensor) -> None:
        """Overwrite the values with those of rank 0."""
        if self.size > 1:
            dist.broadcast(values, src=0)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on each of them."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def on_each(self, action: Callable[[], Any]) -> Any:
        """Every process acts, without a message to the others; where one raises a ValueError, all raise the first.

        It names its rank, unless all have the same to say.
        """
        result, problem = None, None
        try:
            result = action()
        except ValueError as error:
            problem = str(error)
        problems = self.gather(problem)
        for rank, text in enumerate(problems):
            if text is not None:
                raise ValueError(text if len(set(problems)) == 1 else f"rank {rank} of {self.size}: {text}")
        return result

    def agree(self, values: dict[str, Any], cure: str) -> None:
        """Refuse values that differ between the processes.

        Args:
            values: of this process, by name; the names are the same on each.
            cure: what the user can do.

        Raises:
            ValueError: on every process, with the first that differs, both values and their ranks.
        """
        first, *others = self.gather(values)
        for rank, other in enumerate(others, start=1):
            for name, value in first.items():
                if other[name] != value:
                    raise ValueError(f"{name}: {value} on rank 0, but {other[name]} on rank {rank}; {cure}")

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Rank 0 acts; every process gets its result, or raises its ValueError or OSError."""
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = action()
            except (ValueError, OSError) as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def start(device: str) -> World:
    """Join the process group that torchrun's environment describes: nccl for CUDA tensors, gloo for the CPU's.

    Args:
        device: "auto" (CUDA if there), "cuda" or "cpu".

    Raises:
        ValueError: CUDA asked for and absent, or more processes on this machine than GPUs.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but no CUDA device is there; use run.device=cpu, or auto")
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_cuda:
        if local_size > torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {local_size} processes on a machine with {torch.cuda.device_count()} GPUs; "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    where = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if "RANK" not in os.environ:
        return World(rank=0, size=1, device=where)
    follow_parent(signal.SIGTERM)  # no process of a run trains on alone when torchrun is killed
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", device_id=where if on_cuda else None)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=where)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fail(program: str, error: Exception, code: int = 2, alone: bool = False) -> NoReturn:
    """End this process with one line; once per machine where the others fail alike, always where it fails alone."""
    stop()
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{program}: error: {one_line(error)}\n")
    sys.exit(code)
